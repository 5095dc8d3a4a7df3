/**
 * The server's Prometheus metrics: what the charts show, and how it is computed from what `/metrics` says.
 */

/** Samples kept, one a second. */
export const LENGTH = 120;

/**
 * The charts. `needs` names the metrics without which a chart is hidden, as a Prometheus query would; `value` gives its
 * newest point from them (`now` is a metric's value and `growth` what it gained lately), or null where there is none.
 */
export const CHARTS = [
  {
    title: "Tokens per second",
    needs: ["subquad_tokens_total"],
    value: ({ growth }, [tokens]) => growth(tokens, 3).perSecond,
    words: (value) => value.toFixed(value < 100 ? 1 : 0),
  },
  {
    // Of the guesses whose turn came: what follows a wrong one is never judged.
    title: "Guesses accepted",
    needs: ['subquad_guesses_total{what="kept"}', 'subquad_guesses_total{what="judged"}'],
    value: ({ growth }, [kept, judged]) => share(growth(kept, 10).amount, growth(judged, 10).amount),
    words: percent,
    top: 1,
  },
  {
    title: "Requests running",
    needs: ["subquad_batch"],
    value: ({ now }, [running]) => now(running),
    words: String,
  },
  {
    title: "Requests waiting",
    needs: ["subquad_queue_length"],
    value: ({ now }, [waiting]) => now(waiting),
    words: String,
  },
  {
    title: "State memory",
    needs: ["slots", "aside", "prefixes"].map((kind) => `subquad_state_bytes{kind="${kind}"}`),
    value: ({ now }, kinds) => kinds.map(now).reduce((sum, bytes) => sum + bytes),
    words: bytesInWords,
  },
  {
    // Since the server's start: hits are too rare for a share of the last seconds.
    title: "Prefix hit rate",
    needs: ["subquad_prefix_hits_total", "subquad_prefix_misses_total"],
    value: ({ now }, [hits, misses]) => share(now(hits), now(hits) + now(misses)),
    words: percent,
    top: 1,
  },
];

function share(part, whole) {
  return whole > 0 ? part / whole : null;
}

function percent(value) {
  return `${(100 * value).toFixed(0)} %`;
}

function bytesInWords(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;

/**
 * Reads the Prometheus text format into a Map of metric to a Map of model to value. A metric is found under its name,
 * summed over other labels than `model`, and under `name{label="value"}` for each of those; without `model` under "".
 */
export function parseMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const [, name, written, number] = SAMPLE.exec(line) ?? [];
    const value = Number(number?.replace("Inf", "Infinity"));
    if (Number.isNaN(value)) continue;
    const { model = "", ...others } = readLabels(written ?? "");
    const selected = Object.entries(others).map(([label, chosen]) => `${name}{${label}="${chosen}"}`);
    for (const metric of [name, ...selected]) {
      if (!metrics.has(metric)) metrics.set(metric, new Map());
      const byModel = metrics.get(metric);
      byModel.set(model, (byModel.get(model) ?? 0) + value);
    }
  }
  return metrics;
}

function readLabels(written) {
  const unescaped = (text) => text.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
  return Object.fromEntries([...written.matchAll(LABEL)].map(([, label, text]) => [label, unescaped(text)]));
}

/** The last `LENGTH` samples and the points made of them. */
export class History {
  constructor() {
    this.samples = [];
    this.points = new Map(CHARTS.map((chart) => [chart, new Map()]));
  }

  /**
   * Takes a sample of `parseMetrics`, or null for one missed.
   *
   * @param {number} seconds when it was taken
   */
  add(metrics, seconds) {
    this.samples.push({ metrics, seconds });
    if (this.samples.length > LENGTH) this.samples.shift();
    for (const chart of CHARTS) {
      const series = this.points.get(chart);
      for (const model of modelsOf(metrics, chart)) if (!series.has(model)) series.set(model, []);
      for (const [model, points] of series) {
        points.push(metrics ? chart.value(this.view(model), chart.needs) : null);
        if (points.length > LENGTH) points.shift();
      }
    }
  }

  /** The series to draw, a Map of model to points, oldest first; null where the server has not got what it needs. */
  series(chart) {
    const { metrics } = this.samples.at(-1);
    return metrics && modelsOf(metrics, chart).length === 0 ? null : this.points.get(chart);
  }

  view(model) {
    const at = (sample, name) => sample?.metrics?.get(name)?.get(model) ?? null;
    const newest = this.samples.at(-1);
    return {
      now: (name) => at(newest, name),
      growth: (name, span) => {
        const before = this.samples.slice(-1 - span, -1).find((sample) => at(sample, name) !== null);
        const amount = before ? at(newest, name) - at(before, name) : null;
        // A counter that shrank began anew with its server.
        if (amount === null || amount < 0) return { amount: null, perSecond: null };
        return { amount, perSecond: amount / (newest.seconds - before.seconds) };
      },
    };
  }
}

function modelsOf(metrics, chart) {
  const [first, ...others] = chart.needs.map((name) => [...(metrics?.get(name)?.keys() ?? [])]);
  return first.filter((model) => others.every((models) => models.includes(model)));
}
