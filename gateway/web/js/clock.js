// What time it is at the gateway: moments it tells are compared with its clock, as the reader's own may be off.

const LEAST_MS = 2000; // what an answer tells is whole seconds, and a moment old
let ahead = 0; // of the reader's clock, in ms

/** The time, in ms since the epoch. */
export const now = () => Date.now() + ahead;

/** Take the time from an answer that has just come: `date` is its header of that name. */
export function hear(date) {
  const told = Date.parse(date) - Date.now();
  if (!Number.isNaN(told)) ahead = Math.abs(told) < LEAST_MS ? 0 : told;
}
