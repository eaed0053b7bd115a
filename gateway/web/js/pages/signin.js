// Where a fleet that wants an API key asks its reader for one.

import { begin } from "../app.js";
import { get, key, Problem } from "../api.js";
import { h } from "../dom.js";

export const title = "Sign in";

export function show(main) {
  const entry = h("input", { type: "password", name: "key", autocomplete: "off", required: true, placeholder: "zfk_…", size: 40 });
  const stay = h("input", { type: "checkbox", name: "stay" });
  const wrong = h("p", { class: "bad", role: "alert" });
  const enter = async (event) => {
    event.preventDefault();
    key.set(entry.value.trim(), stay.checked);
    try {
      await get("api/me");
    } catch (error) {
      key.forget();
      wrong.textContent = error instanceof Problem && error.status === 401 ? "This key opens nothing here." : error.message;
      return;
    }
    await begin();
  };
  main.append(
    h("h1", {}, title),
    h("form", { class: "card stack", onsubmit: enter },
      h("label", {}, h("span", {}, "API key"), entry),
      h("label", { class: "row" }, stay, "Stay signed in on this computer"),
      h("button", { class: "primary" }, "Sign in"),
      wrong,
      h("p", { class: "faint" }, "Keys are made on a machine of the fleet: zfleet keys create --tenant NAME")),
  );
  entry.focus();
}
