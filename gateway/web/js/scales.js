// What a chart's y axis says: where its ticks stand, and how figures are written, each with its unit.

import { seconds } from "./format.js";

const DECIMAL = [1, 2, 5, 10];
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400];
const TICKS = 3; // beside zero, at most

/** Return ticks from zero to the first that is not below `most`. */
function steps(most, step) {
  const ticks = [0];
  while (ticks.at(-1) < most - step * 1e-9) ticks.push(ticks.length * step);
  return ticks;
}

function decimalStep(most) {
  const power = 10 ** Math.floor(Math.log10(most / TICKS));
  return DECIMAL.map((factor) => factor * power).find((step) => step * TICKS >= most * 0.999999);
}

const plain = (value) => String(Number(value.toFixed(value < 10 ? 2 : 0)));
const figure = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? plain(Number(value.toFixed(1))) : plain(value));

/** Whole things. */
export const counts = {
  ticks: (most) => steps(Math.max(most, 1), Math.max(1, Math.ceil(decimalStep(Math.max(most, 1))))),
  label: (value) => (value >= 1000 ? `${plain(value / 1000)} k` : plain(value)),
  say: (value) => (Number.isInteger(value) ? value.toLocaleString("en") : figure(value)),
};

/** So many a minute. */
export const rates = {
  ticks: (most) => steps(Math.max(most, 1), decimalStep(Math.max(most, 1))),
  label: (value) => (value >= 1000 ? `${plain(value / 1000)} k` : plain(value)),
  say: (value) => `${figure(value)}/min`,
};

/** Seconds; from a minute on the ticks stand at what clocks show. */
export const times = {
  ticks(most) {
    const top = Math.max(most, 0.1);
    return steps(top, top <= 6 ? decimalStep(top) : TIMES.find((step) => step * TICKS >= top) ?? 86_400 * decimalStep(top / 86_400));
  },
  label: (value) =>
    value < 60 ? `${plain(value)} s` : value < 3600 ? `${plain(value / 60)} min` : value < 86_400 ? `${plain(value / 3600)} h` : `${plain(value / 86_400)} d`,
  say: (value) => (value === 0 ? "0 s" : seconds(value)),
};

/** Ratios, as per cent; `full` shows the whole hundred. */
export const ratios = (full) => ({
  ticks(most) {
    const top = full ? 1 : Math.min(1, Math.max(most, 0.03));
    return full ? [0, 0.5, 1] : steps(top, decimalStep(top)).filter((tick) => tick <= 1 || tick - 1 < decimalStep(top));
  },
  label: (value) => `${plain(value * 100)}%`,
  say: (value) => `${figure(value * 100)}%`,
});

/** Memory, given in MiB. */
export const memory = {
  ticks(most) {
    const unit = most < 1024 ? 1 : 1024;
    return steps(Math.max(most, 1) / unit, decimalStep(Math.max(most, 1) / unit)).map((tick) => tick * unit);
  },
  label: (value) => (value === 0 ? "0" : value < 1024 ? `${plain(value)} MiB` : `${plain(value / 1024)} GiB`),
  say: (value) => (value < 1024 ? `${Math.round(value)} MiB` : `${figure(value / 1024)} GiB`),
};

/** Joules. */
export const energy = {
  ticks: (most) => steps(Math.max(most, 1), decimalStep(Math.max(most, 1))),
  label: (value) => (value >= 1000 ? `${plain(value / 1000)} kJ` : `${plain(value)} J`),
  say: (value) => (value >= 1000 ? `${figure(value / 1000)} kJ` : `${figure(value)} J`),
};
