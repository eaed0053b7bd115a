// Failed tasks: to be done over as new tasks, or to be forgotten. In batches, as there may be very many.

import { get, post } from "../api.js";
import { open } from "../dialog.js";
import { h } from "../dom.js";
import { act, button, outcome } from "./acting.js";

const PAGE = 200;
const COUNTED = 1000; // what is counted before it is asked; more is "more than"
const BATCH = 100;

const tasks = (many) => (many === 1 ? "1 failed task" : `${many.toLocaleString("en")} failed tasks`);

/** The form: which failed tasks, and what becomes of them. */
export function failed(signal) {
  const line = outcome();
  const model = h("select", { name: "model" }, h("option", { value: "" }, "all models"));
  const tenant = h("input", { name: "tenant", placeholder: "all tenants", autocomplete: "off", spellcheck: false, size: 14 });
  const chosen = () => ({ ...(model.value && { model: model.value }), ...(tenant.value.trim() && { tenant: tenant.value.trim() }) });
  const start = (work) => async () => {
    line.doing("Counting …");
    const which = chosen();
    const found = await count(which, signal);
    if (found.many) await ask(work, which, found, line);
    else line.done("There are none.");
  };
  const element = h("section", { class: "card", "aria-labelledby": "failed" }, h("h2", { id: "failed" }, "Failed tasks"),
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
  name: "requeue", title: "Requeue failed tasks?", action: "Requeue", style: "primary", past: "requeued",
  text: (many) => `${many} will be done over, each as a new task of its tenant. The failed ones stay as they are.`,
  done: (answer) => answer.requeued.length,
};
const PURGE = {
  name: "purge", title: "Purge failed tasks?", action: "Purge", style: "danger", past: "purged",
  text: (many) => `${many} will be forgotten with their requests and pictures. Whoever asks for one is told that it is unknown. This cannot be undone.`,
  done: (answer) => answer.purged,
};

/** Count failed tasks, up to COUNTED: {many, more}. */
async function count({ model, tenant }, signal) {
  const query = new URLSearchParams({ status: "failed", limit: PAGE, tenant: tenant ?? "*", ...(model && { model }) });
  let many = 0;
  for (;;) {
    const page = await get(`api/tasks?${query}`, signal);
    many += page.tasks.length;
    if (!page.next_cursor || many >= COUNTED) return { many, more: Boolean(page.next_cursor) };
    query.set("cursor", page.next_cursor);
  }
}

/** Say how many it is, and on agreement work through them; resolves when the dialog is closed. */
function ask(work, which, { many, more }, line) {
  return new Promise((resolve) => {
    let going = true;
    const bar = h("progress", { max: many, value: 0, hidden: true, "aria-label": "Done" });
    const told = h("p", { role: "status" }, work.text(`${more ? "More than " : ""}${tasks(many)}${named(which)}`));
    const agree = h("button", { type: "button", class: work.style }, work.action);
    const cancel = h("button", { type: "button", onclick: () => dialog.close() }, "Cancel");
    const dialog = open(work.title, told, bar, h("div", { class: "row end" }, cancel, agree));
    let done = 0;
    const run = async () => {
      bar.hidden = false;
      agree.hidden = true;
      cancel.textContent = "Stop";
      cancel.focus();
      for (let left = true; left && going;) {
        const answer = await post(`api/failed/${work.name}`, { ...which, limit: BATCH });
        done += work.done(answer);
        left = answer.more;
        [bar.max, bar.value] = [Math.max(many, done), done];
        told.textContent = `${done} ${work.past}`;
      }
    };
    agree.addEventListener("click", async () => {
      const well = await act(agree, line, run);
      if (well) line.done(`${tasks(done)} ${work.past}${going ? "" : ", then stopped"}.`);
      dialog.close();
    });
    dialog.addEventListener("close", () => {
      going = false;
      if (!bar.hidden) return resolve();
      line.doing("Nothing was changed.");
      return resolve();
    });
    cancel.focus();
  });
}

const named = ({ model, tenant }) => (model ? ` of ${model}` : "") + (tenant ? ` of the tenant ${tenant}` : "");
