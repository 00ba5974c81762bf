// Requests to the gateway that served this page.

import { drawn } from "./dom.js";

const KEY = "genserve.key";
const ID_WORDS = 2;

/** The API key of this tab, empty without one. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/**
 * Failed request: one sentence for a person, the HTTP status (0 without an answer), the request's id, and the seconds
 * to wait before the next one.
 */
export class RequestError extends Error {
  constructor(message, { status = 0, id = "", wait = 0 } = {}) {
    super(sentence(message));
    this.status = status;
    this.id = id;
    this.wait = wait;
  }
}

/** Return a new request id. The servers use it as the task's id, so it is in their logs too. */
export function newId() {
  const words = Array.from({ length: ID_WORDS }, () => drawn().toString(16).padStart(8, "0"));
  return `page-${words.join("")}`;
}

/** Return the JSON answer of a route. `body` is JSON text. */
export async function ask(path, options = {}) {
  const { answer, id } = await send(path, options);
  try {
    return await answer.json();
  } catch (error) {
    throw broken(error, options.signal, id);
  }
}

/** Yield the server-sent events of a route as objects. An event of type "error" is thrown. */
export async function* events(path, options = {}) {
  const { answer, id } = await send(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { done, value } = await read(reader, options.signal, id);
      if (done) return;
      text += value;
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (!data.length) continue; // a comment that keeps the connection open
        const event = JSON.parse(data.map((line) => line.slice(5)).join("\n"));
        if (event.type === "error") throw new RequestError(told(event), { status: answer.status, id });
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal, id) {
  try {
    return await reader.read();
  } catch (error) {
    throw broken(error, signal, id);
  }
}

async function send(path, { body, signal, id = newId() } = {}) {
  const headers = { "x-request-id": id };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    throw broken(error, signal, id);
  }
  id = answer.headers.get("x-request-id") ?? id;
  if (answer.ok) return { answer, id };
  const { status } = answer;
  const failure = await answer.json().catch(() => ({}));
  if (status === 401 || status === 403) document.dispatchEvent(new CustomEvent("key-refused"));
  if (status === 401) throw new RequestError("This gateway needs an API key", { status, id });
  const message = told(failure) || `The gateway answered ${status}`;
  const wait = Number(answer.headers.get("retry-after"));
  throw new RequestError(wait ? `${sentence(message)} Try again in ${wait} s` : message, { status, id, wait });
}

/** Return the error for a connection that ended early. An abort of our own stays as it is. */
function broken(error, signal, id) {
  return signal?.aborted ? error : new RequestError("The gateway cannot be reached", { id });
}

/** Return the message of an error answer, in any dialect. */
function told(failure) {
  const { error, message, detail } = failure ?? {};
  return [error?.message, message, error, detail].find((text) => typeof text === "string") ?? "";
}

function sentence(text) {
  const trimmed = text.trim();
  return `${trimmed.charAt(0).toUpperCase()}${trimmed.slice(1)}${/[.!?]$/.test(trimmed) ? "" : "."}`;
}
