// A card for each worker: its GPU, its models, what it makes at the moment. One that fell silent stays for a while and
// says so, as what is missing is what one looks for.

import { h, keyed, say } from "../dom.js";
import { mib, number, seconds, whole } from "../format.js";

const SILENT_S = 10; // workers tell of themselves every 3 s
const GONE_MS = 5 * 60_000;
export const TONES = { idle: "good", busy: "good", loading: "faint", draining: "warn", drained: "warn", lost: "bad", silent: "bad", ended: "faint" };
const FACTS = [
  ["Temperature", (card) => unit(card.gpu?.temperature_c, "°C")],
  ["Power", (card) => unit(card.gpu?.power_w, "W")],
  ["Images", (card) => card.images_done.toLocaleString("en")],
  ["Uptime", (card, at) => seconds(Math.max(0, age(card.started_at, at)))],
  ["Memory", (card) => mib(card.rss_mb)],
  ["Runs", (card) => `${card.runs.length} of ${card.capacity}`],
];

const unit = (value, name) => (value === null || value === undefined ? "–" : `${number(value)} ${name}`);
const age = (moment, at) => (new Date(at) - new Date(moment)) / 1000;
const slotOf = (name) => name.slice(0, name.lastIndexOf("."));

/** What a worker is, in a word: what it says, unless it is drained by hand or has not been heard of. */
export function stateOf(card, at) {
  if (card.gone) return card.state === "draining" ? "ended" : "silent";
  if (age(card.seen_at, at) > SILENT_S) return "silent";
  if (card.drained && card.state !== "lost") return card.runs.length || card.state === "draining" ? "draining" : "drained";
  if (["idle", "busy"].includes(card.state)) return card.runs.length ? "busy" : "idle"; // its own word is as old as its last beat
  return card.state;
}

/** The cards: `show(fleet)`, which returns the names of those that are not heard of. */
export function workers() {
  const count = h("span", { class: "faint" });
  const cards = h("ul", { class: "workers" });
  const none = h("p", { class: "card faint", hidden: true }, "No worker is there. On a machine with a GPU: ", h("code", {}, "zfleet worker --devices all"));
  const element = h("section", { "aria-labelledby": "workers" }, h("h2", { id: "workers" }, "Workers ", count), cards, none);
  const known = new Map(); // by name: the last card of each, and when it was gone
  const show = (fleet) => {
    const found = remembered(known, fleet);
    none.hidden = found.length > 0;
    say(count, summary(fleet));
    keyed(cards, found, (card) => card.name, make, (child, card) => write(child, card, fleet.at));
    return found.filter((card) => stateOf(card, fleet.at) === "silent").map((card) => card.name);
  };
  return { element, show };
}

/** Return the fleet's cards, and those of workers that were there a while ago and have no follower on their GPU. */
function remembered(known, fleet) {
  const now = Date.now();
  const there = new Set(fleet.workers.map((card) => card.name));
  const slots = new Set(fleet.workers.map((card) => slotOf(card.name)));
  for (const [name, card] of known) {
    if (there.has(name)) continue;
    card.gone ??= now;
    if (slots.has(slotOf(name)) || now - card.gone > GONE_MS) known.delete(name);
  }
  for (const card of fleet.workers) known.set(card.name, { ...card });
  return [...known.values()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
}

function summary({ workers: cards, at }) {
  const states = cards.map((card) => stateOf(card, at));
  return Object.keys(TONES).map((state) => [states.filter((each) => each === state).length, state])
    .filter(([many]) => many).map(([many, state]) => `${many} ${state}`).join(", ");
}

function make(card) {
  const meter = (name, text) => h("div", { class: "gauge", hidden: true, dataset: { part: text } },
    h("span", { class: "faint" }, name), h("span", { class: "number", dataset: { part: `${text}-text` } }), h("meter", { min: 0, max: 100, "aria-label": name }));
  return h("li", { class: "card worker" },
    h("header", {}, h("h3", {}, card.name), h("span", { class: "tag", dataset: { part: "state" } })),
    h("p", { class: "faint", dataset: { part: "device" } }),
    h("p", { class: "bad", dataset: { part: "silence" }, hidden: true }),
    h("div", { class: "gauges" }, meter("Utilisation", "use"), meter("GPU memory", "memory")),
    h("dl", { class: "facts" }, FACTS.map(([name]) => h("div", {}, h("dt", {}, name), h("dd", { class: "number" })))),
    h("ul", { class: "chips", "aria-label": "Models", dataset: { part: "models" } }),
    h("ul", { class: "runs", "aria-label": "Runs", dataset: { part: "runs" } }));
}

function write(child, card, at) {
  const part = (name) => child.querySelector(`[data-part="${name}"]`);
  const state = stateOf(card, at);
  child.className = `card worker ${TONES[state]}`;
  part("state").className = `tag ${TONES[state]}`;
  say(part("state"), state);
  say(part("device"), [card.gpu?.name ?? card.device, card.host].join(" · "));
  const unheard = card.gone ? (Date.now() - card.gone) / 1000 + SILENT_S : age(card.seen_at, at);
  part("silence").hidden = state !== "silent";
  say(part("silence"), state === "silent" ? `Not heard of for ${whole(unheard)}` : "");
  gauge(part("use"), card.gpu?.utilisation_percent, 100, unit(card.gpu?.utilisation_percent, "%"));
  const { memory_used_mb: used, memory_total_mb: total } = card.gpu ?? {};
  gauge(part("memory"), used, total, `${mib(used)} of ${mib(total)}`);
  const facts = child.querySelectorAll(".facts dd");
  FACTS.forEach(([, of], index) => say(facts[index], of(card, at)));
  keyed(part("models"), card.models, (name) => name, (name) => h("li", { class: "chip" }, name), (chip, name) => {
    const loaded = card.models_loaded.includes(name);
    chip.className = loaded ? "chip loaded" : "chip";
    chip.title = loaded ? `${name} is in memory` : `${name} is loaded on first use`;
  });
  keyed(part("runs"), card.gone ? [] : card.runs, (run) => run.task_id, makeRun, writeRun);
}

function gauge(element, value, most, text) {
  element.hidden = value === null || value === undefined || !most;
  if (element.hidden) return;
  const meter = element.querySelector("meter");
  meter.value = (100 * value) / most;
  say(element.querySelector(".number"), text);
}

const makeRun = (run) => h("li", {},
  h("a", { href: `#/tasks/${run.task_id}`, class: "number" }, run.task_id.slice(0, 8)),
  h("span", { class: "faint" }, ` ${run.model} · ${run.tenant}`), h("span", { class: "number step" }),
  h("progress", { "aria-label": `Task ${run.task_id.slice(0, 8)}` }));

function writeRun(child, { step, steps }) {
  say(child.querySelector(".step"), steps ? `${step} / ${steps}` : "begins");
  const bar = child.querySelector("progress");
  bar.max = steps || 1;
  bar.value = step ?? 0;
}
