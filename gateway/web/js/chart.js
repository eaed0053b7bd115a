// Charts over time, as SVG: axes with units, a read-out by pointer, touch and arrow keys, a sentence and a table for
// those who do not see the lines. What is not known is a gap, never a zero.

import { h, keyed, s, say } from "./dom.js";

const HEIGHT = 128;
const PAD = { left: 52, right: 8, top: 8, bottom: 20 };
const MOVES = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e6, End: 1e6 };
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat("en", { weekday: "short" });
const full = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

/** A chart of one or two series of the same unit, and of what there is beside them.
 *  `series`: [{name, of(point, history) -> number or null}]; `scale`: one of scales.js; `optional`: not there at all while
 *  nothing is known; `wide`: with room for many lines. */
export class Chart {
  constructor({ title, series, scale, optional = false, wide = false }) {
    Object.assign(this, { title, series: series.map((one, style) => ({ ...one, style })), scale, optional, history: null, at: null, width: 0 });
    this.moment = h("span", { class: "faint number" });
    this.svg = s("svg", { class: "plot", role: "img", tabindex: "0", height: HEIGHT });
    this.aloud = h("span", { class: "visually-hidden", role: "status" });
    this.heads = h("tr");
    this.rows = h("tbody");
    this.table = h("details", { class: "figures", ontoggle: () => this.#fillTable() },
      h("summary", {}, "Table", h("span", { class: "visually-hidden" }, `: ${title}`)),
      h("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": title },
        h("table", {}, h("thead", {}, this.heads), this.rows)));
    this.legend = h("div", { class: "legends" });
    this.others = h("div", { class: "legends others" });
    this.rest = h("p", { class: "faint rest" });
    this.element = h("figure", { class: wide ? "card chart wide" : "card chart" },
      h("figcaption", {}, h("h3", {}, title), this.moment, this.legend),
      this.svg, this.aloud, this.others, this.rest, this.table);
    this.#name([]);
    this.#listen();
  }

  /** Show another history, as of GET /api/history, which goes back `seconds`; `span` says so in words. `more` are series
   *  beside the chart's own, each with the number of its `style`; `rest` says what else there is. */
  draw(history, seconds, span, { series: more = [], rest = "" } = {}) {
    Object.assign(this, { history, seconds, span });
    this.#name(more, rest);
    this.lines = this.shown.map((one) => history.points.map((point) => one.of(point, history) ?? null));
    this.element.hidden = this.optional && this.lines.flat().every((value) => value === null);
    this.times = history.points.map((point) => Date.parse(point.at));
    if (this.at !== null && this.at >= this.times.length) this.at = null;
    this.#paint();
    if (this.table.open) this.#fillTable();
  }

