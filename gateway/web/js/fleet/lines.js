// What waited of each model and priority, as lines in a chart. A line keeps its style for as long as it is shown, and has the
// same one in every chart.

const MOST = 8; // lines; app.css has as many styles from FIRST on
const FIRST = 2;

const nameOf = ({ model, priority }) => `${model} ${priority}`;

/** Return what finds the lines of a history, of those queues in which most waited at a time: [{name, style}], and `rest`,
 *  how many others there are. */
export function lines() {
  let styles = new Map();
  return ({ points }) => {
    const peaks = new Map();
    for (const queue of points.flatMap((point) => point.queues ?? [])) {
      peaks.set(nameOf(queue), Math.max(queue.queued, peaks.get(nameOf(queue)) ?? 0));
    }
    const names = [...peaks.keys()].sort((a, b) => peaks.get(b) - peaks.get(a) || (a < b ? -1 : 1)).slice(0, MOST);
    const free = Array.from({ length: MOST }, (_, nth) => FIRST + nth).filter((style) => !names.some((name) => styles.get(name) === style));
    styles = new Map(names.sort().map((name) => [name, styles.get(name) ?? free.shift()]));
    return { found: names.map((name) => ({ name, style: styles.get(name) })), rest: peaks.size - names.length };
  };
}

/** Return the figure of a line at a point: 0 where nothing waited, null where that is not known. */
export function figure(point, name, of) {
  if (!point.queues) return null;
  const queue = point.queues.find((one) => nameOf(one) === name);
  return queue ? of(queue) : 0;
}
