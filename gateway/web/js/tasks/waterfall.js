// Where a task's time went: a bar for each stretch of it, on one scale from its submit to its end.

import { now } from "../clock.js";
import { h, s } from "../dom.js";
import { seconds } from "../format.js";
import { outcomeKind } from "./states.js";

const STAGES = ["load", "encode", "denoise", "decode", "store"];
const CLOSE_MS = 1; // what ends an attempt and what ends its task are the same moment

/** Return the stretches of a task as {name, kind, from, ms}, `from` in ms since its submit.
 *  The stages are those of its last attempt, which does one after the other; what it waited in between for others is at the end. */
function stretches(task) {
  const begin = Date.parse(task.created_at);
  const end = task.finished_at ? Date.parse(task.finished_at) : now();
  const found = [];
  let free = 0; // since when no worker has had it
  task.attempts.forEach((attempt, index) => {
    const from = Date.parse(attempt.started_at) - begin;
    const to = (attempt.ended_at ? Date.parse(attempt.ended_at) : end) - begin;
    found.push({ name: index ? "queued again" : "queued", kind: "queued", from: free, ms: from - free });
    const last = index === task.attempts.length - 1;
    found.push({ name: `attempt ${index + 1}`, kind: outcomeKind(attempt.outcome), from, ms: to - from, note: attempt.outcome });
    if (last) found.push(...stages(task.timings, from));
    free = to;
  });
  if (end - begin - free > CLOSE_MS) {
    found.push({ name: task.attempts.length ? "queued again" : "queued", kind: "queued", from: free, ms: end - begin - free });
  }
  return found.map((one) => ({ ...one, ms: Math.max(0, one.ms) }));
}

function stages(timings, from) {
  const done = STAGES.filter((name) => timings[`${name}_ms`] > 0);
  return done.map((name) => {
    const ms = timings[`${name}_ms`];
    const stage = { name, kind: "stage", from, ms };
    from += ms;
    return stage;
  });
}

/** Return the table of a task's stretches. */
export function waterfall(task) {
  const all = stretches(task);
  const span = Math.max(1, task.timings.total_ms ?? 0, ...all.map(({ from, ms }) => from + ms));
  const rows = all.map((one) => h("tr", { class: one.kind === "stage" ? "within" : null },
    h("th", { scope: "row" }, one.name),
    h("td", { class: "stretch" }, bar(one, span)),
    h("td", { class: "number right" }, seconds(one.ms / 1000)),
    h("td", { class: "faint note" }, one.note ?? "")));
  return h("table", { class: "waterfall" },
    h("thead", { class: "visually-hidden" }, h("tr", {}, ["Stretch", "When", "Time", "Outcome"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows),
    h("tfoot", {}, h("tr", {}, h("th", { scope: "row" }, task.finished_at ? "total" : "so far"), h("td", {}), h("td", { class: "number right" }, seconds(span / 1000)), h("td", {}))));
}

function bar({ from, ms, kind }, span) {
  const share = (value) => `${(100 * value) / span}%`;
  const line = s("rect", { x: "0", y: "5", width: "100%", height: "2", class: "bar-line" });
  const block = s("rect", { x: share(from), y: "1", width: share(ms), height: "10", rx: "2", class: `bar-${kind}` });
  return s("svg", { width: "100%", height: "12", "aria-hidden": "true" }, line, block);
}
