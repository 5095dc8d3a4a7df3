/**
 * One model's answer on the page: its text as it streams, and its speed beneath.
 */

import { show } from "./markup.js";

/** Seconds below which a speed says more of the network's buffers than of the model. */
const BRIEFEST = 0.05;
const ENDS = { length: "cut at the token limit", content_filter: "withheld by the server" };

export class Answer {
  /**
   * @param {string} model the name shown
   * @param {number} colour the number of the model's colour
   */
  constructor(model, colour) {
    this.model = model;
    this.text = "";
    this.element = make("article", "answer");
    this.element.classList.add(`colour-${colour}`);
    this.element.setAttribute("aria-label", `Answer of ${model}`);
    const name = make("h3", "name", model);
    name.title = model;
    this.body = make("div", "text");
    this.stats = make("p", "stats");
    this.element.append(name, this.body, this.stats);
    this.begin();
  }

  /** Starts anew, as for a first try. */
  begin() {
    this.text = "";
    this.chunks = 0;
    this.usage = null;
    this.sent = performance.now();
    this.first = this.last = null;
    this.end = "";
    this.trouble?.remove();
    this.element.setAttribute("aria-busy", "true");
    this.paint();
  }

  /** Takes a chunk of a streamed chat completion. */
  add(chunk) {
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) {
      this.last = performance.now();
      this.first ??= this.last;
      this.text += choice.delta.content;
      this.chunks += 1;
    }
    if (choice?.finish_reason) this.end = ENDS[choice.finish_reason] ?? "";
    if (chunk.usage) this.usage = chunk.usage;
    // Once a frame is enough, however fast the tokens come.
    this.frame ??= requestAnimationFrame(() => this.paint());
  }

  /** Ends the answer; `note` says how where it matters. */
  finish(note = this.end) {
    this.end = note;
    this.element.setAttribute("aria-busy", "false");
    this.paint();
  }

  /** Ends the answer with what went wrong and a button that calls `retry`. */
  fail(message, retry) {
    this.finish("");
    this.trouble = make("div", "trouble");
    const button = make("button", "", "Try again");
    button.type = "button";
    button.addEventListener("click", retry);
    this.trouble.append(make("p", "error", message), button);
    this.body.after(this.trouble);
  }

  /** Takes the retry away: the conversation went on. */
  settle() {
    this.trouble?.querySelector("button")?.remove();
  }

  paint() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    show(this.body, this.text);
    this.stats.replaceChildren(...this.figures());
  }

  /**
   * Speed counts the tokens after the first, over the time after the first. Until the server has told the count there
   * is only a bound: a chunk holds a token or more.
   */
  figures() {
    if (this.first === null) return this.end ? [make("span", "", this.end)] : [];
    const bound = this.usage ? "" : "≥ ";
    const tokens = this.usage?.completion_tokens ?? this.chunks;
    const seconds = (this.last - this.first) / 1000;
    const found = [];
    if (tokens > 1 && seconds > BRIEFEST) found.push(figure(bound + rounded((tokens - 1) / seconds), "tok/s"));
    found.push(figure(rounded((this.first - this.sent) / 1000, 2), "s to first token"));
    found.push(figure(bound + tokens, tokens === 1 ? "token" : "tokens"));
    if (this.end) found.push(make("span", "", this.end));
    return found;
  }
}

function figure(value, unit) {
  const span = make("span", "");
  span.append(make("b", "", value), ` ${unit}`);
  return span;
}

function rounded(value, digits = value < 100 ? 1 : 0) {
  return value.toFixed(digits);
}

/** An element with a class and text. */
export function make(tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
