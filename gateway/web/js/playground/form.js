// The form of the playground: what it asks, how it becomes a request, and how a request becomes a form again.

import { h } from "../dom.js";
import { area, choice, entry, field, numberOf } from "./fields.js";
import { check, fits, presets } from "./limits.js";

const PRIORITIES = ["high", "normal", "low"];
const FREE = "free";
const OWN = [
  "template", "values", "prompt", "negative_prompt", "model", "width", "height", "steps", "guidance_scale", "seed", "n", "format", "priority", "preview",
];

const FREE_PROMPT = { title: { en: "Prompt", zh: "Prompt" }, default: null };

const both = ({ en, zh }) => (en === zh ? en : `${en} · ${zh}`);

/** Return {element, request(), fill(request), tell(errors), keepSeed(seed)}.
 *  `request()` is what to submit, or null where something is wrong, which then stands at its field. */
export function formOf({ models, templates, account, buttons, submit }) {
  const fields = fieldsOf(models, templates, account);
  const places = h("div", { class: "placeholders" });
  const about = h("p", { class: "faint hint" });
  const general = h("p", { class: "bad", role: "alert" });
  const carried = h("div", { class: "row carried", hidden: true });
  const size = h("div", { class: "pair", hidden: true }, fields.width.element, fields.height.element);
  const random = h("input", { type: "checkbox", checked: true });
  const seed = h("div", {}, fields.seed.element, h("label", { class: "row check" }, random, "Random"));
  let values = []; // fields of the chosen template's placeholders
  let extra = {}; // fields of a filled-in request that have no place in the form

  const model = () => models.find(({ name }) => name === fields.model.control.value);
  const template = () => templates.find(({ name }) => name === fields.template.control.value);
  const all = () => [...Object.values(fields), ...values];

  function setModel({ width, height, steps, guidance_scale: guidance }) {
    const chosen = model();
    const sizes = presets(chosen);
    const one = ([x, y]) => h("option", { value: `${x}x${y}` }, `${x} × ${y}`);
    fields.size.control.replaceChildren(...sizes.map(one), h("option", { value: FREE }, "Other …"));
    Object.assign(fields.steps.control, { value: steps, min: 1, max: chosen.max_steps });
    Object.assign(fields.n.control, { min: 1, max: chosen.max_n });
    for (const side of [fields.width, fields.height]) {
      Object.assign(side.control, { min: chosen.min_side, max: chosen.max_side, step: chosen.size_multiple });
    }
    fields.guidance_scale.control.value = guidance;
    setSize(width, height);
  }

  function setSize(width, height) {
    const { control } = fields.size;
    const [value, known] = [`${width}x${height}`, fits(model(), width, height)];
    if (known && ![...control.options].some((option) => option.value === value)) control.prepend(new Option(`${width} × ${height}`, value));
    control.value = known ? value : FREE;
    [fields.width.control.value, fields.height.control.value] = [width, height];
    size.hidden = known;
  }

  function setTemplate(given = {}) {
    const chosen = template();
    const own = (chosen?.placeholders ?? []).filter(({ name }) => name !== "prompt");
    values = own.map(({ name, title, default: usual }) => {
      const text = h("input", { type: "text", value: given[name] ?? "", placeholder: usual ?? "", required: usual === null, autocomplete: "off" });
      return { ...field(`values.${name}`, both(title), text), of: name };
    });
    places.replaceChildren(...values.map(({ element }) => element));
    about.textContent = chosen ? both(chosen.description) : "";
    const prompt = chosen ? chosen.placeholders.find(({ name }) => name === "prompt") : FREE_PROMPT;
    fields.prompt.element.hidden = !prompt;
    fields.prompt.element.querySelector("label > span").textContent = prompt ? both(prompt.title) : "";
    Object.assign(fields.prompt.control, { placeholder: prompt?.default ?? "What to paint, in any language", required: prompt?.default === null });
    fields.negative_prompt.control.placeholder = chosen?.negative_prompt ?? "";
    if (chosen && models.some(({ name }) => name === chosen.model)) {
      fields.model.control.value = chosen.model;
      setModel(chosen);
      fields.format.control.value = chosen.format;
    }
  }

  function read() {
    const chosen = template();
    const text = (name) => fields[name].control.value;
    const [width, height] = text("size") === FREE ? [numberOf(fields.width.control), numberOf(fields.height.control)] : text("size").split("x").map(Number);
    const request = {
      ...(chosen ? { template: chosen.name, values: Object.fromEntries(values.filter(({ control }) => control.value.trim()).map(({ of, control }) => [of, control.value])) } : {}),
      prompt: fields.prompt.element.hidden || !text("prompt").trim() ? undefined : text("prompt"),
      negative_prompt: text("negative_prompt").trim() ? text("negative_prompt") : undefined,
      model: text("model"), width, height,
      steps: numberOf(fields.steps.control), guidance_scale: numberOf(fields.guidance_scale.control),
      seed: random.checked ? undefined : numberOf(fields.seed.control),
      n: numberOf(fields.n.control), format: text("format"), priority: text("priority"),
      ...extra, preview: true,
    };
    return Object.fromEntries(Object.entries(request).filter(([, value]) => value !== undefined));
  }

  const wrong = (found) => check(found, model(), [fields.prompt, ...values].filter(({ control, element: shown }) => control.required && !shown.hidden).map(({ name }) => name));

  /** Show what is wrong, each at its field, the rest above the buttons; return whether nothing is. */
  function tell(errors) {
    const left = [...errors];
    for (const one of all()) {
      const mine = left.filter(({ loc }) => loc === one.name || (one.name === "size" && size.hidden && ["width", "height"].includes(loc)));
      for (const error of mine) left.splice(left.indexOf(error), 1);
      one.tell(mine.map(({ msg }) => msg).join("; "));
    }
    general.textContent = left.map(({ loc, msg }) => (loc ? `${loc}: ${msg}` : msg)).join("; ");
    if (errors.length) (element.querySelector("[aria-invalid]") ?? fields.prompt.control).focus();
    return errors.length === 0;
  }

  /** Take back what was wrong and is no longer. New errors wait for the next submit: a form that grows as its reader
   *  leaves a field moves its buttons away under the pointer. */
  function mended() {
    const still = new Set(wrong(read()).map(({ loc }) => loc));
    for (const one of all()) if (!still.has(one.name)) one.tell("");
  }

  function request() {
    const found = read();
    return tell(wrong(found)) ? found : null;
  }

  function fill(given) {
    fields.template.control.value = templates.some(({ name }) => name === given.template) ? given.template : "";
    setTemplate(given.values);
    if (models.some(({ name }) => name === given.model)) fields.model.control.value = given.model;
    setModel({ ...model(), ...given });
    fields.prompt.control.value = given.prompt ?? "";
    fields.negative_prompt.control.value = given.negative_prompt ?? "";
    fields.n.control.value = given.n ?? 1;
    fields.format.control.value = given.format ?? "webp";
    if ([...fields.priority.control.options].some(({ value }) => value === given.priority)) fields.priority.control.value = given.priority;
    keepSeed(given.seed);
    carry(Object.fromEntries(Object.entries(given).filter(([name]) => !OWN.includes(name))));
  }

  function keepSeed(value) {
    random.checked = value === undefined;
    fields.seed.control.disabled = random.checked;
    fields.seed.control.value = value ?? "";
  }

  function carry(more) {
    extra = more;
    const names = Object.keys(more).map((name) => name.replaceAll("_", " "));
    carried.hidden = !names.length;
    const drop = h("button", { type: "button", onclick: () => carry({}) }, "Leave out");
    carried.replaceChildren(h("span", { class: "faint" }, `Also of that task: ${names.join(", ")}`), drop);
  }

  const changed = (event) => {
    const { target } = event;
    if (target === fields.model.control) setModel(model());
    if (target === fields.template.control) setTemplate();
    if (target === fields.size.control) {
      size.hidden = target.value !== FREE;
      if (target.value !== FREE) setSize(...target.value.split("x").map(Number));
    }
    if (target === random) keepSeed(random.checked ? undefined : (numberOf(fields.seed.control) ?? 0));
    mended();
  };
  const hurry = (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    element.requestSubmit();
  };
  const { prompt, negative_prompt: negative, steps, guidance_scale: guidance, n, format, priority } = fields;
  const element = h("form", { class: "card stack play", noValidate: true, onchange: changed, oninput: mended, onkeydown: hurry, onsubmit: (event) => {
    event.preventDefault();
    submit();
  } },
    templates.length > 0 && h("div", {}, fields.template.element, about),
    prompt.element, places, negative.element,
    h("div", { class: "pair" }, fields.model.element, fields.size.element), size,
    h("div", { class: "pair" }, steps.element, guidance.element),
    h("div", { class: "pair" }, seed, n.element),
    h("div", { class: "pair" }, format.element, priority.element),
    carried, general,
    h("div", { class: "row actions" }, h("button", { class: "primary" }, "Generate"), ...buttons));
  setModel(model());
  keepSeed(undefined);
  fields.priority.control.value = PRIORITIES.includes("normal") && allowed(account).includes("normal") ? "normal" : "low";
  return { element, request, fill, tell, keepSeed };
}

