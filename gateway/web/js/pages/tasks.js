// The tasks of a tenant, or for admins of everybody: newest first, narrowed by what stands in the address.

import { get } from "../api.js";
import { link, query, rename } from "../address.js";
import { h } from "../dom.js";
import { sentence } from "../format.js";
import { rowsOf } from "../tasks/rows.js";
import { thumbnails } from "../tasks/pictures.js";
import { isOpen, STATES } from "../tasks/states.js";

export const title = "Tasks";

const PAGE = 50;
const PAGE_MAX = 200; // of the gateway
const BUSY_MS = 2000; // between looks while a task that is shown is open
const CALM_MS = 5000;
const EVERYBODY = "*";
const FILTERS = ["status", "model", "tenant"];

export async function show(main, account, signal) {
  const list = listOf(account, signal);
  main.append(h("div", { class: "row heading" }, h("h1", {}, title), filters(account, list.begin, signal)), list.element);
  await list.begin();
}

/** Return {element, begin()}: the list for the address as it is, which goes on by itself until `signal` aborts. */
function listOf(account, signal) {
  const state = h("p", { role: "status", class: "faint" });
  const place = h("div");
  const more = h("button", { type: "button", hidden: true, onclick: () => further() }, "More");
  const thumbnail = thumbnails(signal);
  let rows, cursor, timer;
  let turn = 0; // raised with each beginning, so that answers to an earlier one are dropped

  const ask = (params) => {
    const tenant = account.admin ? { tenant: query().get("tenant") || EVERYBODY } : {};
    const given = FILTERS.filter((name) => name !== "tenant" && query().get(name)).map((name) => [name, query().get(name)]);
    return get(`api/tasks?${new URLSearchParams({ ...Object.fromEntries(given), ...tenant, ...params })}`, signal);
  };

  async function begin() {
    const mine = (turn += 1);
    clearTimeout(timer);
    state.textContent = rows ? state.textContent : "Loading…";
    let page;
    try {
      page = await ask({ limit: PAGE });
    } catch (error) {
      if (mine !== turn || signal.aborted) return;
      failed(error);
      throw error;
    }
    if (mine !== turn) return;
    rows = rowsOf({ thumbnail, everybody: account.admin });
    place.replaceChildren(rows.element);
    draw(page.tasks, page.next_cursor);
    timer = setTimeout(refresh, pause(), mine);
  }

  async function further() {
    const mine = turn;
    more.disabled = true;
    try {
      const page = await ask({ limit: PAGE, cursor });
      if (mine === turn) draw([...rows.tasks(), ...page.tasks], page.next_cursor);
    } finally {
      more.disabled = false;
    }
  }

  async function refresh(mine) {
    if (!document.hidden) {
      const shown = rows.tasks().length;
      const page = await ask({ limit: Math.min(PAGE_MAX, Math.max(PAGE, shown)) }).catch((error) => error);
      if (mine !== turn || signal.aborted) return;
      if (page.status === 401) throw page;
      if (page instanceof Error) {
        state.textContent = `${sentence(page.message)} What is shown may be old.`;
        rows.draw(rows.tasks()); // their ages go on
      } else draw(...behind(page));
    }
    timer = setTimeout(refresh, pause(), mine);
  }

  /** Return the newest tasks followed by those shown that are older than any of them, and where the next page begins. */
  function behind(page) {
    if (!page.next_cursor) return [page.tasks, null];
    if (!page.tasks.length) return [rows.tasks(), rows.tasks().length ? cursor : page.next_cursor];
    const [fresh, last] = [new Set(page.tasks.map(({ task_id: id }) => id)), page.tasks.at(-1).created_at];
    const older = rows.tasks().filter((task) => !fresh.has(task.task_id) && task.created_at < last);
    return [[...page.tasks, ...older], older.length ? cursor : page.next_cursor];
  }

  function draw(tasks, next) {
    rows.draw(tasks);
    cursor = next;
    more.hidden = !next;
    place.classList.toggle("card", tasks.length > 0);
    state.replaceChildren(...(tasks.length ? [] : next ? ["None of the newest tasks is like that. “More” looks further back."] : nothing()));
  }

  function failed(error) {
    place.replaceChildren();
    more.hidden = true;
    state.replaceChildren(`${sentence(error.message)} `, h("button", { type: "button", onclick: begin }, "Try again"));
    rows = undefined;
  }

  const pause = () => (rows.tasks().some(({ status }) => isOpen(status)) ? BUSY_MS : CALM_MS);
  signal.addEventListener("abort", () => clearTimeout(timer));
  return { element: h("div", { class: "stack" }, state, place, more), begin };
}

const nothing = () =>
  FILTERS.some((name) => query().get(name))
    ? ["No task is like that. ", h("a", { href: link("tasks") }, "Show all")]
    : ["No tasks yet. ", h("a", { href: link("playground") }, "Make the first one in the playground")];

function filters(account, begin, signal) {
  const choice = (name, label, all) => h("select", { name, "aria-label": label }, h("option", { value: "" }, all));
  const status = choice("status", "State", "All states");
  status.append(...STATES.map((state) => h("option", {}, state)));
  const model = choice("model", "Model", "All models");
  const tenants = h("datalist", { id: "tenants" });
  const tenant = account.admin && h("input", { name: "tenant", type: "search", "aria-label": "Tenant", placeholder: "All tenants", list: "tenants", size: 14 });
  const form = h("form", { class: "row filters", role: "search", "aria-label": "Filter" }, status, model, tenant, tenants);
  const apply = (event) => {
    event.preventDefault();
    rename("tasks", Object.fromEntries(new FormData(form)), true);
    begin();
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", apply);
  status.value = query().get("status") ?? "";
  if (tenant) tenant.value = query().get("tenant") ?? "";
  fill(model, tenant && tenants, signal);
  return form;
}

/** Name the models, and to admins the tenants that have a queue; what the address names is there in any case. */
async function fill(model, tenants, signal) {
  const chosen = query().get("model") ?? "";
  if (chosen) model.append(new Option(chosen, chosen, true, true));
  const { models } = await get("api/models", signal);
  model.append(...models.filter(({ name }) => name !== chosen).map(({ name }) => new Option(name)));
  if (!tenants) return;
  const { queues } = await get("api/queue", signal);
  tenants.append(...[...new Set(queues.map(({ tenant }) => tenant))].sort().map((name) => new Option(name)));
}
