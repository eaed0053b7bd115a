// Draining a worker, letting it work again, and having it started anew.

import { post } from "../api.js";
import { confirm } from "../dialog.js";
import { h, keyed, say } from "../dom.js";
import { stateOf, TONES } from "../fleet/workers.js";
import { button, outcome } from "./acting.js";

const tasks = (many) => (many === 1 ? "1 task" : `${many} tasks`);

/** `show(fleet)`: a row a worker, and one a drained slot where none is. */
export function workers() {
  const line = outcome();
  const rows = h("ul", { class: "rows" });
  const none = h("p", { class: "faint flat" }, "No worker is there.");
  const element = h("section", { class: "card", "aria-labelledby": "workers" }, h("h2", { id: "workers" }, "Workers"), rows, none, line.element);
  const cards = new Map();
  const show = (fleet) => {
    const all = [...fleet.workers, ...(fleet.drained_away ?? []).map((name) => ({ name, away: true, drained: true, runs: [] }))];
    none.hidden = all.length > 0;
    for (const card of all) cards.set(card.name, card);
    keyed(rows, all, (card) => card.name, (card) => row(card.name, cards, line), (child, card) => write(child, card, fleet.at));
  };
  return { element, show };
}

function row(name, cards, line) {
  const order = (verb, told) => async () => {
    const worker = await post(`api/workers/${encodeURIComponent(name)}/${verb}`);
    line.done(told(worker));
  };
  const has = (worker) => (worker.runs.length ? ` finishes the ${tasks(worker.runs.length)} it has and` : "");
  const restart = order("restart", (worker) => `${worker.name}${has(worker)} is started anew.`);
  const ask = async () => {
    const text = `It finishes the ${tasks(cards.get(name).runs.length)} it has, ends, and is started anew. Its models are loaded again, which takes a while.`;
    if (await confirm({ title: `Restart ${name}?`, text, action: "Restart" })) await restart();
  };
  const labelled = (verb, work, part) => button(verb, line, work, { "aria-label": `${verb} ${name}`, dataset: { part } });
  return h("li", {},
    h("div", {}, h("b", {}, name), " ", h("span", { class: "tag", dataset: { part: "state" } }), h("p", { class: "faint flat small", dataset: { part: "about" } })),
    h("div", { class: "row" },
      labelled("Drain", order("drain", (worker) => `${worker.name}${has(worker)} claims nothing more until it is resumed.`), "drain"),
      labelled("Resume", order("resume", (worker) => `${worker.name} takes tasks again.`), "resume"),
      labelled("Restart", ask, "restart")));
}

function write(child, card, at) {
  const part = (name) => child.querySelector(`[data-part="${name}"]`);
  const state = card.away ? "drained" : stateOf(card, at);
  part("state").className = `tag ${TONES[state]}`;
  say(part("state"), state);
  say(part("about"), card.away ? "No worker is there; one that comes takes no task until this is resumed." : doing(card));
  const focused = document.activeElement;
  part("drain").hidden = card.drained;
  part("resume").hidden = !card.drained;
  part("restart").hidden = Boolean(card.away);
  for (const name of ["drain", "restart"]) part(name).disabled = card.state === "lost";
  if (focused?.hidden && child.contains(focused)) part(card.drained ? "resume" : "drain").focus();
}

const doing = (card) => `${card.gpu?.name ?? card.device}, ${card.runs.length ? `makes ${tasks(card.runs.length)}` : "makes nothing now"}`;
