// Whether the fleet is well, and why not: the verdict, the figures of now, trends, queues, and a card for each worker.

import { health } from "../api.js";
import { h } from "../dom.js";
import { queues, tiles } from "../fleet/figures.js";
import { trends } from "../fleet/trends.js";
import { freshness, verdict } from "../fleet/verdict.js";
import { workers } from "../fleet/workers.js";
import { watch } from "../live.js";

const TICK_MS = 2000;

export const title = "Fleet";

export async function show(main, account, signal) {
  const fresh = freshness(signal);
  const [said, now, waiting, cards, charts] = [verdict(), tiles(), queues(), workers(), trends(signal)];
  main.append(
    h("div", { class: "row spread" }, h("h1", {}, title), fresh.element),
    h("div", { class: "stack" }, said.element, now.element, charts.element, waiting.element, cards.element));
  let [last, came] = [null, 0];
  const on = (fleet) => {
    said.show(fleet.health, fleet.suspended);
    if (fleet.health.status === "unhealthy" && last) return; // what is told of workers and queues is from before
    [last, came] = [fleet, Date.now()];
    for (const part of [now, waiting, cards]) part.show(fleet);
  };
  const tell = async (connected) => {
    fresh.told(connected);
    if (!connected) said.show(await health(signal));
  };
  const clock = setInterval(() => {
    if (last && fresh.live() && Date.now() - came > TICK_MS) cards.show({ ...last, at: Date.parse(last.at) + Date.now() - came });
  }, TICK_MS);
  signal.addEventListener("abort", () => clearInterval(clock));
  await Promise.all([watch(on, tell, signal), charts.follow()]);
}
