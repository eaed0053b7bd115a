// The playground: a request as a form, what becomes of it, and what was asked for before.

import { get, post, Problem } from "../api.js";
import { link, query, rename } from "../address.js";
import { h, notice } from "../dom.js";
import { ago } from "../format.js";
import { act } from "../operate/acting.js";
import { formOf } from "../playground/form.js";
import { historyOf } from "../playground/history.js";
import { copyButtons } from "../tasks/copying.js";
import { followTask } from "../tasks/following.js";
import { gallery, thumbnails } from "../tasks/pictures.js";
import { progressOf } from "../tasks/progress.js";
import { requestOf } from "../tasks/snippets.js";
import { isOpen, stateTag } from "../tasks/states.js";

export const title = "Playground";

const SETTLE_MS = 5000;

export async function show(main, account, signal) {
  main.append(h("h1", {}, title));
  const [{ models }, { templates }] = await Promise.all([get("api/models", signal), get("api/templates", signal)]);
  const history = historyOf(account.tenant);
  const past = pastOf(history, signal);
  const form = formOf({ models, templates, account, submit: () => send(), buttons: copyButtons(() => told(form.request())) });
  const stage = stageOf({ signal, keepSeed: form.keepSeed, changed: past.mark });
  let unanswered = { body: "", key: "" }; // a submit of which it is not known whether it came through

  async function send() {
    const request = form.request();
    if (request === null) return;
    const body = JSON.stringify(request);
    if (unanswered.body !== body) unanswered = { body, key: randomKey() };
    let answer;
    try {
      answer = await post("api/submit", request, { "Idempotency-Key": unanswered.key });
    } catch (error) {
      if (!(error instanceof Problem) || error.status === 401) throw error;
      form.tell(error.errors.length ? error.errors : [{ loc: "", msg: error.message }]);
      return;
    }
    unanswered = { body: "", key: "" };
    past.add(answer.task_id, request);
    rename("playground", { task: answer.task_id });
    if (stage.element.getBoundingClientRect().top > innerHeight / 2) stage.element.scrollIntoView();
    await stage.follow(answer.task_id);
  }

  main.append(h("div", { class: "playground" }, form.element, h("div", { class: "stack" }, stage.element, past.element)));
  past.settle();
  await again(encodeURIComponent(query().get("task") ?? ""), form, stage, history);
}

/** Fill the form with the request of a task and show what became of it. */
async function again(id, form, stage, history) {
  if (!id) return;
  const kept = history.entries().find(({ task_id: one }) => one === id)?.request;
  if (kept) form.fill(kept);
  try {
    await stage.follow(id, (task) => kept ?? form.fill(requestOf(task.request)));
  } catch (error) {
    if (!(error instanceof Problem) || error.status === 401) throw error;
    notice(error.message, "bad");
  }
}

const told = (request) => request && Object.fromEntries(Object.entries(request).filter(([name]) => name !== "preview"));

const randomKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Return {element, follow(id, first)}: the one task that is shown. */
function stageOf({ signal, keepSeed, changed }) {
  const progress = progressOf();
  const state = h("span");
  const words = h("p", { class: "bad" });
  const details = h("a", {}, "Details");
  const cancel = h("button", { type: "button", class: "danger", hidden: true }, "Cancel");
  const pictures = h("div");
  const bar = h("div", { class: "row", hidden: true }, state, details, h("span", { class: "row actions" }, cancel));
  const empty = h("p", { class: "faint canvas nothing" }, "The picture comes here.");
  const element = h("section", { class: "card stage", "aria-label": "Result" }, progress.heard, bar, progress.lost, words, progress.element, pictures, empty);
  let leaving = new AbortController();

  async function follow(id, first = () => {}) {
    leaving.abort();
    leaving = new AbortController();
    const mine = AbortSignal.any([signal, leaving.signal]);
    pictures.replaceChildren();
    let before = null;
    cancel.onclick = () => act(cancel, { failed: (error) => notice(error.message, "bad") }, () => post(`api/cancel/${id}`));
    await followTask(id, (task) => {
      if (mine.aborted) return;
      if (!before) first(task);
      progress.draw(task);
      if (document.activeElement === cancel && !isOpen(task.status)) details.focus();
      [bar.hidden, empty.hidden, cancel.hidden, details.href] = [false, true, !isOpen(task.status), link(`tasks/${id}`)];
      if (before?.status !== task.status) {
        state.replaceChildren(stateTag(task.status));
        changed(id, task.status);
      }
      words.textContent = task.error ? `${task.error.message} (${task.error.code})` : "";
      if (task.images.length && !before?.images.length) {
        const keep = (image) => h("button", { type: "button", onclick: () => keepSeed(image.seed) }, "Keep seed");
        pictures.replaceChildren(gallery(task, mine, keep));
      }
      before = task;
    }, mine, (connected) => mine.aborted || progress.told(connected));
  }

  return { element, follow };
}

const named = ({ prompt, template, values }) => [template, prompt, ...Object.values(values ?? {})].filter(Boolean).join(" · ");

/** Return {element, add(id, request), mark(id, status), settle()}: what was submitted in this browser. */
function pastOf(history, signal) {
  const list = h("ol", { class: "past" });
  const clear = h("button", { type: "button", onclick: () => {
    history.clear();
    draw();
  } }, "Clear");
  const element = h("section", { class: "card", "aria-label": "History" }, h("div", { class: "row heading" }, h("h2", {}, "History"), clear), list);
  const thumbnail = thumbnails(signal);

  function draw() {
    const entries = history.entries();
    element.hidden = !entries.length;
    list.replaceChildren(...entries.map((entry) => h("li", {}, h("a", { href: link("playground", { task: entry.task_id }) },
      thumbnail(entry.status === "succeeded" ? `/api/tasks/${entry.task_id}/thumbnail` : null),
      h("span", { class: "what" }, h("span", { class: "prompt" }, named(entry.request)),
        h("span", { class: "facts faint" }, [entry.request.model, entry.status === "succeeded" ? "" : entry.status, ago(entry.at)].filter(Boolean).join(" · ")))))));
  }

  function mark(id, status) {
    history.mark(id, status);
    draw();
  }

  /** Find out from time to time what became of those that nobody follows. */
  async function settle() {
    for (const { task_id: id } of history.entries().filter(({ status }) => isOpen(status))) {
      const status = await get(`api/status/${id}`, signal).then((task) => task.status, (error) => ([404, 410].includes(error.status) ? "gone" : null));
      if (status && !isOpen(status)) mark(id, status);
    }
    if (!signal.aborted) setTimeout(settle, SETTLE_MS);
  }

  draw();
  return { element, mark, settle, add: (id, request) => {
    history.add(id, request);
    draw();
  } };
}
