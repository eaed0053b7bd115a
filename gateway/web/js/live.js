// The fleet as it is, told by the gateway as it changes, for as long as somebody looks at the page.

import { follow } from "./api.js";

/** Call `on(fleet)` with each state of the fleet (as of GET /api/fleet) and `tell(connected)` as follow() does, until
 *  `signal` aborts. A hidden page lets go of its stream: a browser has few to one host, and nobody is looking. */
export async function watch(on, tell, signal) {
  const told = (event, fleet) => {
    if (event === "fleet") on(fleet);
  };
  while (!signal.aborted) {
    await shown(signal);
    const hidden = new AbortController();
    const look = () => document.hidden && hidden.abort();
    document.addEventListener("visibilitychange", look);
    try {
      await follow("api/fleet/events", told, AbortSignal.any([signal, hidden.signal]), tell);
    } finally {
      document.removeEventListener("visibilitychange", look);
    }
  }
}

/** Call `work` now and then every `seconds()` while the page is seen, until `signal` aborts. */
export async function repeat(work, seconds, signal) {
  while (!signal.aborted) {
    await shown(signal);
    await work();
    await new Promise((resolve) => setTimeout(resolve, seconds() * 1000));
  }
}

async function shown(signal) {
  while (document.hidden && !signal.aborted) {
    await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true, signal }));
  }
}
