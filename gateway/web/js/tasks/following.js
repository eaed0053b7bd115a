// One task as it goes on: its stream of events, and while it waits its place in line, which no event tells.

import { follow, get, persist } from "../api.js";

const PLACE_MS = 2000;
const ENDS = ["succeeded", "failed", "canceled", "expired"];

/** Call `on(task)` with the task's status now and whenever it has changed, the last time with its end, and return that.
 *  `tell(connected)`: whether that is heard of, as follow() does.
 *  `task.progress.preview` is the last one there was. Throws the Problem of a task that is not there. */
export async function followTask(id, on, signal, tell = () => {}) {
  let task = await persist(() => get(`api/status/${id}`, signal), { signal, missed: () => tell(false) });
  tell(true);
  on(task);
  if (ENDS.includes(task.status)) return task;
  const note = (change) => {
    const preview = change.progress?.preview ?? task.progress.preview;
    task = { ...task, ...change };
    task.progress = { ...task.progress, preview };
    on(task);
  };
  const timer = setInterval(async () => {
    if (task.status !== "queued" || document.hidden) return;
    const now = await get(`api/status/${id}`, signal).catch(() => null); // the stream tells what is wrong
    if (now?.status === "queued" && task.status === "queued") note({ position: now.position, eta_seconds: now.eta_seconds });
  }, PLACE_MS);
  const hear = (event, data) => {
    if (event === "progress") note({ progress: data });
    else note(data);
    return !ENDS.includes(event);
  };
  try {
    await follow(`api/tasks/${id}/events`, hear, signal, tell);
  } finally {
    clearInterval(timer);
  }
  return task;
}
