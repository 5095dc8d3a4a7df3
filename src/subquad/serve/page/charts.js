/**
 * The live charts: `/metrics` asked once a second while anybody looks, drawn as small lines.
 */

import { make } from "./answer.js";
import { request } from "./api.js";
import { CHARTS, History, LENGTH, parseMetrics } from "./metrics.js";

const SVG = "http://www.w3.org/2000/svg";
const SECOND = 1000;
const SLOWEST = 10 * SECOND;

export class Charts {
  /**
   * @param {HTMLElement} section hidden while closed
   * @param {(model: string) => number} colourOf the number of a model's colour
   */
  constructor(section, colourOf) {
    this.section = section;
    this.colourOf = colourOf;
    this.history = new History();
    this.pictures = new Map(CHARTS.map((chart) => [chart, new Picture(chart)]));
    section.querySelector("#figures").append(...[...this.pictures.values()].map((picture) => picture.element));
    this.delay = SECOND;
    document.addEventListener("visibilitychange", () => this.look());
  }

  /** Asks once a second from now on if the charts can be seen, and no longer if not; to be called when that changed. */
  look() {
    const seen = !document.hidden && !this.section.hidden;
    if (!seen) {
      clearTimeout(this.timer);
      this.timer = null;
    } else if (!this.timer && !this.asking) {
      this.ask();
    }
  }

  async ask() {
    this.timer = null;
    this.asking = true;
    let metrics = null;
    try {
      metrics = parseMetrics(await (await request("metrics")).text());
      this.delay = SECOND;
    } catch {
      // A server that is away, or keeps its metrics to itself, is asked ever more seldom.
      this.delay = Math.min(2 * this.delay, SLOWEST);
    }
    this.asking = false;
    this.history.add(metrics, performance.now() / SECOND);
    this.draw();
    this.timer = setTimeout(() => this.ask(), this.delay);
    this.look();
  }

  /** Draws what is known; to be called too when a model's colour may have changed. */
  draw() {
    if (this.history.samples.length === 0) return;
    const { metrics } = this.history.samples.at(-1);
    let drawn = 0;
    for (const [chart, picture] of this.pictures) {
      const series = this.history.series(chart);
      picture.element.hidden = !series?.size;
      if (!series?.size) continue;
      picture.draw(series, this.colourOf);
      drawn += 1;
    }
    const words = this.section.querySelector("#no-charts");
    words.hidden = metrics !== null && drawn > 0;
    words.textContent = metrics ? "The server tells no metrics that this page knows." : "The server's metrics can't be read.";
  }
}

class Picture {
  constructor(chart) {
    this.chart = chart;
    this.element = make("figure", "chart");
    this.element.hidden = true;
    this.values = make("span", "values");
    const caption = make("figcaption", "");
    caption.append(make("span", "", chart.title), this.values);
    // The caption says the newest values in words; the line is for the eye.
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${LENGTH - 1} 40`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("aria-hidden", "true");
    this.element.append(caption, this.svg);
  }

  draw(series, colourOf) {
    const all = [...series.values()].flat();
    const top = this.chart.top ?? (Math.max(...all) || 1);
    this.values.replaceChildren();
    this.svg.replaceChildren();
    for (const [model, points] of series) {
      const last = points.findLast((point) => point !== null);
      const value = make("span", `value colour-${colourOf(model)}`);
      // The colour tells the eye whose value it is; the name tells who listens.
      if (model) value.append(make("span", "visually-hidden", `${model}: `));
      value.append(last === undefined ? "–" : this.chart.words(last));
      this.values.append(value);
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", `colour-${colourOf(model)}`);
      path.setAttribute("d", line(points, top));
      this.svg.append(path);
    }
  }
}

/** A path through the points, newest at the right edge, broken where points are missing. */
function line(points, top) {
  const start = LENGTH - points.length;
  let path = "";
  points.forEach((point, i) => {
    if (point === null) return;
    const place = `${start + i},${(38 - (36 * point) / top).toFixed(2)}`;
    const joined = i > 0 && points[i - 1] !== null;
    // A lone point is drawn as a dot: a line of no length with round ends.
    path += joined ? `L${place}` : `M${place}L${place}`;
  });
  return path;
}
