// What the server does now, from /metrics.

import { metrics } from "./api.js";
import { draw, make } from "./dom.js";

const EVERY = 2000; // milliseconds
const POINTS = 90;
const SAMPLE = /^(aerie|vllm):(\w+?)(?:_total)?(?:\{(.*)\})? (\S+)$/gm;

/** Sums over labels by name; `steps`, by tree. */
const parsed = (text) => {
  const found = { at: performance.now(), steps: {} };
  const wanted = /^aerie:/m.test(text) ? "aerie" : "vllm"; // a server may have both, or one
  for (const [, prefix, name, labels, value] of text.matchAll(SAMPLE)) {
    if (prefix !== wanted) continue;
    found[name] = (found[name] ?? 0) + Number(value);
    const name_of_tree = /(?:^|,)tree="([^"]*)"/.exec(labels ?? "");
    if (name === "steps" && name_of_tree) found.steps_of = { ...found.steps_of, [name_of_tree[1]]: Number(value) };
  }
  return found;
};

const grown = (now, before, name) => (now[name] ?? 0) - (before[name] ?? 0);
const ratio = (top, bottom) => (bottom > 0 ? top / bottom : null);
const fixed = (digits, unit = "") => (value) => (value === null ? "–" : value.toFixed(digits) + unit);

// name, value of the time between two scrapes (null: nothing happened), how it is written
const CHARTS = [
  ["Tokens per second", (now, before) => grown(now, before, "generation_tokens") / ((now.at - before.at) / 1000), fixed(0)],
  ["Time per token", (now, before) => ratio(1000 * grown(now, before, "inter_token_latency_seconds_sum"), grown(now, before, "inter_token_latency_seconds_count")), fixed(1, " ms")],
  ["Acceptance length", (now, before) => {
    const accepted = ratio(grown(now, before, "spec_decode_num_accepted_tokens"), grown(now, before, "spec_decode_num_drafts"));
    return accepted === null ? null : 1 + accepted;
  }, fixed(2)],
  ["Running requests", (now) => now.num_requests_running ?? 0, fixed(0)],
  ["Waiting requests", (now) => now.num_requests_waiting ?? 0, fixed(0)],
  ["KV cache in use", (now) => 100 * (now.kv_cache_usage_perc ?? 0), fixed(1, " %")],
];

class Chart {
  constructor(name, value, written) {
    Object.assign(this, { value, written, points: [] });
    this.shown = make("span", { className: "value" }, "–");
    this.line = draw("path");
    const picture = draw("svg", { viewBox: `0 0 ${POINTS - 1} 30`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.line);
    this.element = make("div", { className: "chart" }, make("span", { className: "name" }, name), this.shown, picture);
  }

  add(now, before) {
    const value = this.value(now, before);
    this.points = [...this.points, value].slice(-POINTS);
    this.shown.textContent = this.written(value);
    const top = Math.max(...this.points, 1e-9) * 1.1;
    const first = POINTS - this.points.length;
    let pen = "M";
    const steps = this.points.map((each, at) => {
      if (each === null) { pen = "M"; return ""; }
      const step = `${pen}${first + at} ${(29 - (28 * each) / top).toFixed(2)}`;
      pen = "L";
      return step;
    });
    this.line.setAttribute("d", steps.join(""));
  }
}

class TreeShares {
  constructor() {
    this.bars = make("div", { className: "bars" });
    const name = make("span", { className: "name" }, "Trees of the last steps");
    this.element = make("div", { className: "chart whole" }, name, make("span"), this.bars);
  }

  add(now, before) {
    const steps = Object.entries(now.steps_of ?? {}).map(([tree, count]) => [tree, count - (before.steps_of?.[tree] ?? 0)]);
    const all = steps.reduce((sum, [, count]) => sum + count, 0);
    if (!all) return; // idle: the last ones stay
    const chosen = steps.filter(([, count]) => count > 0).sort((one, other) => other[1] - one[1]).slice(0, 6);
    this.bars.replaceChildren(...chosen.map(([tree, count]) => {
      const name = tree === "root" ? "none" : tree;
      const part = make("meter", { min: 0, max: 1, value: count / all, aria: { label: `${name}: share of the steps` } });
      const share = make("span", { className: "share" }, `${Math.round((100 * count) / all)} %`);
      return make("div", { className: "bar" }, make("span", {}, name), part, share);
    }));
  }
}

/** Fill `place` and keep it up to date while it is seen. */
export const showCharts = (place, isSeen) => {
  const charts = [...CHARTS.map((chart) => new Chart(...chart)), new TreeShares()];
  place.append(...charts.map((chart) => chart.element));
  let before = null;
  const scrape = async () => {
    if (isSeen()) {
      try {
        const now = parsed(await metrics());
        if (before) charts.forEach((chart) => chart.add(now, before));
        before = now;
      } catch {
        before = null; // the next scrape begins anew
      }
    }
    setTimeout(scrape, EVERY);
  };
  scrape();
};
