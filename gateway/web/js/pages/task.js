// One task: its pictures or how far it is, where its time went, what was asked for, what became of it.

import { get, post, Problem } from "../api.js";
import { link } from "../address.js";
import { h, notice } from "../dom.js";
import { moment, seconds, sentence } from "../format.js";
import { act } from "../operate/acting.js";
import { copyButtons } from "../tasks/copying.js";
import { followTask } from "../tasks/following.js";
import { gallery } from "../tasks/pictures.js";
import { progressOf } from "../tasks/progress.js";
import { requestOf } from "../tasks/snippets.js";
import { isOpen, mayRetry, outcomeKind, outcomeWord, stateTag } from "../tasks/states.js";
import { waterfall } from "../tasks/waterfall.js";

export const title = "Task";

const DELIVERIES_MS = 5000;
const NAMES = { n: "pictures", deadline_s: "deadline (s)" }; // of what does not read as a word

export async function show(main, account, signal, id) {
  const page = pageOf(id, signal);
  main.append(page.element);
  try {
    let task = await followTask(id, page.draw, signal, page.told);
    while (!signal.aborted && task.webhook?.deliveries.some(({ state }) => state === "pending")) {
      await new Promise((resolve) => setTimeout(resolve, DELIVERIES_MS));
      if (!document.hidden) page.draw((task = await get(`api/status/${id}`, signal).catch(() => task)));
    }
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem) || error.status === 401) throw error;
    main.replaceChildren(h("h1", {}, title), h("p", { class: "bad" }, error.message), h("a", { href: link("tasks") }, "All tasks"));
  }
}

function pageOf(id, signal) {
  const progress = progressOf();
  const state = h("span");
  const buttons = buttonsOf(id);
  const pictures = h("div");
  const told = h("div", { class: "stack told" });
  const times = h("div", { class: "scroll" });
  const tries = h("div", { class: "scroll" });
  const asked = h("div");
  const hooks = h("div");
  let before = null;

  function draw(task) {
    progress.draw(task);
    buttons.draw(task);
    if (before?.status !== task.status) state.replaceChildren(stateTag(task.status));
    if (task.images.length && !before?.images.length) pictures.replaceChildren(gallery(task, signal));
    if (before?.expires_at !== task.expires_at || !before) asked.replaceChildren(request(task));
    told.replaceChildren(...words(task));
    times.replaceChildren(waterfall(task));
    tries.replaceChildren(attempts(task));
    hooks.replaceChildren(...deliveries(task));
    before = task;
  }

  const element = h("div", { class: "stack" },
    h("div", { class: "row heading" }, h("h1", {}, `${title} `, h("code", { class: "id" }, id)), state, h("span", { class: "row actions" }, buttons.elements)),
    progress.heard, progress.lost,
    h("div", { class: "task-page" },
      h("div", { class: "stack" }, told, h("section", { class: "result" }, progress.element, pictures), card("Time", times), card("Attempts", tries)),
      h("div", { class: "stack" }, asked, hooks)));
  return { element, draw, told: progress.told };
}

const card = (name, ...content) => h("section", { class: "card", "aria-label": name }, h("h2", {}, name), ...content);

/** Return {elements, draw(task)}: what can be done about a task. Buttons stay where they are, and one that goes hands on the focus. */
function buttonsOf(id) {
  const line = { failed: (error) => notice(error.message, "bad") };
  let task = null;
  const cancel = h("button", { type: "button", class: "danger", hidden: true, onclick: () => act(cancel, line, () => post(`api/cancel/${id}`)) }, "Cancel");
  const again = async () => {
    location.hash = link(`tasks/${(await post(`api/tasks/${id}/retry`)).task_id}`);
  };
  const retry = h("button", { type: "button", class: "primary", hidden: true, onclick: () => act(retry, line, again) }, "Retry");
  const play = h("a", { class: "button", href: link("playground", { task: id }) }, "Try in playground");
  const draw = (now) => {
    task = now;
    const held = document.activeElement === cancel;
    cancel.hidden = !isOpen(now.status);
    retry.hidden = !mayRetry(now.status);
    if (held && cancel.hidden) (retry.hidden ? play : retry).focus();
  };
  return { elements: [cancel, retry, play, ...copyButtons(() => task && requestOf(task.request))], draw };
}

