// Figures as people read them.

import { now } from "./clock.js";

export const seconds = (value) =>
  value === null || value === undefined ? "–"
    : value < 1 ? `${Math.round(value * 1000)} ms`
      : value < 60 ? `${value.toFixed(1)} s`
        : value < 3600 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`
          : value < 86_400 ? `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`
            : `${Math.floor(value / 86_400)} d ${Math.round((value % 86_400) / 3600)} h`;

/** Whole seconds, and what is more in its own units. */
export const whole = (value) => (value < 60 ? `${Math.round(value)} s` : seconds(value).replace(/ 0 (s|min|h)$/, ""));

export const percent = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(value < 0.1 ? 1 : 0)}%`);

export const mib = (value) =>
  value === null || value === undefined ? "–" : value < 1024 ? `${Math.round(value)} MiB` : `${(value / 1024).toFixed(1)} GiB`;

export const number = (value, digits = 0) => (value === null || value === undefined ? "–" : value.toFixed(digits));

/** A moment of RFC 3339 in the reader's own time. */
export const moment = (text) => (text ? new Date(text).toLocaleString() : "–");

/** What the gateway says, as a sentence among others. */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

/** How long ago a moment of RFC 3339 was, in one unit. */
export function ago(text) {
  if (!text) return "–";
  const age = (now() - new Date(text)) / 1000;
  const [unit, name] = [[86_400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([least]) => age >= least) ?? [0, ""];
  return unit ? `${Math.floor(age / unit)} ${name} ago` : "just now";
}
