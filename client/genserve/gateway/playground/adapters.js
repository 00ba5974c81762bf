// LoRA adapters as the form has them: "neon, blueprint=0.6".

/** Return the adapters of a text, as the gateway takes them. */
export function adaptersOf(text) {
  const parts = text.split(",").map((part) => part.trim());
  return parts.filter(Boolean).map((part) => {
    const [name, weight] = part.split("=");
    return { name: name.trim(), weight: weight === undefined ? 1 : Number(weight) };
  });
}

/** Return the text for adapters. */
export function writtenAdapters(adapters) {
  return adapters.map(({ name, weight }) => (weight === 1 ? name : `${name}=${weight}`)).join(", ");
}

/** Whether a value of unknown origin is a list of adapters. */
export function areAdapters(value) {
  const isAdapter = (each) => typeof each?.name === "string" && typeof each.weight === "number";
  return Array.isArray(value) && value.every(isAdapter);
}
