// What was submitted in this browser, for each tenant by itself: task ids and requests, no pictures.

const MOST = 24;

/** Return {entries(), add(id, request), mark(id, status), clear()}; an entry is {task_id, request, at, status}. */
export function historyOf(tenant) {
  const place = `zfleet.history.${tenant}`;

  function entries() {
    try {
      const kept = JSON.parse(localStorage.getItem(place) ?? "[]");
      return Array.isArray(kept) ? kept : [];
    } catch {
      return [];
    }
  }

  function keep(all) {
    try {
      localStorage.setItem(place, JSON.stringify(all.slice(0, MOST)));
    } catch {
      // the browser has no room, or keeps nothing: then there is no history
    }
  }

  return {
    entries,
    add: (id, request) =>
      keep([{ task_id: id, request, at: new Date().toISOString(), status: "queued" }, ...entries().filter(({ task_id: one }) => one !== id)]),
    mark: (id, status) => keep(entries().map((entry) => (entry.task_id === id ? { ...entry, status } : entry))),
    clear: () => localStorage.removeItem(place),
  };
}