const allowed = ({ priority_max: most }) => PRIORITIES.slice(PRIORITIES.indexOf(most));

function fieldsOf(models, templates, account) {
  const names = models.map((model) => [model.name, model.workers ? model.name : `${model.name} (no worker)`]);
  const made = [
    field("template", "Template", choice([["", "None"], ...templates.map(({ name, title }) => [name, both(title)])])),
    field("prompt", "Prompt", area(5, { placeholder: "What to paint, in any language", required: true })),
    field("negative_prompt", "Negative prompt", area(2), "Counts with guidance above 0"),
    field("model", "Model", choice(names)),
    field("size", "Size", choice([])),
    field("width", "Width", entry()),
    field("height", "Height", entry()),
    field("steps", "Steps", entry()),
    field("guidance_scale", "Guidance", entry({ step: "any", inputMode: "decimal", min: 0, max: 20 })),
    field("seed", "Seed", entry({ min: 0, disabled: true })),
    field("n", "Pictures", entry({ value: 1 })),
    field("format", "Format", choice([["webp", "WebP"], ["png", "PNG"], ["jpeg", "JPEG"]])),
    field("priority", "Priority", choice(allowed(account).map((name) => [name, name]))),
  ];
  const fields = Object.fromEntries(made.map((one) => [one.name, one]));
  fields.model.control.value = (models.find((model) => model.default) ?? models[0]).name;
  return fields;
}
