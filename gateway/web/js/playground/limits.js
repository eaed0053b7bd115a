// What a model takes, in the words of /api/models: sizes to choose from, and what is wrong with a request.

const RATIOS = [[1, 1], [4, 3], [3, 4], [3, 2], [2, 3], [16, 9], [9, 16]];
const SEED_MAX = Number.MAX_SAFE_INTEGER;
const GUIDANCE_MAX = 20;
const PROMPT_MAX = 16_000;

/** Whether a model can make a picture of this size. */
export const fits = (model, width, height) =>
  [width, height].every((side) => side >= model.min_side && side <= model.max_side && side % model.size_multiple === 0) && width * height <= model.max_pixels;

/** Return sizes as [width, height]: the model's own, common shapes of as many pixels, and the largest square. */
export function presets(model) {
  const round = (side) => Math.round(side / model.size_multiple) * model.size_multiple;
  const shapes = RATIOS.map(([x, y]) => {
    const unit = Math.sqrt((model.width * model.height) / (x * y));
    return [round(x * unit), round(y * unit)];
  });
  const side = Math.min(model.max_side, Math.sqrt(model.max_pixels));
  const most = Math.floor(side / model.size_multiple) * model.size_multiple;
  const all = [[model.width, model.height], ...shapes, [most, most]].filter(([width, height]) => fits(model, width, height));
  return [...new Map(all.map((size) => [size.join("x"), size])).values()];
}

/** Return what is wrong with a request as {loc, msg}, as the gateway would; NaN stands for what is no number.
 *  `needed` are the texts that it cannot do without: "prompt", "values.NAME". */
export function check(request, model, needed) {
  const errors = [];
  const refuse = (loc, msg) => errors.push({ loc, msg });
  const range = (name, least, most, whole = true) => {
    const value = request[name];
    if (value === undefined) return;
    if (!(value >= least && value <= most) || (whole && !Number.isInteger(value))) refuse(name, `must be ${whole ? "a whole number " : ""}from ${least} to ${most}`);
  };
  const given = { prompt: request.prompt, ...Object.fromEntries(Object.entries(request.values ?? {}).map(([name, text]) => [`values.${name}`, text])) };
  for (const name of needed) if (!given[name]?.trim()) refuse(name, "is required");
  for (const name of ["prompt", "negative_prompt"]) {
    if ([...(request[name] ?? "")].length > PROMPT_MAX) refuse(name, `must have at most ${PROMPT_MAX} characters`);
  }
  if (!model) return errors;
  for (const name of ["width", "height"]) {
    const side = request[name];
    if (side === undefined) continue;
    if (!(side >= model.min_side && side <= model.max_side) || side % model.size_multiple) {
      refuse(name, `must be a multiple of ${model.size_multiple} from ${model.min_side} to ${model.max_side}`);
    }
  }
  if (request.width * request.height > model.max_pixels) refuse("width", `width × height must be at most ${model.max_pixels} pixels`);
  range("steps", 1, model.max_steps);
  range("guidance_scale", 0, GUIDANCE_MAX, false);
  range("n", 1, model.max_n);
  range("seed", 0, SEED_MAX - (request.n > 1 ? request.n - 1 : 0));
  return errors;
}