  /** Say which series there are: in the legends, and at the head of the table. */
  #name(more, rest = "") {
    this.shown = [...this.series, ...more];
    keyed(this.legend, this.series, (one) => one.name, key, (element) => element.classList.toggle("alone", this.shown.length === 1));
    keyed(this.others, more, (one) => `${one.style} ${one.name}`, key, () => {});
    this.values = [...this.legend.children, ...this.others.children].map((element) => element.lastElementChild);
    say(this.rest, rest);
    const heads = ["Time", ...this.shown.map((one) => one.name)];
    keyed(this.heads, heads, (name) => name, (name) => h("th", { scope: "col" }, name), () => {});
  }

  #listen() {
    const point = (event) => this.#point(this.#nearest(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointermove", point);
    this.svg.addEventListener("pointerdown", point);
    this.svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#point(null));
    this.svg.addEventListener("blur", () => this.#point(null));
    this.svg.addEventListener("keydown", (event) => {
      if (!(event.key in MOVES) || !this.times?.length) return;
      event.preventDefault();
      const last = this.times.length - 1;
      this.#point(Math.min(last, Math.max(0, (this.at ?? last) + MOVES[event.key])));
      say(this.aloud, `${full.format(this.times[this.at])}: ${this.#sentence(this.at)}`);
    });
    new ResizeObserver(([entry]) => {
      this.width = Math.floor(entry.contentRect.width);
      if (this.history) this.#paint();
    }).observe(this.svg);
  }

  #paint() {
    if (!this.width) return;
    const { svg, width } = this;
    const known = this.lines.flat().filter((value) => value !== null);
    const ticks = known.length ? this.scale.ticks(Math.max(0, ...known)) : [0];
    const to = this.times.at(-1) ?? Date.now();
    const from = to - this.seconds * 1000;
    this.x = (time) => PAD.left + ((time - from) / (to - from)) * (width - PAD.left - PAD.right);
    this.y = (value) => HEIGHT - PAD.bottom - (value / (ticks.at(-1) || 1)) * (HEIGHT - PAD.top - PAD.bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.cursor = s("g", { class: "cursor" });
    svg.replaceChildren(
      ...ticks.map((tick) => axis(PAD.left, width - PAD.right, this.y(tick), known.length ? this.scale.label(tick) : "")),
      ...(known.length ? [] : [s("text", { x: (PAD.left + width - PAD.right) / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "Nothing is known")]),
      ...marks(from, to, (width - PAD.left - PAD.right) / 44).map(([time, text]) => mark(this.x(time), text, width)),
      ...this.lines.flatMap((values, index) => this.#line(values, this.shown[index].style)), this.cursor);
    svg.setAttribute("aria-label", this.#summary());
    this.#point(this.at);
  }

  /** The line of a series, broken where nothing is known; a moment known alone is a dot. */
  #line(values, style) {
    const far = this.history.step_seconds * 1500;
    const runs = [];
    values.forEach((value, i) => {
      if (value === null) return;
      const near = i > 0 && values[i - 1] !== null && this.times[i] - this.times[i - 1] <= far;
      if (!near) runs.push([]);
      runs.at(-1).push([this.x(this.times[i]), this.y(value)].map((each) => Number(each.toFixed(1))));
    });
    const path = (run) => `M${run.map((each) => each.join(" ")).join("L")}`;
    const floor = this.y(0);
    const areas = style > 0 ? [] : runs.filter((run) => run.length > 1).map((run) =>
      s("path", { class: "area", d: `${path(run)}L${run.at(-1)[0]} ${floor}L${run[0][0]} ${floor}Z` }));
    return [...areas, ...runs.map((run) =>
      run.length > 1 ? s("path", { class: `line series-${style}`, d: path(run) })
        : s("circle", { class: `dot series-${style}`, cx: run[0][0], cy: run[0][1], r: 2 }))];
  }

  /** Read out the figures of one point, or with null the last that are known. */
  #point(index) {
    this.at = index;
    if (!this.cursor) return;
    const last = this.times.findLastIndex((_, i) => this.lines.some((values) => values[i] !== null));
    const shown = index ?? last;
    this.#read(shown).forEach((text, i) => say(this.values[i], text));
    const old = index === null && last >= 0 && last < this.times.length - 2;
    say(this.moment, shown >= 0 && (index !== null || old) ? full.format(this.times[shown]) : "");
    this.cursor.replaceChildren();
    if (index === null) return;
    const x = this.x(this.times[index]);
    this.cursor.append(s("line", { x1: x, x2: x, y1: PAD.top, y2: HEIGHT - PAD.bottom }));
    this.lines.forEach((values, i) => {
      if (values[index] !== null) this.cursor.append(s("circle", { class: `dot series-${this.shown[i].style}`, cx: x, cy: this.y(values[index]), r: 3.5 }));
    });
  }

  #nearest(left) {
    if (!this.times?.length) return null;
    const off = this.times.map((time) => Math.abs(this.x(time) - left));
    return off.indexOf(Math.min(...off));
  }

  #read(index) {
    return this.lines.map((values) => (index >= 0 && values[index] !== null ? this.scale.say(values[index]) : "–"));
  }

  /** The figures of one point as a sentence: two without their names, of more those that there are. */
  #sentence(index) {
    const texts = this.#read(index);
    if (texts.length < 3) return texts.join(", ");
    return texts.map((text, i) => `${this.shown[i].name} ${text}`).filter((_, i) => i === 0 || this.lines[i][index]).join(", ");
  }

  #summary() {
    const told = this.lines.map((values, index) => {
      const known = values.filter((value) => value !== null);
      const name = this.shown.length > 1 ? `${this.shown[index].name}: ` : "";
      if (!known.length) return `${name}nothing is known`;
      const [low, high, last] = [Math.min(...known), Math.max(...known), known.at(-1)].map(this.scale.say);
      return `${name}last ${last}, lowest ${low}, highest ${high}`;
    });
    if (this.rest.textContent) told.push(this.rest.textContent);
    return `${this.title}, the last ${this.span}: ${told.join("; ")}. Arrow keys read single points.`;
  }

  #fillTable() {
    if (!this.table.open || !this.history) return;
    this.rows.replaceChildren(...this.times.map((time, index) =>
      h("tr", {}, h("th", { scope: "row" }, full.format(time)), this.#read(index).map((text) => h("td", { class: "number" }, text)))).reverse());
  }
}

/** A series in the legend: its line, its name, and the figure that is read out. */
function key({ name, style }) {
  return h("span", { class: "legend" },
    s("svg", { class: "swatch", width: 24, height: 8, "aria-hidden": "true" }, s("line", { class: `line series-${style}`, x1: 0, x2: 24, y1: 4, y2: 4 })),
    h("span", {}, name, " "), h("b", { class: "number" }, "–"));
}

function axis(left, right, y, text) {
  return s("g", { class: "axis" }, s("line", { x1: left, x2: right, y1: y, y2: y }), s("text", { x: left - 6, y: y + 3.5, "text-anchor": "end" }, text));
}

function mark(x, text, width) {
  const anchor = x > width - 24 ? "end" : "middle";
  return s("g", { class: "axis" },
    s("line", { x1: x, x2: x, y1: HEIGHT - PAD.bottom, y2: HEIGHT - PAD.bottom + 4 }),
    s("text", { x: Math.min(x, width - 1), y: HEIGHT - 4, "text-anchor": anchor }, text));
}

/** Where the x axis has its marks, in the reader's own time: [[ms, text]], at most `room` of them. */
function marks(from, to, room) {
  const days = to - from > 2 * 86_400_000;
  const minutes = days ? 1440 : [1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440].find((step) => (to - from) / 60_000 / step <= room);
  const at = new Date(from);
  if (days) at.setHours(0, 0, 0, 0);
  else at.setHours(0, Math.floor((at.getHours() * 60 + at.getMinutes()) / minutes) * minutes, 0, 0);
  const found = [];
  while (at <= to) {
    if (at >= from) found.push([at.getTime(), days ? day.format(at) : clock.format(at)]);
    if (days) at.setDate(at.getDate() + 1);
    else at.setMinutes(at.getMinutes() + minutes);
  }
  return found;
}
