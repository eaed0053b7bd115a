// Elements without markup in strings: what users wrote is only ever text.

/** Return an element. `props`: properties and attributes, `onclick` and the like, `dataset`; children: nodes or text. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "dataset") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name in element && !name.includes("-") && name !== "list") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Return an SVG element; all props are attributes. */
export function s(tag, props = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Set an element's text if it is another: what stays as it was is not drawn, nor read out, again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Give `parent` one child for each item, in their order. A child stays the same element for as long as its item has
 *  the same key, so that focus, scroll and open details last: `make(item)` returns a new one, `update(child, item)`
 *  writes the item into it. */
export function keyed(parent, items, keyOf, make, update) {
  const names = new Set(items.map((item) => String(keyOf(item))));
  for (const child of [...parent.children]) if (!names.has(child.dataset.key)) child.remove(); // first, so that none moves
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(keyOf(item));
    const child = known.get(name) ?? make(item);
    child.dataset.key = name;
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
}

/** Tell the reader something, out loud for a screen reader. */
export function notice(text, kind = "") {
  const line = h("div", { class: `notice ${kind}` }, text);
  document.getElementById("notices").append(line);
  setTimeout(() => line.remove(), kind === "bad" ? 10_000 : 4_000);
}
