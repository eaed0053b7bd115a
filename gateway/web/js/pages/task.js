import { h } from "../dom.js";

export const title = "Task";

export function show(main) {
  main.append(h("h1", {}, title));
}
