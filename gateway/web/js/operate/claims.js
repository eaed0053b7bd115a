// Pausing the fleet, and letting it go on: RQ's own suspend, so that `rq suspend` shows here and the other way round.

import { post } from "../api.js";
import { h, say } from "../dom.js";
import { button, outcome } from "./acting.js";

/** `show(fleet)`. */
export function claims() {
  const line = outcome();
  const state = h("strong", {}, "…");
  const about = h("span", { class: "faint" });
  const draw = (suspended) => {
    say(state, suspended ? "Paused" : "Running");
    state.className = suspended ? "warn" : "good";
    say(about, suspended ? "Tasks are accepted and wait; what runs is finished." : "Workers take tasks as they come.");
    [pause.hidden, resume.hidden] = [suspended, !suspended];
  };
  const order = (name, other, told) => async () => {
    const focused = document.activeElement;
    draw((await post(`api/fleet/${name}`)).suspended);
    line.done(told);
    if (focused?.hidden) other().focus(); // the button that was pressed has made room for its opposite
  };
  const pause = button("Pause the fleet", line, order("pause", () => resume, "The fleet is paused: no task is begun until it is resumed."));
  const resume = button("Resume the fleet", line, order("resume", () => pause, "The fleet goes on."), { class: "primary", hidden: true });
  const element = h("section", { class: "card", "aria-labelledby": "claims" }, h("h2", { id: "claims" }, "Fleet"),
    h("div", { class: "row spread" }, h("p", { class: "flat" }, state, " ", about), h("div", { class: "row" }, pause, resume)), line.element);
  return { element, show: (fleet) => draw(fleet.suspended) };
}
