// Whether the fleet is well, and why not: the verdict, the figures of now, trends, queues, and a card for each worker.

import { health } from "../api.js";
import { h } from "../dom.js";
import { queues, tiles } from "../fleet/figures.js";
import { trends } from "../fleet/trends.js";
import { freshness, verdict } from "../fleet/verdict.js";
import { workers } from "../fleet/workers.js";
import { watch } from "../live.js";

const TICK_MS = 2000;
const NARROW = "(max-width: 40rem)"; // where charts would stand one below the other, before the workers

export const title = "Fleet";

export async function show(main, account, signal) {
  const fresh = freshness(signal);
  const [said, now, waiting, cards, charts] = [verdict(), tiles(), queues(), workers(), trends(signal)];
  const below = [waiting.element, cards.element];
  main.append(
    h("div", { class: "row spread" }, h("h1", {}, title), fresh.element),
    h("div", { class: "stack" }, said.element, now.element, ...(matchMedia(NARROW).matches ? [...below, charts.element] : [charts.element, ...below])));
  let [last, came, silent, away] = [null, 0, [], false];
  const parts = [now, waiting, cards];
  const draw = (fleet) => {
    for (const part of [now, waiting]) part.show(fleet);
    silent = cards.show(fleet);
  };
  /** Say how it is; without Redis or a gateway what is shown of queues and workers is from before, and they are not to blame. */
  const judge = (health, suspended) => {
    const gone = health.status === "unhealthy";
    if (gone && !away && last) draw(last); // takes back what was guessed while nothing came
    away = gone;
    said.show(health, { suspended, silent: away ? [] : silent, since: away ? last?.at : null, recent: last?.recent });
    for (const { element } of parts) element.classList.toggle("old", away);
  };
  const on = (fleet) => {
    if (fleet.health.status !== "unhealthy") {
      [last, came] = [fleet, Date.now()];
      draw(fleet);
    }
    judge(fleet.health, fleet.suspended);
  };
  const tell = async (connected) => {
    fresh.told(connected);
    if (!connected) judge(await health(signal), last?.suspended);
  };
  const clock = setInterval(() => {
    if (!last || away || !fresh.live() || Date.now() - came <= TICK_MS) return;
    silent = cards.show({ ...last, at: Date.parse(last.at) + Date.now() - came });
    judge(last.health, last.suspended);
  }, TICK_MS);
  signal.addEventListener("abort", () => clearInterval(clock));
  await Promise.all([watch(on, tell, signal), charts.follow()]);
}
