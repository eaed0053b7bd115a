// API keys: the list as it is by now, making one, rotating, revoking.

import { get, key as own, post } from "../api.js";
import { drawAccount } from "../app.js";
import { confirm } from "../dialog.js";
import { h, keyed, say } from "../dom.js";
import { moment, number } from "../format.js";
import { repeat } from "../live.js";
import { button, outcome } from "./acting.js";
import { askForKey, askForGrace, showKey } from "./keydialogs.js";

const LOOK_S = 5; // between looks: others make keys, and keys end
const TONES = { active: "good", retiring: "warn", revoked: "faint", expired: "faint" };
const COLUMNS = ["Key", "Tenant", "State", "Scope", "Priority", "Rate", "Queued", "Running", "Share", "Made", "Ends"];
const CELLS = [
  (key) => key.key_id,
  (key) => key.tenant,
  (key) => key.state,
  (key) => (key.admin ? "admin" : "tenant"),
  (key) => `to ${key.priority_max}`,
  (key) => key.rate ?? "–",
  (key) => number(key.max_queued),
  (key) => number(key.max_running),
  (key) => number(key.share ?? 1, 2).replace(/\.?0+$/, ""),
  (key) => moment(key.created_at),
  (key) => moment(key.revoked_at ?? key.expires_at),
];

/** The table of keys and what is done with them; `follow()` reads it now and from time to time until `signal` aborts. */
export function keys(account, signal) {
  const line = outcome();
  const old = h("p", { class: "bad flat", role: "status" });
  const rows = h("tbody");
  const none = h("p", { class: "faint flat", hidden: true },
    "No key was ever made: whoever is on the gateway's machine is served, and nobody else. With the first key, nobody is served without one.");
  const table = h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Keys" },
    h("table", { class: "keys" }, h("thead", {}, h("tr", {}, [...COLUMNS, ""].map((name) => h("th", { scope: "col", class: name ? null : "kept" }, name)))), rows));
  let turn = 0; // raised with each look, so that the answer to an earlier one is dropped
  const load = async () => {
    const mine = (turn += 1);
    const { keys: found } = await get("api/keys", signal);
    if (mine !== turn) return;
    [none.hidden, table.hidden] = [found.length > 0, !found.length];
    keyed(rows, found, (key) => key.key_id, (key) => row(key, account, line, refresh), write);
    say(old, "");
  };
  const refresh = () => load().catch((error) => {
    if (error.status === 401) throw error;
    if (!signal.aborted) say(old, `${error.message} What is shown may be old.`);
  });
  const look = async () => {
    if (!turn) await load();
    else if (!document.querySelector("dialog")) await refresh(); // what a question is about stays as it is
  };
  const create = async () => {
    const made = await askForKey(!account.key_id);
    if (!made) return;
    if (!account.key_id && made.admin) become(account, made); // from now on this page needs one, too
    await showKey(made);
    line.done(`The key ${made.key_id} of ${made.tenant} is made.`);
    await refresh();
  };
  const element = h("section", { class: "card", "aria-labelledby": "keys" },
    h("div", { class: "row spread" }, h("h2", { id: "keys" }, "API keys"), button("New key …", line, create, { class: "primary" })),
    none, table, old, line.element);
  return { element, follow: () => repeat(look, () => LOOK_S, signal) };
}

/** Go on with this key. */
function become(account, made) {
  own.replace(made.key);
  Object.assign(account, { key_id: made.key_id, tenant: made.tenant });
  drawAccount();
}

function row(key, account, line, refresh) {
  const mine = () => key.key_id === account.key_id;
  const rotate = async () => {
    const made = await askForGrace(key);
    if (!made) return;
    if (mine()) become(account, made);
    await showKey(made);
    line.done(`The key ${key.key_id} is replaced by ${made.key_id}.`);
    await refresh();
  };
  const revoke = async () => {
    const text = `It opens nothing any more, within two seconds; what was submitted with it goes on. This cannot be undone.${mine() ? " It is the key that you are signed in with." : ""}`;
    if (!(await confirm({ title: `Revoke ${key.key_id} of ${key.tenant}?`, text, action: "Revoke", danger: true }))) return;
    await post(`api/keys/${key.key_id}/revoke`);
    line.done(`The key ${key.key_id} is revoked.`);
    await refresh();
  };
  const labelled = (verb, work, props) => button(`${verb} …`, line, work, { ...props, "aria-label": `${verb} ${key.key_id}` });
  return h("tr", {}, CELLS.map((_, index) => (index ? h("td", { class: "number" }) : h("th", { scope: "row", class: "number" }))),
    h("td", { class: "kept" }, h("div", { class: "row tight" }, labelled("Rotate", rotate), labelled("Revoke", revoke, { class: "danger" }))));
}

function write(element, key) {
  CELLS.forEach((of, index) => say(element.children[index], of(key)));
  element.children[1].title = key.tenant;
  element.children[2].className = TONES[key.state];
  element.className = key.state === "active" || key.state === "retiring" ? "" : "faint";
  const [rotate, revoke] = element.querySelectorAll("button");
  const focused = document.activeElement;
  rotate.hidden = key.state !== "active";
  revoke.hidden = key.state !== "active" && key.state !== "retiring";
  if (focused?.hidden && element.contains(focused)) (revoke.hidden ? element.closest("[role=region]") : revoke).focus();
}
