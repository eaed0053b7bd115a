// The way to the gateway: the reader's key on every call, problems as errors, streams that come back by themselves.

import { hear } from "./clock.js";

const KEY = "zfleet.key";
const AGAIN_MS = 2000;
const SILENCE_MS = 45_000; // a stream says something every 15 s; one that does not hangs

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  /** Keep a key for this tab, or with `stay` until its reader signs out. */
  set(value, stay) {
    key.forget();
    (stay ? localStorage : sessionStorage).setItem(KEY, value);
  },
  /** Keep another key in its place, for as long as that. */
  replace: (value) => key.set(value, sessionStorage.getItem(KEY) === null && localStorage.getItem(KEY) !== null),
  forget() {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
  },
};

/** A problem document (RFC 9457) that the gateway answered with; status 0 where none came. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? body.title ?? `HTTP ${status}`);
    this.status = status;
    this.code = body.code ?? "";
    this.errors = body.errors ?? []; // {loc, msg} of each refused field
  }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: options.cache ?? "no-cache" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The gateway does not answer." });
  }
  if (!answer.ok) throw new Problem(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

/** Whether an error says that the gateway, or Redis behind it, is away for now. */
export const away = (error) => error instanceof Problem && [0, 502, 503, 504].includes(error.status);

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Return what `work` returns, and do it again while the gateway is away: `most` times, `missed(error)` after each. */
export async function persist(work, { signal, most = Infinity, missed = () => {} } = {}) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await work();
    } catch (error) {
      if (signal?.aborted || !away(error) || tries === most) throw error;
      missed(error);
    }
    await pause(AGAIN_MS);
    signal?.throwIfAborted();
  }
}

/** GET `path` (relative to the page) and return its JSON. */
export async function get(path, signal) {
  const answer = await ask(path, { signal });
  hear(answer.headers.get("Date"));
  return answer.json();
}

/** Return GET /health's JSON, which also comes with a 503; without a gateway, one that says so. */
export async function health(signal) {
  try {
    return await (await fetch("health", { signal, cache: "no-store" })).json();
  } catch {
    return { status: "unhealthy", reasons: ["The gateway does not answer."], workers: 0, models_loaded: [] };
  }
}

/** POST `body` as JSON and return the answer's JSON. */
export async function post(path, body, headers = {}) {
  const json = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
  return (await ask(path, { method: "POST", ...json })).json();
}

/** Return a picture as a blob; an <img> could not send the key. What the answer lets be cached is. */
export async function picture(path, signal) {
  return (await ask(path, { signal, cache: "default" })).blob();
}

/** Follow a stream of server-sent events until `signal` aborts: it is opened again where it ends, breaks or hangs.
 *  `on(event, data)`: return false to end it. `tell(true)` is called whenever something was heard, if only that the
 *  stream is alive, and `tell(false)` when it broke. Problems other than a gateway that is away are thrown. */
export async function follow(path, on, signal, tell = () => {}) {
  let last = "";
  while (!signal.aborted) {
    const silence = new AbortController();
    let patience;
    const heard = () => {
      clearTimeout(patience);
      patience = setTimeout(() => silence.abort(), SILENCE_MS);
      tell(true);
    };
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      const answer = await ask(path, { signal: AbortSignal.any([signal, silence.signal]), headers });
      for await (const event of events(answer.body, heard)) {
        if (event.id) last = event.id;
        if (on(event.name, event.data) === false) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status > 0 && error.status < 500 && error.status !== 429) throw error;
    } finally {
      clearTimeout(patience);
    }
    tell(false);
    await pause(AGAIN_MS);
  }
}

async function* events(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    heard();
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", id: "", data: "" };
      for (const line of block.split("\n")) {
        const [field, content] = [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()];
        if (field === "event") event.name = content;
        else if (field === "id") event.id = content;
        else if (field === "data") event.data += content;
      }
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}
