// The dialogs about API keys: what a new one may, for how long an old one still works, and a new one, shown once.

import { post } from "../api.js";
import { open } from "../dialog.js";
import { h } from "../dom.js";
import { act, outcome } from "./acting.js";

const DAY_S = 86_400;
const LASTS = [["", "never"], [7 * DAY_S, "in 7 days"], [30 * DAY_S, "in 30 days"], [90 * DAY_S, "in 90 days"], [365 * DAY_S, "in a year"]];
const GRACES = [[0, "not at all"], [3600, "for an hour"], [DAY_S, "for a day"], [7 * DAY_S, "for a week"]];

const options = (pairs) => pairs.map(([value, text]) => h("option", { value: String(value) }, text));
const labelled = (text, entry, hint) => h("label", {}, h("span", {}, text), entry, hint ? h("small", { class: "faint" }, hint) : null);

/** A form in a dialog that posts what `read(form)` returns; resolves to the answer, or null if it was left. */
function form(title, path, fields, action, read) {
  return new Promise((resolve) => {
    const line = outcome();
    const submit = h("button", { class: "primary" }, action);
    let made = null;
    const send = async (event) => {
      event.preventDefault();
      const well = await act(submit, line, async () => {
        made = await post(path, read(event.target.elements));
      });
      if (well) dialog.close();
    };
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    const dialog = open(title, h("form", { class: "stack", onsubmit: send }, fields, line.element, h("div", { class: "row end" }, cancel, submit)));
    dialog.addEventListener("close", () => resolve(made));
  });
}

/** Ask what a new key may, and make it; returns the gateway's answer or null. `first`: the fleet has none yet. */
export function askForKey(first) {
  const entry = (name, props) => h("input", { name, autocomplete: "off", ...props });
  const fields = [
    first ? h("p", { class: "warn" }, "With the first key, nobody is served without one any more. Let it be an admin's; this page goes on with it.") : null,
    labelled("Tenant", entry("tenant", { required: true, pattern: "[a-z0-9][a-z0-9\\-]{0,31}", title: "1 to 32 of a–z, 0–9 and -, with no - in front", autofocus: true }), "a team or a product"),
    h("label", { class: "row" }, h("input", { type: "checkbox", name: "admin", checked: first }), "Admin: sees and steers the whole fleet"),
    h("div", { class: "fields" },
      labelled("Highest priority", h("select", { name: "priority_max" }, options([["high", "high"], ["normal", "normal"], ["low", "low"]]))),
      labelled("Ends", h("select", { name: "lasts" }, options(LASTS))),
      labelled("Rate", entry("rate", { pattern: "[1-9][0-9]{0,5}/[smhd]", placeholder: "no limit", title: "as 10/s; or so many each m, h or d" }), "submits, as 10/s"),
      labelled("Share", entry("share", { type: "number", min: 0.01, max: 100, step: "any", placeholder: "as it is" }), "of the GPUs, against others' 1"),
      labelled("Most queued", entry("max_queued", { type: "number", min: 1, placeholder: "no limit" })),
      labelled("Most running", entry("max_running", { type: "number", min: 1, placeholder: "no limit" }))),
  ].filter(Boolean);
  return form("New API key", "api/keys", fields, "Make the key", readKey);
}

function readKey({ tenant, admin, priority_max: priority, lasts, rate, share, max_queued: queued, max_running: running }) {
  const given = { tenant: tenant.value.trim(), admin: admin.checked, priority_max: priority.value };
  if (lasts.value) given.expires_at = new Date(Date.now() + Number(lasts.value) * 1000).toISOString();
  if (rate.value.trim()) given.rate = rate.value.trim();
  for (const [name, entry] of Object.entries({ share, max_queued: queued, max_running: running })) {
    if (entry.value) given[name] = Number(entry.value);
  }
  return given;
}

/** Ask how long the old key still works, and replace it; returns the gateway's answer or null. */
export function askForGrace(key) {
  const fields = [
    h("p", {}, `A new key with the same limits takes the place of ${key.key_id} of ${key.tenant}.`),
    labelled("The old one still works", h("select", { name: "grace_s", autofocus: true }, options(GRACES))),
  ];
  return form("Rotate a key", `api/keys/${key.key_id}/rotate`, fields, "Make the new key", (entries) => ({ grace_s: Number(entries.grace_s.value) }));
}

/** Show a new key, this once; resolves when the dialog is closed. */
export function showKey(made) {
  return new Promise((resolve) => {
    const shown = h("input", { readOnly: true, value: made.key, "aria-label": "The new key", class: "secret", onfocus: () => shown.select() });
    const told = h("p", { class: "good flat", role: "status" });
    const copy = async () => {
      shown.select();
      const copied = navigator.clipboard ? await navigator.clipboard.writeText(made.key).then(() => true, () => false) : document.execCommand("copy");
      told.textContent = copied ? "Copied." : "Press Ctrl+C to copy.";
    };
    const dialog = open(`The new key of ${made.tenant}`,
      h("p", { class: "warn" }, "This is the only time that it is shown: keep it where secrets are kept. The fleet stores its hash alone."),
      shown, told,
      h("div", { class: "row end" }, h("button", { type: "button", onclick: copy }, "Copy"),
        h("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "I have kept it")));
    dialog.addEventListener("close", () => {
      shown.value = "";
      resolve();
    });
    shown.focus();
  });
}
