// A page's own parameters: what stands behind the ? of the address' fragment, as in #/tasks?status=failed.

/** Return the parameters of the page that is shown. */
export const query = () => new URLSearchParams(location.hash.split("?")[1] ?? "");

/** Return the link to a page with these parameters; empty ones are left out. */
export function link(path, params = {}) {
  const kept = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return `#/${path}${kept.length ? `?${new URLSearchParams(kept)}` : ""}`;
}

/** Put other parameters into the address without showing the page anew; with `step`, the reader can go back from there. */
export function rename(path, params, step = false) {
  const to = link(path, params);
  if (to === location.hash) return;
  history[step ? "pushState" : "replaceState"](null, "", to);
}
