// Which page is shown. A page is a module of pages/ with `title` and `show(main, account, signal, ...parts)`: it draws
// into `main`, and ends what it began when `signal` aborts, as another page comes.

import { get, key, Problem } from "./api.js";
import { h, notice } from "./dom.js";
import * as fleet from "./pages/fleet.js";
import * as operate from "./pages/operate.js";
import * as playground from "./pages/playground.js";
import * as signin from "./pages/signin.js";
import * as task from "./pages/task.js";
import * as tasks from "./pages/tasks.js";
import { themeButton } from "./theme.js";

const MENU = { fleet, tasks, playground, operate };
const FOR_ADMINS = ["fleet", "operate"];

const main = document.getElementById("main");
let account = null;
let leaving = new AbortController();

function pageOf(parts) {
  if (!account) return ["", signin, []];
  const name = MENU[parts[0]] && (account.admin || !FOR_ADMINS.includes(parts[0])) ? parts[0] : account.admin ? "fleet" : "tasks";
  return name === "tasks" && parts[1] ? [name, task, [parts[1]]] : [name, MENU[name], []];
}

async function route() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const [path] = location.hash.replace(/^#\/?/, "").split("?"); // behind it a page's own parameters, see address.js
  const parts = path.split("/").map(decodeURIComponent);
  const [name, page, rest] = pageOf(parts);
  drawBar(name);
  document.title = `${page.title} · zfleet`;
  main.replaceChildren();
  try {
    await page.show(main, account, signal, ...rest);
  } catch (error) {
    if (!signal.aborted) tell(error);
  }
}

function drawBar(current) {
  const names = account ? Object.keys(MENU).filter((name) => account.admin || !FOR_ADMINS.includes(name)) : [];
  const link = (name) => h("a", { href: `#/${name}`, "aria-current": name === current ? "page" : null }, MENU[name].title);
  document.getElementById("nav").replaceChildren(...names.map(link));
  const signOut = () => {
    key.forget();
    begin();
  };
  const who = account ? [h("span", {}, account.tenant), key.get() ? h("button", { type: "button", onclick: signOut }, "Sign out") : null] : [];
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

/** Find out who is reading, then show the page that the address names. */
export async function begin() {
  account = await get("api/me").catch((error) => {
    if (!(error instanceof Problem) || error.status !== 401) notice(error.message, "bad");
    return null;
  });
  await route();
}

window.addEventListener("hashchange", () => {
  main.focus({ preventScroll: true }); // not at the start, where the first thing to reach is the way past the menu
  route();
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
