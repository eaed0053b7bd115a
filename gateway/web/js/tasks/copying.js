// Text for the clipboard; where a browser allows no page to write there (plain HTTP to another host), text to take by hand.

import { open } from "../dialog.js";
import { h, notice } from "../dom.js";
import { asCurl, asPython } from "./snippets.js";

/** Return the buttons that copy a request; `request()` gives it when one is pressed, or null where there is none to copy. */
export function copyButtons(request) {
  const button = (what, write) => h("button", { type: "button", onclick: () => copied(what, write, request()) }, `Copy as ${what}`);
  return [button("curl", asCurl), button("Python", asPython)];
}

async function copied(what, write, request) {
  if (request === null) return;
  const text = write(request);
  try {
    await navigator.clipboard.writeText(text);
    notice(`Copied as ${what}.`);
  } catch {
    byHand(what, text);
  }
}

function byHand(what, text) {
  const area = h("textarea", { class: "code", readOnly: true, rows: 12, value: text, "aria-label": `The request as ${what}` });
  const close = h("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const dialog = open(`Copy as ${what}`, area, h("div", { class: "row end" }, close));
  area.select();
}
