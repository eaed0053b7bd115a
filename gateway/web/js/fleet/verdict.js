// Whether all is well, in one line, and why not; and how old what is shown is.

import { link } from "../address.js";
import { h, keyed, say } from "../dom.js";
import { whole } from "../format.js";

const WORDS = {
  healthy: ["good", "✓", "Healthy"],
  degraded: ["warn", "!", "Degraded"],
  unhealthy: ["bad", "✕", "Unhealthy"],
  unknown: ["faint", "…", "Looking"],
};
const LATE_S = 20; // the stream says every 15 s that it lives
const NAMED = 3; // workers that a reason names

/** The line at the top: `show(health, { suspended, silent, since, recent })`, with the names of workers that are not heard of, since
 *  when nothing else was told where that is so, and how it went of late. It is read out when it changes, and only then. */
export function verdict() {
  const mark = h("span", { class: "mark", "aria-hidden": "true" });
  const word = h("strong");
  const about = h("span", { class: "faint" });
  const reasons = h("ul", { class: "reasons" });
  const troubles = h("p", { class: "troubles", hidden: true }, h("span"), " ", h("a", { href: link("tasks", { status: "failed" }) }, "Failed tasks"));
  const element = h("section", { class: "card verdict", role: "status", "aria-label": "Verdict" },
    mark, h("div", {}, h("p", {}, word, " ", about), reasons, troubles));
  const show = (health, { suspended = false, silent = [], since = null, recent = null } = {}) => {
    const status = silent.length && health?.status === "healthy" ? "degraded" : health?.status;
    const [tone, sign, name] = WORDS[status] ?? WORDS.unknown;
    const paused = suspended && tone === "good";
    element.className = `card verdict ${paused ? "warn" : tone}`;
    say(mark, paused ? "‖" : sign);
    say(word, paused ? "Paused" : name);
    say(about, health ? served(health) : "");
    const why = [
      ...(suspended ? ["The fleet is paused: tasks are accepted, none is begun."] : []), ...(health?.reasons ?? []),
      ...(silent.length ? [unheard(silent)] : []), ...(since ? [`What else is shown is of ${new Date(since).toLocaleTimeString()}.`] : []),
    ];
    keyed(reasons, why, (text) => text, (text) => h("li", {}, text), () => {});
    const trouble = troubleOf(recent);
    troubles.hidden = !trouble;
    say(troubles.firstElementChild, trouble);
  };
  show(null);
  return { element, show };
}

/** What went wrong of late beside tasks, in a sentence; empty if nothing did. */
function troubleOf(recent) {
  const { crashes = 0, fuses = 0, window_seconds: span } = recent ?? {};
  const found = [many(crashes, "crash of a worker", "crashes of workers"), many(fuses, "task stopped by a limit", "tasks stopped by a limit")];
  return recent && (crashes || fuses) ? `${found.filter(Boolean).join(" and ")} in the last ${whole(span)}.` : "";
}

const many = (count, one, more) => (count ? `${count.toLocaleString("en")} ${count === 1 ? one : more}` : "");

function unheard(names) {
  const rest = names.length > NAMED ? ` and ${names.length - NAMED} more` : "";
  return `Not heard of: ${names.slice(0, NAMED).join(", ")}${rest}; look at the machine, and its log.`;
}

function served({ workers, models_loaded: models }) {
  if (!workers) return "";
  return `${workers} ${workers === 1 ? "worker" : "workers"}${models.length ? `, with ${models.join(", ")} in memory` : ""}`;
}

/** Whether the page is live, and the age of what it shows. `told(connected)` as follow() does: as long as the stream lives,
 *  what it said last is how things are. */
export function freshness(signal) {
  const words = h("span", { role: "status" }, "connecting");
  const age = h("span", { class: "number" });
  const element = h("p", { class: "fresh faint" }, h("i", { class: "lamp", "aria-hidden": "true" }), words, age);
  let [heard, connected] = [null, null];
  const draw = () => {
    const old = heard === null ? 0 : Math.floor((Date.now() - heard) / 1000);
    element.className = `fresh ${connected === false ? "bad" : connected === null || old > LATE_S ? "warn" : "faint"}`;
    if (connected !== null) say(words, !connected ? "connection lost, trying again" : old > LATE_S ? "nothing heard" : "live");
    say(age, heard === null ? "" : old < 2 ? ", now" : `, ${whole(old)} old`);
  };
  const clock = setInterval(draw, 1000);
  signal.addEventListener("abort", () => clearInterval(clock));
  const told = (state) => {
    connected = state;
    if (connected) heard = Date.now();
    draw();
  };
  return { element, told, live: () => connected === true };
}
