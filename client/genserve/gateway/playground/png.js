// Settings of an image, from the text chunk that the server writes into PNG files.

import { areAdapters } from "./adapters.js";

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const KEYWORD = "genserve";
const KINDS = {
  prompt: "string",
  negative_prompt: "string",
  model: "string",
  dtype: "string",
  height: "number",
  width: "number",
  steps: "number",
  guidance: "number",
  true_cfg_scale: "number",
  max_sequence_length: "number",
  cache: "number",
};

/** Return the settings in a PNG file, null if it has none. The seed is a string: it may be above 2^53. */
export async function pngSettings(blob) {
  const data = new Uint8Array(await blob.arrayBuffer());
  if (!SIGNATURE.every((byte, index) => data[index] === byte)) return null;
  const view = new DataView(data.buffer);
  for (let start = SIGNATURE.length; start + 8 <= data.length; ) {
    const length = view.getUint32(start);
    const type = latin(data.subarray(start + 4, start + 8));
    const content = data.subarray(start + 8, start + 8 + length);
    const text = type === "iTXt" ? textOf(content) : null;
    if (text !== null) return parsed(text);
    if (type === "IEND") break;
    start += length + 12; // length, type and checksum
  }
  return null;
}

/** Return the text of a chunk with our keyword, else null. */
function textOf(content) {
  const [keyword, rest] = cut(content);
  if (latin(keyword) !== KEYWORD || rest[0] !== 0) return null; // the server never compresses it
  const [, translated] = cut(rest.subarray(2)); // after the language
  return new TextDecoder().decode(cut(translated)[1]);
}

/** Return the bytes before and after the first zero. */
function cut(data) {
  const end = data.indexOf(0);
  return end < 0 ? [data, data.subarray(data.length)] : [data.subarray(0, end), data.subarray(end + 1)];
}

const latin = (data) => new TextDecoder("latin1").decode(data);

function parsed(text) {
  // Quotes within strings are escaped in JSON, so this matches only the field itself.
  const quoted = text.replace(/("seed":\s*)(\d+)/, '$1"$2"');
  let found;
  try {
    found = JSON.parse(quoted);
  } catch {
    return null;
  }
  if (typeof found !== "object" || found === null) return null;
  const known = Object.entries(KINDS).filter(([name, kind]) => typeof found[name] === kind);
  const settings = Object.fromEntries(known.map(([name]) => [name, found[name]]));
  if (/^\d{1,19}$/.test(found.seed)) settings.seed = found.seed;
  if (areAdapters(found.lora)) settings.lora = found.lora;
  return Object.keys(settings).length ? settings : null;
}
