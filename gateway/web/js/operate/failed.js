// Tasks that failed or expired: to be done over as new tasks, or to be forgotten. In batches, as there may be very many.

import { link } from "../address.js";
import { get, post } from "../api.js";
import { open } from "../dialog.js";
import { h } from "../dom.js";
import { act, button, outcome } from "./acting.js";

const PAGE = 200;
const COUNTED = 1000; // what is counted before it is asked; more is "more than"
const BATCH = 100;

const OVER = ["failed", "expired"];

const tasks = (many, more = false) => `${more ? "more than " : ""}${many.toLocaleString("en")} ${many === 1 ? "task" : "tasks"}`;

/** The form: which failed tasks, and what becomes of them. */
export function failed(signal) {
  const line = outcome();
  const model = h("select", { name: "model" }, h("option", { value: "" }, "all models"));
  const tenant = h("input", { name: "tenant", placeholder: "all tenants", autocomplete: "off", size: 14 });
  const chosen = () => ({ ...(model.value && { model: model.value }), ...(tenant.value.trim() && { tenant: tenant.value.trim() }) });
  const start = (work) => async () => {
    line.doing("Counting …");
    const which = chosen();
    const found = await count(which, signal);
    if (found.many) await ask(work, which, found, line);
    else line.done("There are none.");
  };
  const element = h("section", { class: "card", "aria-labelledby": "failed" },
    h("h2", { id: "failed" }, "Failed tasks"), h("p", { class: "faint flat" }, "Those that expired are among them. ", h("a", { href: link("tasks", { status: "failed" }) }, "Show")),
    h("div", { class: "row bottom" },
      h("label", {}, h("span", {}, "Model"), model), h("label", {}, h("span", {}, "Tenant"), tenant),
      button("Requeue …", line, start(REQUEUE)), button("Purge …", line, start(PURGE), { class: "danger" })), line.element);
  const fill = async () => {
    const { models } = await get("api/models", signal);
    model.append(...models.map(({ name }) => h("option", {}, name)));
  };
  return { element, fill };
}

const REQUEUE = {
  name: "requeue", verb: "Requeue", style: "primary", past: "requeued",
  text: "Each is done over as a new task of its tenant, unless it has been already. The failed ones stay as they are.",
  done: (answer) => answer.requeued.length,
};
const PURGE = {
  name: "purge", verb: "Purge", style: "danger", past: "purged",
  text: "They are forgotten with their requests and pictures: whoever asks for one is told that it is unknown. This cannot be undone.",
  done: (answer) => answer.purged,
};

/** Count the tasks that failed or expired, up to COUNTED: {many, more}. */
async function count({ model, tenant }, signal) {
  let many = 0;
  for (const status of OVER) {
    const query = new URLSearchParams({ status, limit: PAGE, tenant: tenant ?? "*", ...(model && { model }) });
    do {
      const page = await get(`api/tasks?${query}`, signal);
      many += page.tasks.length;
      query.set("cursor", page.next_cursor ?? "");
      if (many >= COUNTED) return { many, more: Boolean(page.next_cursor) || status !== OVER.at(-1) };
    } while (query.get("cursor"));
  }
  return { many, more: false };
}

/** Say how many it is, and on agreement work through them; resolves when the dialog is closed. */
function ask(work, which, { many, more }, line) {
  return new Promise((resolve) => {
    let going = true;
    let done = 0;
    const refused = new Map(); // by task
    const bar = h("progress", { max: many, value: 0, hidden: true, "aria-label": "Done" });
    const told = h("p", { role: "status" }, work.text);
    const agree = h("button", { type: "button", class: work.style }, work.verb);
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    const dialog = open(`${work.verb} ${tasks(many, more)}${named(which)}?`, told, bar, h("div", { class: "row end" }, cancel, agree));
    const run = async () => {
      [bar.hidden, agree.hidden, cancel.textContent] = [false, true, "Stop"];
      cancel.focus();
      for (let [left, cursor] = [true, null]; left && going;) {
        const answer = await post(`api/failed/${work.name}`, { ...which, limit: BATCH, ...(cursor && { cursor }) });
        cursor = answer.next_cursor;
        done += work.done(answer);
        for (const { task_id: id, detail } of answer.refused ?? []) refused.set(id, detail);
        left = answer.more;
        [bar.max, bar.value] = [Math.max(many, done), done];
        told.textContent = `${done.toLocaleString("en")} ${work.past}`;
      }
    };
    agree.addEventListener("click", async () => {
      if (await act(agree, line, run)) line.done(result(work, done, going, refused));
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      going = false;
      if (bar.hidden) line.doing("Nothing was changed.");
      resolve();
    });
    cancel.focus();
  });
}

function result(work, done, whole, refused) {
  const left = refused.size ? ` ${tasks(refused.size)} cannot be: ${[...new Set(refused.values())].join("; ")}.` : "";
  return `${tasks(done)} ${work.past}${whole ? "" : ", then stopped"}.${left}`;
}

const named = ({ model, tenant }) => (model ? ` of ${model}` : "") + (tenant ? ` of the tenant ${tenant}` : "");
