// The list of tasks on screen: a row each, changed in place where its task has changed.

import { link } from "../address.js";
import { h, keyed, say } from "../dom.js";
import { ago, moment, seconds } from "../format.js";
import { stateTag } from "./states.js";

/** Return {element, tasks(), draw(tasks)}; `thumbnail(url)` makes a row's picture, `everybody` is whether rows tell whose they are. */
export function rowsOf({ thumbnail, everybody }) {
  const element = h("ol", { class: "tasks", "aria-label": "Tasks, newest first" });
  const rows = new WeakMap();
  let shown = [];

  function make() {
    const row = rowOf(thumbnail, everybody);
    rows.set(row.element, row);
    return row.element;
  }

  function draw(tasks) {
    shown = tasks;
    keyed(element, tasks, ({ task_id: id }) => id, make, (child, task) => rows.get(child).draw(task));
  }

  return { element, draw, tasks: () => shown };
}

function rowOf(thumbnail, everybody) {
  const picture = h("span");
  const prompt = h("a", { class: "prompt", dir: "auto" });
  const facts = h("span", { class: "facts faint" });
  const state = h("span", { class: "state-cell" });
  const when = h("time", { class: "faint number" });
  const took = h("span", { class: "faint number" });
  const element = h("li", { class: "task" }, picture, h("span", { class: "what" }, prompt, facts), state, h("span", { class: "times" }, when, took));
  let before = null;

  function draw(task) {
    say(when, ago(task.created_at));
    if (!before) {
      prompt.href = link(`tasks/${task.task_id}`);
      prompt.textContent = task.prompt;
      [when.dateTime, when.title] = [task.created_at, moment(task.created_at)];
    }
    if (!before || before.thumbnail_url !== task.thumbnail_url) picture.replaceChildren(thumbnail(task.thumbnail_url));
    if (before?.status !== task.status) state.replaceChildren(stateTag(task.status));
    say(facts, [task.error_code, task.model, count(task), everybody && task.tenant, task.retry_of && "a retry"].filter(Boolean).join(" · "));
    say(took, task.finished_at ? `took ${seconds((Date.parse(task.finished_at) - Date.parse(task.created_at)) / 1000)}` : "");
    before = task;
  }

  return { element, draw };
}

const count = ({ n, images }) => (n === 1 ? "" : images ? `${images} of ${n} pictures` : `${n} pictures`);
