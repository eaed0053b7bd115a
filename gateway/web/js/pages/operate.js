// What operators do to the fleet: pause it, drain or restart a worker, see to failed tasks, give out keys.

import { h } from "../dom.js";
import { freshness, verdict } from "../fleet/verdict.js";
import { watch } from "../live.js";
import { claims } from "../operate/claims.js";
import { failed } from "../operate/failed.js";
import { keys } from "../operate/keys.js";
import { workers } from "../operate/workers.js";

export const title = "Operate";

export async function show(main, account, signal) {
  const fresh = freshness(signal);
  const said = verdict();
  const [pausing, machines, failures, ring] = [claims(), workers(), failed(signal), keys(account, signal)];
  main.append(
    h("div", { class: "row spread" }, h("h1", {}, title), fresh.element),
    h("div", { class: "stack" }, said.element, pausing.element, machines.element, failures.element, ring.element));
  said.element.hidden = true;
  let since = null;
  const on = (fleet) => {
    const away = fleet.health.status === "unhealthy"; // then what is told of pauses and workers is from before
    said.show(fleet.health, { suspended: fleet.suspended, since: away ? since : null });
    said.element.hidden = !away;
    for (const { element } of [pausing, machines]) element.classList.toggle("old", away);
    if (away) return;
    since = fleet.at;
    pausing.show(fleet);
    machines.show(fleet);
  };
  await Promise.all([watch(on, fresh.told, signal), failures.fill(), ring.follow()]);
}
