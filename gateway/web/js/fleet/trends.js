// The charts of the last quarter of an hour, six hours, or seven days.

import { get } from "../api.js";
import { Chart } from "../chart.js";
import { h, say } from "../dom.js";
import { repeat } from "../live.js";
import { counts, energy, memory, rates, ratios, times } from "../scales.js";
import { figure, lines } from "./lines.js";

const KEPT = "zfleet.window";
const WINDOWS = {
  "15m": [900, "15 min", "15 minutes"],
  "6h": [6 * 3600, "6 h", "6 hours"],
  "7d": [7 * 86_400, "7 d", "7 days"],
};
const SOONEST_S = 2;
const LATEST_S = 60;
const SAMPLED_S = 1.5; // after its end a step is known

const ENDED = ["succeeded", "failed", "canceled", "expired"]; // as the tile counts them
const perMinute = (...names) => (point, { step_seconds: step }) =>
  names.some((name) => point[name] === null) ? null : names.reduce((total, name) => total + point[name], 0) * (60 / step);
const line = (name, of) => ({ name, of: of ?? ((point) => point[name]) });
const oldest = (point) => (point.queued === null ? null : point.oldest_age_seconds ?? 0);
const CHARTS = [
  { title: "Throughput", scale: rates, series: [line("tasks", perMinute(...ENDED)), line("images", perMinute("images"))] },
  { title: "Time to image", scale: times, series: [line("p50", (point) => point.p50_seconds), line("p95", (point) => point.p95_seconds)] },
  { title: "Error rate", scale: ratios(false), series: [line("error_ratio")] },
  { title: "Workers", scale: counts, series: [line("workers")] },
  { title: "Queue depth", scale: counts, series: [line("queued"), line("running")], wide: true, each: (queue) => queue.queued },
  { title: "Oldest wait", scale: times, series: [line("of all", oldest)], wide: true, each: (queue) => queue.oldest_age_seconds },
  { title: "GPU utilisation", scale: ratios(true), series: [line("utilisation", (point) => share(point.gpu_utilisation_percent))], optional: true },
  { title: "GPU memory", scale: memory, series: [line("gpu_memory_used_mb")], optional: true },
  { title: "Energy per image", scale: energy, series: [line("joules_per_image")], optional: true },
];

/** In how many seconds there is more to be seen. */
function nextStep({ points, step_seconds: step }) {
  const since = points.length ? (Date.now() - Date.parse(points.at(-1).at)) / 1000 : 0;
  return Math.min(LATEST_S, step, Math.max(SOONEST_S, step + SAMPLED_S - since));
}

const share = (value) => (value === null ? null : value / 100);

/** What a chart shows beside the whole, where it shows `each` queue. */
function beside(each, found, rest) {
  if (!each) return {};
  return {
    series: found.map(({ name, style }) => ({ name, style, of: (point) => figure(point, name, each) })),
    rest: rest ? `${rest} more in which less waited` : "",
  };
}

/** The charts and the choice of their window; they are drawn anew as the gateway's history grows, until `signal` aborts. */
export function trends(signal) {
  let window = WINDOWS[localStorage.getItem(KEPT)] ? localStorage.getItem(KEPT) : "15m";
  let due = LATEST_S;
  const charts = CHARTS.map((about) => new Chart(about));
  const waited = lines();
  const wrong = h("p", { class: "bad small", role: "status" });
  const load = async () => {
    const asked = window;
    try {
      const history = await get(`api/history?window=${asked}`, signal);
      if (asked !== window) return;
      due = nextStep(history);
      const [seconds, , words] = WINDOWS[asked];
      const { found, rest } = waited(history);
      charts.forEach((chart, index) => chart.draw(history, seconds, words, beside(CHARTS[index].each, found, rest)));
      say(wrong, "");
    } catch (error) {
      if (error.status === 401) throw error;
      if (!signal.aborted) say(wrong, `The history cannot be read: ${error.message}`);
    }
  };
  const choice = (name) => h("label", {}, h("input", {
    type: "radio", name: "window", value: name, checked: name === window, onchange: () => {
      window = name;
      localStorage.setItem(KEPT, name);
      load();
    } }), h("span", {}, WINDOWS[name][1]));
  const element = h("section", { "aria-labelledby": "trends" },
    h("div", { class: "row spread" }, h("h2", { id: "trends" }, "Trends"),
      h("fieldset", { class: "choice" }, h("legend", { class: "visually-hidden" }, "Over"), Object.keys(WINDOWS).map(choice))),
    wrong, h("div", { class: "charts" }, charts.map((chart) => chart.element)));
  const follow = () => repeat(load, () => due, signal);
  return { element, follow };
}