/** Return what there is to say about a task in words: its error, its warnings. */
function words(task) {
  const error = task.error && h("div", { class: "card problem" },
    h("h2", { class: "bad" }, task.error.code),
    h("p", {}, sentence(task.error.message)),
    h("p", { class: "faint" }, task.error.retryable ? "The same request may succeed later: retry it." : "The same request will most likely fail again: change it first."));
  const warnings = task.warnings.map((warning) => h("p", { class: "card warn" }, warning));
  return [error, ...warnings].filter(Boolean);
}

function attempts(task) {
  if (!task.attempts.length) return h("p", { class: "faint" }, "No worker has begun it.");
  const head = ["#", "Outcome", "Took", "Worker", "GPU", "Began"].map((name) => h("th", { scope: "col", class: name === "Took" ? "number" : null }, name));
  const rows = task.attempts.map((one, index) => h("tr", {},
    h("td", {}, index + 1),
    h("td", { class: outcomeKind(one.outcome) }, outcomeWord(one.outcome)),
    h("td", { class: "number" }, one.ended_at ? seconds((Date.parse(one.ended_at) - Date.parse(one.started_at)) / 1000) : "–"),
    h("td", {}, one.worker),
    h("td", {}, one.gpu),
    h("td", {}, moment(one.started_at))));
  return h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows));
}

function request(task) {
  const { prompt, negative_prompt: negative, width, height, webhook, metadata, model, ...rest } = task.request;
  const idle = { strength: !rest.init_image, control_scale: !rest.control_image, cfg_normalization: !rest.guidance_scale, cfg_truncation: !rest.guidance_scale };
  const shown = ([name, value]) => !idle[name] && value !== null && (!Array.isArray(value) || value.length);
  const own = Object.entries(rest).filter(shown).map(([name, value]) => [NAMES[name] ?? name.replaceAll("_", " "), written(value)]);
  const facts = [...(task.tenant ? [["tenant", task.tenant]] : []), ["model", model], ["size", `${width} × ${height}`], ...own];
  const dates = [["created", task.created_at], ["kept until", task.expires_at]].filter(([, at]) => at).map(([name, at]) => [name, moment(at)]);
  const notes = Object.entries(metadata).map(([name, value]) => [`metadata ${name}`, value]);
  const origin = task.retry_of && h("p", {}, "A retry of ", h("a", { href: link(`tasks/${task.retry_of}`) }, task.retry_of.slice(0, 8)));
  const not = negative && h("p", { class: "words faint" }, "Not: ", h("bdi", {}, negative));
  return card("Request", h("p", { class: "words", dir: "auto" }, prompt), not, origin, definitions([...facts, ...notes, ...dates]));
}

const written = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

const definitions = (pairs) => h("dl", { class: "facts-list" }, pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", { class: "number" }, value)]));

function deliveries(task) {
  if (!task.webhook) return [];
  const rows = task.webhook.deliveries.map((one) => h("tr", {},
    h("td", {}, one.event),
    h("td", { class: outcomeKind(one.state) }, one.state),
    h("td", { class: "number" }, one.tries),
    h("td", {}, one.last_error ?? (one.last_status === null ? "–" : one.last_status)),
    h("td", {}, moment(one.next_try_at))));
  const head = ["Event", "State", "Tries", "Last answer", "Next try"].map((name) => h("th", { scope: "col", class: name === "Tries" ? "number" : null }, name));
  return [card("Webhook", h("p", { class: "faint words" }, task.webhook.url),
    rows.length ? h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows))) : h("p", { class: "faint" }, "Nothing to tell yet."))];
}
