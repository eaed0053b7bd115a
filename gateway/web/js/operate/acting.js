// A button that does something to the fleet, and the line that tells how it went.

import { h } from "../dom.js";

/** A line for outcomes: `done(text)`, `failed(error)`, `doing(text)`. It is read out, and stays until the next. */
export function outcome() {
  const element = h("p", { class: "outcome", role: "status" });
  const write = (tone, ...parts) => {
    element.className = `outcome ${tone}`;
    element.replaceChildren(...parts);
  };
  return {
    element,
    done: (...parts) => write("good", ...parts),
    doing: (...parts) => write("faint", ...parts),
    failed: (error) => write("bad", error.message),
  };
}

/** A button that runs `work` when pressed and cannot be pressed again meanwhile. It keeps the focus: a disabled one
 *  would lose it. What `work` throws is told by `line`. */
export function button(text, line, work, props = {}) {
  const element = h("button", { type: "button", ...props, onclick: () => act(element, line, work) }, text);
  return element;
}

/** Do `work` for a button or a form's one; returns whether it went well. */
export async function act(element, line, work) {
  if (element.getAttribute("aria-disabled") === "true") return false;
  element.setAttribute("aria-disabled", "true");
  try {
    await work();
    return true;
  } catch (error) {
    line.failed(error);
    return false;
  } finally {
    element.removeAttribute("aria-disabled");
  }
}
