// Small helpers for elements, numbers and the clipboard.

const TOAST_MS = 4000;

/** Return the element with an id. */
export const at = (id) => document.getElementById(id);

/** Return a copy of a template's first element. */
export const copyOf = (id) => at(id).content.firstElementChild.cloneNode(true);

/** Set the text of an element if it differs, so that nothing is announced or laid out twice. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

let toastTimer;

/** Show a short note that goes away by itself. */
export function toast(text) {
  const note = at("toast");
  write(note, text);
  note.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => note.classList.remove("shown"), TOAST_MS);
}

/** Show an error as one sentence with the request's id, or hide it with null. */
export function showError(element, error) {
  element.hidden = !error;
  if (!error) return element.replaceChildren();
  const parts = [document.createTextNode(error.message)];
  if (error.id) {
    const id = document.createElement("code");
    id.textContent = error.id;
    parts.push(document.createTextNode(" Request "), id);
  }
  element.replaceChildren(...parts);
}

/** Keep the children of `list` equal to `items`, reusing the elements of known keys. */
export function keyed(list, items, { key, create, update, empty }) {
  const known = new Map([...list.children].map((child) => [child.dataset.key, child]));
  const children = items.map((item) => {
    const child = known.get(key(item)) ?? create(item);
    child.dataset.key = key(item);
    update(child, item);
    return child;
  });
  if (!children.length && empty) {
    const note = document.createElement("li");
    note.className = "none";
    note.textContent = empty;
    children.push(note);
  }
  if (children.length !== list.children.length || children.some((child, index) => child !== list.children[index])) {
    list.replaceChildren(...children);
  }
}

/** Copy a text; return whether that worked. The clipboard's own interface needs HTTPS or localhost. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    const focused = document.activeElement;
    (focused?.closest("dialog") ?? document.body).append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}

/** Return "1 image", "2 images". */
export const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Return seconds as "40 ms", "1.4 s", "12 s" or "2 min 5 s". */
export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** Return a number of bytes as "512 MB" or "3.1 GB". */
export function bytes(number) {
  const giga = number / 2 ** 30;
  return giga >= 1 ? `${giga.toFixed(1)} GiB` : `${Math.round(number / 2 ** 20)} MiB`;
}

/** Return a random whole number below 2^32; unlike crypto.randomUUID, this also works over plain HTTP. */
export const drawn = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** Whether motion is wanted. */
export const moves = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Scroll an element into view where it is out of it, as on a phone. */
export function reveal(element) {
  const { top, bottom } = element.getBoundingClientRect();
  if (top >= 0 && bottom <= innerHeight) return;
  element.scrollIntoView({ behavior: moves() ? "smooth" : "auto", block: "start" });
}
