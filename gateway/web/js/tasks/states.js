// The states of a task, as they are shown and as what they allow.

import { h } from "../dom.js";

export const STATES = ["queued", "running", "succeeded", "failed", "canceled", "expired"];

const OPEN = ["queued", "running"];
const KIND = { succeeded: "good", failed: "bad", expired: "warn", running: "accent" };

export const isOpen = (status) => OPEN.includes(status);

/** Whether POST /api/tasks/<id>/retry takes a task in this state. */
export const mayRetry = (status) => !isOpen(status) && status !== "succeeded";

export const stateTag = (status) => h("span", { class: `tag state ${KIND[status] ?? "faint"}` }, status);

/** Return an attempt's outcome in words. */
export const outcomeWord = (outcome) => (outcome === "released" ? "given back" : outcome);

/** Return how an attempt's or a delivery's outcome is coloured. */
export const outcomeKind = (outcome) =>
  ["succeeded", "delivered"].includes(outcome) ? "good"
    : ["failed", "crashed", "lost"].includes(outcome) ? "bad"
      : outcome === "running" ? "accent" : "faint";
