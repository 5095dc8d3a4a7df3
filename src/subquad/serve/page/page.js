/**
 * The page: which models answer, the conversation, and the panels around it.
 */

import { Answer, make } from "./answer.js";
import { ApiError, chat, listModels } from "./api.js";
import { Charts } from "./charts.js";
import { keepSettings, keyStore, readSettings } from "./stores.js";

const COLOURS = 4;
const $ = (id) => document.getElementById(id);

let models = [];
/** What each model has seen so far, without the system prompt. */
let histories = new Map();
/** The last turn's answers, which may still be tried again. */
let answers = [];
/** One abort controller for each answer under way. */
const running = new Set();

const colourOf = (model) => Math.max(0, models.indexOf(model)) % COLOURS;
const charts = new Charts($("charts"), colourOf);

// Models

async function findModels() {
  $("trouble").hidden = true;
  try {
    models = await listModels();
  } catch (error) {
    if (error.status === 401) return askForKey();
    const words = error instanceof ApiError ? error.message : "The server's list of models can't be read.";
    $("trouble-text").textContent = words;
    $("trouble").hidden = false;
    return;
  }
  $("key-form").hidden = $("key-refused").hidden = true;
  for (const select of [$("first"), $("second")]) {
    select.replaceChildren(...models.map((model) => new Option(model)));
  }
  $("second").selectedIndex = Math.min(1, models.length - 1);
  $("side").checked = models.length > 1 && (readSettings().side ?? models.length === 2);
  $("side-label").hidden = models.length < 2;
  $("models").hidden = false;
  $("legend").replaceChildren(...models.map((model) => make("li", `colour-${colourOf(model)}`, model)));
  charts.draw();
  showChoice();
  $("message").focus();
}

function chosen() {
  const names = $("side").checked ? [$("first").value, $("second").value] : [$("first").value];
  return names.filter(Boolean);
}

function showChoice() {
  $("second-part").hidden = !$("side").checked;
  const names = chosen();
  $("welcome-text").textContent = names.length > 1 ? `${names.join(" and ")} answer side by side.` : `${names[0] ?? "No model"} answers.`;
}

/** One model beside itself shows nothing: where both are the same, `other` becomes another. */
function choose(other) {
  if ($("first").value === $("second").value) other.value = models.find((model) => model !== other.value) ?? "";
  showChoice();
}

$("first").addEventListener("change", () => choose($("second")));
$("second").addEventListener("change", () => choose($("first")));
$("side").addEventListener("change", () => {
  keepSettings({ side: $("side").checked });
  choose($("second"));
});
$("trouble-retry").addEventListener("click", findModels);

// The key

function askForKey() {
  // Two answers may be refused for one key: the second finds it gone, and the words stay.
  if (keyStore.read() !== null) $("key-refused").hidden = false;
  keyStore.write(null);
  $("key-form").hidden = false;
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keyStore.write($("key").value);
  $("key").value = "";
  findModels();
});

// The conversation

function send() {
  const text = $("message").value.trim();
  if (!text || running.size || !models.length || !settingsHold()) return;
  $("message").value = "";
  $("welcome").hidden = true;
  for (const answer of answers) answer.settle();

  const names = chosen();
  answers = names.map((model) => new Answer(model, colourOf(model)));
  const turn = make("section", "turn");
  const row = make("div", "answers");
  row.classList.toggle("two", answers.length === 2);
  row.append(...answers.map((answer) => answer.element));
  turn.append(make("p", "asked", text), row);
  $("transcript").append(turn);
  $("transcript").scrollTop = $("transcript").scrollHeight;
  announce(`${names.join(" and ")} ${names.length > 1 ? "are" : "is"} answering.`);
  for (const answer of answers) ask(answer, text);
}

async function ask(answer, text) {
  const history = histories.get(answer.model) ?? [];
  histories.set(answer.model, history);
  const question = { role: "user", content: text };
  const { system, ...sampling } = settings();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, question];
  const controller = new AbortController();
  running.add(controller);
  showRunning();
  try {
    for await (const chunk of chat({ model: answer.model, messages, ...sampling }, controller.signal)) {
      answer.add(chunk);
    }
    answer.finish();
    announce(`${answer.model}: ${answer.text}`);
  } catch (error) {
    if (error.name === "AbortError") {
      answer.finish("stopped");
      announce(`${answer.model} stopped.`);
    } else {
      answer.fail(error.message, () => {
        answer.begin();
        $("message").focus();
        ask(answer, text);
      });
      announce(`${answer.model} failed: ${error.message}`);
      if (error.status === 401) askForKey();
      return;
    }
  } finally {
    running.delete(controller);
    showRunning();
  }
  if (answer.text) history.push(question, { role: "assistant", content: answer.text });
}

function stop() {
  const held = document.activeElement === $("stop");
  for (const controller of running) controller.abort();
  if (held) $("message").focus();
}

function showRunning() {
  $("send").hidden = running.size > 0;
  $("stop").hidden = running.size === 0;
}

/** Says words to a screen reader: once at the beginning and once at the end of an answer, not at each token. */
function announce(words) {
  $("announcer").append(make("span", "", `${words} `));
  while ($("announcer").children.length > 4) $("announcer").firstChild.remove();
}

// A reader at the end is kept there as text comes; one who scrolled up is left in peace.
let atEnd = true;
$("transcript").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("transcript");
  atEnd = scrollHeight - scrollTop - clientHeight < 40;
});
new MutationObserver(() => {
  if (atEnd) $("transcript").scrollTop = $("transcript").scrollHeight;
}).observe($("transcript"), { childList: true, subtree: true, characterData: true });

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  // While an input method composes, Enter takes its suggestion.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  histories = new Map();
  answers = [];
  for (const turn of $("transcript").querySelectorAll(".turn")) turn.remove();
  $("welcome").hidden = false;
  announce("The conversation is cleared.");
  $("message").focus();
});
$("examples").addEventListener("click", (event) => {
  if (!(event.target instanceof HTMLButtonElement)) return;
  $("message").value = event.target.textContent;
  $("message").focus();
});

// Settings and panels

const fields = [...$("settings-form").elements].filter((field) => field.name);

/** The fields that are filled, by their names in the API. */
function settings() {
  const filled = fields.filter((field) => field.value.trim() !== "");
  return Object.fromEntries(filled.map((field) => [field.name, field.type === "number" ? field.valueAsNumber : field.value]));
}

function settingsHold() {
  if ($("settings-form").checkValidity()) return true;
  // The browser can point at a field only where it can be seen.
  openPanel("settings", true);
  $("settings-form").reportValidity();
  return false;
}

function openPanel(name, open) {
  $(name).hidden = !open;
  $(`${name}-button`).setAttribute("aria-expanded", String(open));
  $("panels").hidden = $("charts").hidden && $("settings").hidden;
  charts.look();
}

const kept = readSettings();
for (const field of fields) field.value = kept[field.name] ?? field.defaultValue;
$("settings-form").addEventListener("input", () => {
  keepSettings(Object.fromEntries(fields.map((field) => [field.name, field.value])));
});
$("settings-form").addEventListener("submit", (event) => event.preventDefault());
$("settings-reset").addEventListener("click", () => {
  $("settings-form").reset();
  $("settings-form").dispatchEvent(new Event("input"));
});

for (const name of ["charts", "settings"]) {
  $(`${name}-button`).addEventListener("click", () => openPanel(name, $(name).hidden));
}

openPanel("settings", false);
// Where the panels would take the conversation's place, they wait to be asked for.
openPanel("charts", matchMedia("(min-width: 60rem)").matches);
findModels();
