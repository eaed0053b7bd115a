// Which page is shown. A page is a module of pages/ with `title` and `show(main, account, signal, ...parts)`: it draws
// into `main`, and ends what it began when `signal` aborts, as another page comes.

import { away, get, key, persist, Problem } from "./api.js";
import { h, notice, say } from "./dom.js";
import { sentence } from "./format.js";
import * as fleet from "./pages/fleet.js";
import * as operate from "./pages/operate.js";
import * as playground from "./pages/playground.js";
import * as signin from "./pages/signin.js";
import * as task from "./pages/task.js";
import * as tasks from "./pages/tasks.js";
import { themeButton } from "./theme.js";

const MENU = { fleet, tasks, playground, operate };
const BACK_MS = 2000;
const FOR_ADMINS = ["fleet", "operate"];

const main = document.getElementById("main");
let account = null;
let leaving = new AbortController();
let asking = null; // who is reading, while that is not known

function pageOf(parts) {
  if (!account) return ["", signin, []];
  const name = MENU[parts[0]] && (account.admin || !FOR_ADMINS.includes(parts[0])) ? parts[0] : account.admin ? "fleet" : "tasks";
  return parts[0] === "tasks" && parts[1] ? [name, task, [encodeURIComponent(parts[1])]] : [name, MENU[name], []];
}

async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path] = location.hash.replace(/^#\/?/, "").split("?"); // behind it a page's own parameters, see address.js
  const parts = path.split("/").map(decoded);
  const [name, page, rest] = pageOf(parts);
  drawBar(name);
  document.title = `${page.title} · zfleet`;
  main.replaceChildren();
  try {
    await page.show(main, account, signal, ...rest);
  } catch (error) {
    if (signal.aborted) return;
    if (away(error)) await comeBack(error, signal);
    else tell(error);
  }
}

/** Show the page anew once the gateway is back, which was away as it began. */
async function comeBack(error, signal) {
  leaving.abort();
  absent(error);
  await new Promise((resolve) => setTimeout(resolve, BACK_MS));
  if (leaving.signal === signal) await begin();
}

const absence = h("p", { class: "card bad", role: "status" });

function absent(error) {
  if (!absence.isConnected) main.replaceChildren(h("h1", {}, "One moment"), absence);
  say(absence, `${sentence(error.message)} This page goes on by itself once that is over.`);
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function drawBar(current) {
  const names = account ? Object.keys(MENU).filter((name) => account.admin || !FOR_ADMINS.includes(name)) : [];
  const link = (name) => h("a", { href: `#/${name}`, "aria-current": name === current ? "page" : null }, MENU[name].title);
  document.getElementById("nav").replaceChildren(...names.map(link));
  drawAccount();
}

/** Say in the bar who is reading. */
export function drawAccount() {
  const signOut = () => {
    key.forget();
    begin();
  };
  const who = account ? [h("span", { title: account.tenant }, `tenant ${account.tenant}`), key.get() ? h("button", { type: "button", onclick: signOut }, "Sign out") : null] : [];
  document.getElementById("account").replaceChildren(themeButton(), ...who.filter(Boolean));
}

function tell(error) {
  if (error instanceof Problem && error.status === 401) {
    key.forget();
    begin();
  } else {
    notice(error.message, "bad");
  }
}

/** Find out who is reading, as soon as the gateway tells, then show the page that the address names. */
export async function begin() {
  asking ??= persist(() => get("api/me"), { missed: absent });
  account = await asking.catch((error) => {
    if (!(error instanceof Problem) || error.status !== 401) notice(error.message, "bad");
    return null;
  });
  asking = null;
  await route();
}

window.addEventListener("hashchange", () => {
  main.focus({ preventScroll: true }); // not at the start, where the first thing to reach is the way past the menu
  if (!asking) route();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // "#main" is no page
  main.focus();
});
window.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  if (event.reason?.name !== "AbortError") tell(event.reason);
});
begin();
