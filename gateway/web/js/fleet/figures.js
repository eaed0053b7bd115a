// The present figures as tiles, and what waits by model and priority.

import { link } from "../address.js";
import { h, keyed, say } from "../dom.js";
import { number, percent, seconds, whole } from "../format.js";

const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);
const [LATE_S, LATE_LOW_S, MOST_ERRORS] = [300, 3600, 0.05]; // as of deploy/grafana/alerts.yml
const rate = (value) => number(value, value >= 10 ? 0 : 1);

/** The oldest age among queues; null where nothing waits. */
function oldest(queues) {
  const ages = queues.map((queue) => queue.oldest_age_seconds).filter((age) => age !== null);
  return ages.length ? Math.max(...ages) : null;
}

/** Whether tasks wait for longer than the alerts let them. */
const late = ({ queues }) => queues.some((queue) => queue.oldest_age_seconds > (queue.priority === "low" ? LATE_LOW_S : LATE_S));

// name, unit, text, and of some the tasks behind it and whether it is too high
const TILES = [
  ["Queued", "now", (fleet) => number(sum(fleet.queues, "queued")), "queued"],
  ["Running", "now", (fleet) => number(sum(fleet.queues, "running")), "running"],
  ["Oldest wait", "now", (fleet) => seconds(oldest(fleet.queues)), null, late],
  ["Tasks", "a minute", (fleet) => rate(fleet.recent.tasks_per_minute)],
  ["Images", "a minute", (fleet) => rate(fleet.recent.images_per_minute)],
  ["Time to image", "p50", (fleet) => seconds(fleet.recent.p50_seconds)],
  ["Time to image", "p95", (fleet) => seconds(fleet.recent.p95_seconds)],
  ["Errors", "of tasks", (fleet) => percent(fleet.recent.error_ratio), "failed", (fleet) => fleet.recent.error_ratio > MOST_ERRORS],
];

/** Tiles of the figures of now: `show(fleet)`. */
export function tiles() {
  const values = TILES.map(() => h("dd", { class: "number" }, "–"));
  const named = (name, status) => (status ? h("a", { href: link("tasks", { status }) }, name) : name);
  const span = h("p", { class: "faint small" });
  const element = h("section", { "aria-label": "Now" },
    h("dl", { class: "tiles" }, TILES.map(([name, unit, , status], index) =>
      h("div", { class: "card tile" }, h("dt", {}, named(name, status), " ", h("small", {}, unit)), values[index]))), span);
  const show = (fleet) => {
    TILES.forEach(([, , of, , high], index) => {
      say(values[index], of(fleet));
      values[index].className = high?.(fleet) ? "number high" : "number";
    });
    say(span, `Rates, times and errors are of the last ${whole(fleet.recent.window_seconds)}.`);
  };
  return { element, show };
}

const order = { high: 0, normal: 1, low: 2 };
const COLUMNS = ["Model", "Priority", "Queued", "Running", "Oldest wait"];

/** The table of what waits: `show(fleet)`. */
export function queues() {
  const rows = h("tbody");
  const none = h("p", { class: "faint", hidden: true }, "Nothing waits, and nothing runs.");
  const table = h("table", { hidden: true }, h("thead", {}, h("tr", {}, COLUMNS.map((name, index) =>
    h("th", { scope: "col", class: index > 1 ? "number" : null }, name)))), rows);
  const element = h("section", { class: "card", "aria-labelledby": "queues" }, h("h2", { id: "queues" }, "Queues"), table, none);
  const show = (fleet) => {
    const found = [...fleet.queues].sort((a, b) => a.model.localeCompare(b.model) || order[a.priority] - order[b.priority]);
    table.hidden = !found.length;
    none.hidden = found.length > 0;
    keyed(rows, found, (queue) => `${queue.model}.${queue.priority}`, row, (element, queue) => {
      const texts = [queue.model, queue.priority, number(queue.queued), number(queue.running), seconds(queue.oldest_age_seconds)];
      texts.forEach((text, index) => say(element.children[index], text));
    });
  };
  return { element, show };
}

const row = () => h("tr", {}, h("th", { scope: "row" }), h("td"), ...Array.from({ length: 3 }, () => h("td", { class: "number" })));
