// A form's fields: a label, a control, and what is wrong with it, which a screen reader reads along.

import { h } from "../dom.js";

/** Return {name, element, control, tell(message)}. */
export function field(name, label, control, hint = "") {
  const error = h("span", { class: "bad field-error", id: `${name}-error` });
  Object.assign(control, { id: name, name });
  control.setAttribute("aria-describedby", `${hint ? `${name}-hint ` : ""}${name}-error`);
  const element = h("div", { class: "field" },
    h("label", { htmlFor: name }, h("span", {}, label)), control, hint && h("span", { class: "faint hint", id: `${name}-hint` }, hint), error);
  const tell = (message) => {
    error.textContent = message;
    if (message) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  return { name, element, control, tell };
}

export const area = (rows, props = {}) => h("textarea", { rows, spellcheck: false, dir: "auto", ...props });

export const entry = (props = {}) => h("input", { type: "number", inputMode: "numeric", step: 1, autocomplete: "off", ...props });

/** Return a <select> of [value, text] pairs. */
export const choice = (pairs) => h("select", {}, pairs.map(([value, text]) => h("option", { value }, text)));

/** Return what a number's field holds: undefined for nothing, NaN for what is no number. */
export function numberOf(control) {
  if (control.validity.badInput) return NaN;
  return control.value === "" ? undefined : Number(control.value);
}
