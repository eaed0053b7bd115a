// Questions and forms in front of the page. The browser's own <dialog> keeps the focus within, closes at Escape, and
// gives the focus back to where it was.

import { h } from "./dom.js";

let count = 0;

/** Show a dialog and return its element, whose `close(value)` ends it. It is gone from the page once closed. */
export function open(title, ...children) {
  const id = `dialog-${++count}`;
  const dialog = h("dialog", { class: "card", "aria-labelledby": id }, h("h2", { id }, title), ...children);
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask before something is done. Resolves to true if the reader agrees, to false at "Cancel" or Escape.
 *  `details`: nodes or text between the question and its buttons. */
export function confirm({ title, text, action, danger = false, details = [] }) {
  return new Promise((resolve) => {
    const agree = h("button", { type: "button", class: danger ? "danger" : "primary", onclick: () => dialog.close("yes") }, action);
    const cancel = h("button", { type: "button", onclick: () => dialog.close("") }, "Cancel");
    const dialog = open(title, h("p", {}, text), ...details, h("div", { class: "row end" }, cancel, agree));
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"));
    (danger ? cancel : agree).focus();
  });
}
