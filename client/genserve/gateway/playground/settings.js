// The image form: its settings as a request, and an image's settings back in the form.

import { adaptersOf, writtenAdapters } from "./adapters.js";
import { at, drawn } from "./dom.js";
import { changed, fill, remember } from "./forms.js";

const MAX_SEED = 2n ** 63n - 1n;
const NUMBERS = { steps: "num_inference_steps", guidance: "guidance_scale", true_cfg_scale: "true_cfg_scale" };
const OFF = "cache"; // A number too, but the model has no default for it: without one, it is off.
const DEFAULTS = "genserve.defaults";
const SQUARE = { width: 1, height: 1 };

const form = at("image-form");

/** Connect the form's own controls. */
export function startSettings() {
  remember(form, "genserve.images");
  form.addEventListener("input", show);
  at("dice").addEventListener("click", () => {
    form.elements.seed.value = String(drawn());
    changed(form);
  });
  show();
}

/** Return the requests of the form, one per image: their JSON bodies, seeds (as strings) and shapes. */
export function requests() {
  const values = Object.fromEntries(new FormData(form));
  const body = { prompt: values.prompt, priority: values.priority, stream: true, stream_progress: true };
  if (values.negative_prompt) body.negative_prompt = values.negative_prompt;
  for (const [field, name] of Object.entries({ ...NUMBERS, [OFF]: OFF })) {
    if (values[field] !== "") body[name] = Number(values[field]);
  }
  const lora = adaptersOf(values.lora);
  if (lora.length) body.lora = lora;
  const size = values.size === "custom" ? `${values.width}x${values.height}` : values.size;
  if (size !== "auto") body.size = size;
  const [width, height] = size.split("x").map(Number);
  const shape = size === "auto" ? (defaults().width ? defaults() : SQUARE) : { width, height };
  const first = BigInt(values.seed || drawn());
  return Array.from({ length: Number(values.count) }, (_, index) => {
    const seed = String((first + BigInt(index)) % (MAX_SEED + 1n));
    // A number of JSON may have more digits than one of JavaScript.
    return { body: `${JSON.stringify(body).slice(0, -1)},"seed":${seed}}`, seed, shape, prompt: values.prompt };
  });
}

/** Put an image's settings into the form, so that it makes the same image again. */
export function useSettings(settings) {
  const size = `${settings.width}x${settings.height}`;
  const isListed = [...form.elements.size.options].some((option) => option.value === size);
  const values = {
    prompt: settings.prompt ?? "",
    negative_prompt: settings.negative_prompt ?? "",
    size: !settings.width || !settings.height ? "auto" : isListed ? size : "custom",
    width: settings.width ?? form.elements.width.value,
    height: settings.height ?? form.elements.height.value,
    steps: settings.steps ?? "",
    guidance: settings.guidance ?? "",
    true_cfg_scale: settings.negative_prompt ? (settings.true_cfg_scale ?? "") : "",
    lora: writtenAdapters(settings.lora ?? []),
    [OFF]: settings.cache || "",
    seed: settings.seed ?? "",
    count: "1",
  };
  for (const [name, value] of Object.entries(values)) fill(form, name, String(value));
  changed(form);
}

/** Learn the model's defaults from an image that was made with them. */
export function learn(settings) {
  const { size, steps, guidance, true_cfg_scale: scale, negative_prompt: negative } = form.elements;
  const known = { ...defaults(), model: settings.model };
  if (size.value === "auto") Object.assign(known, { width: settings.width, height: settings.height });
  if (steps.value === "") known.steps = settings.steps;
  if (guidance.value === "") known.guidance = settings.guidance;
  if (scale.value === "" && negative.value) known.true_cfg_scale = settings.true_cfg_scale;
  try {
    localStorage.setItem(DEFAULTS, JSON.stringify(known));
  } catch {
    // No storage: the fields go on to say "auto".
  }
  show();
}

function defaults() {
  try {
    return JSON.parse(localStorage.getItem(DEFAULTS)) ?? {};
  } catch {
    return {};
  }
}

/** Show what depends on the fields: the sides of another size, the number of images, the model's defaults. */
function show() {
  const isCustom = form.elements.size.value === "custom";
  at("sides").hidden = !isCustom;
  for (const side of [form.elements.width, form.elements.height]) side.disabled = !isCustom;
  const count = Number(form.elements.count.value);
  at("generate").textContent = count === 1 ? "Generate image" : `Generate ${count} images`;
  const known = defaults();
  for (const name of Object.keys(NUMBERS)) form.elements[name].placeholder = known[name] ?? "auto";
  form.elements.size.options[0].textContent = known.width ? `Auto, ${known.width} × ${known.height}` : "Auto";
}
