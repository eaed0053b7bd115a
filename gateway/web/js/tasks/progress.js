// How far an open task is: a bar, the last preview, its place in line; told to a screen reader in a few words only.

import { h, say } from "../dom.js";
import { seconds } from "../format.js";
import { frame } from "./pictures.js";

const TOLD = 4; // times that a screen reader hears of a run's steps

/** Return {element, heard, lost, draw(task), told(connected)}. The element hides itself once the task has ended; `lost`
 *  says that nothing is heard of it meanwhile. */
export function progressOf() {
  const bar = h("progress", { "aria-label": "Progress" });
  const text = h("p", { class: "number progress-text" });
  const preview = h("img", { class: "preview", alt: "Preview of the picture", hidden: true });
  const heard = h("p", { class: "visually-hidden", role: "status" });
  const lost = h("p", { class: "bad", role: "status" });
  const canvas = h("div", { class: "canvas" }, preview);
  const element = h("div", { class: "progress", hidden: true }, canvas, bar, text);
  let said = "";

  function draw(task) {
    const { step, steps, preview: url } = task.progress;
    const open = task.status === "queued" || task.status === "running";
    element.hidden = !open;
    if (open) {
      if (task.status === "running") [bar.max, bar.value] = [steps, step];
      else bar.removeAttribute("value");
      say(text, task.status === "queued" ? waiting(task) : `Step ${step} of ${steps}${step < steps ? "" : ", finishing"}`);
      frame(canvas, task.request.width, task.request.height);
      if (url && preview.src !== url) preview.src = url;
      preview.hidden = !url;
    }
    tell(task.status === "running" ? `running, ${Math.floor((TOLD * step) / steps) * (100 / TOLD)}% done` : task.status);
  }

  function tell(words) {
    if (words === said) return;
    if (said || !["succeeded", "failed", "canceled", "expired"].includes(words)) heard.textContent = `The task is ${words}.`;
    said = words;
  }

  const told = (connected) => say(lost, connected ? "" : "Connection lost, trying again. What is shown may be old.");

  return { element, heard, lost, draw, told };
}

function waiting({ position, eta_seconds: eta }) {
  const place = position === null ? "Waiting" : position === 0 ? "Next in line" : `${position} before it in line`;
  return eta === null ? place : `${place} · done in about ${seconds(eta)}`;
}
