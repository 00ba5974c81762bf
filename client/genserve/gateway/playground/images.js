// The images tab: the form, the images on their way, and what can be done with them.

import { RequestError, events, newId } from "./api.js";
import { at, copyText, counted, duration, reveal, showError, toast, write } from "./dom.js";
import { enable, isEnabled } from "./forms.js";
import { Gallery } from "./gallery.js";
import { pngSettings } from "./png.js";
import { learn, requests, startSettings, useSettings } from "./settings.js";
import { Tile, summary } from "./tiles.js";

const COMPLETED = "image_generation.completed";
const PROGRESS = "image_generation.progress";
const TICK_MS = 250;
const ANNOUNCED = 4; // Screen readers hear of each quarter of the work, not of each step.

const form = at("image-form");
const gallery = new Gallery({ use, seed: copySeed, changed: showEmpty, dropped });
let run = null;
let shown = [];

/** Start the tab. */
export async function startImages() {
  startSettings();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  at("cancel").addEventListener("click", cancelImages);
  for (const idea of at("image-empty").querySelectorAll("button")) {
    idea.addEventListener("click", () => {
      useSettings({ prompt: idea.textContent });
      form.requestSubmit();
    });
  }
  await gallery.start();
  showEmpty();
}

/** Stop the images that are not finished; return whether there were any. */
export function cancelImages() {
  if (!run || !isEnabled(at("cancel"))) return false;
  run.controllers.forEach((controller) => controller.abort());
  return true;
}

/** Put the settings of a PNG file into the form. */
export async function readFile(file) {
  const settings = await pngSettings(file).catch(() => null);
  if (settings) use(settings);
  else toast(`${file.name} has no settings of GenServe.`);
}

async function generate() {
  if (run) return toast("Still generating. Esc cancels.");
  const asked = requests();
  const controllers = asked.map(() => new AbortController());
  const tiles = asked.map((request, index) => {
    const name = asked.length > 1 ? `image ${index + 1}` : "the image";
    const stop = () => controllers[index].abort();
    return new Tile(request, { name }, { stop, open: (item) => gallery.open(item), use, seed: copySeed });
  });
  shown = tiles;
  run = { tiles, controllers, started: performance.now() };
  showError(at("image-error"), null);
  at("tiles").dataset.count = tiles.length;
  at("tiles").replaceChildren(...tiles.map((tile) => tile.element));
  at("run").hidden = false;
  gallery.listAll();
  showEmpty();
  busy(true);
  reveal(at("run"));
  announce(`${counted(tiles.length, "image")} sent.`);
  const timer = setInterval(tick, TICK_MS);
  const sent = Date.now(); // The first image of a run comes first in the gallery.
  const errors = await Promise.all(tiles.map((tile, index) => follow(tile, sent - index, controllers[index].signal)));
  clearInterval(timer);
  finish(errors);
}

/** Follow one image to its end; return the error of a failed one. */
async function follow(tile, created, signal) {
  const { body, prompt } = tile.request;
  try {
    for await (const event of events("v1/images/generations", { body, signal, id: newId() })) {
      if (event.type === PROGRESS) {
        await tile.show(event);
        tick();
      }
      if (event.type !== COMPLETED) continue;
      const item = await gallery.add(decoded(event.b64_json), created, { prompt, seed: tile.request.seed });
      await tile.finish(item);
      learn(item.settings);
      return null;
    }
    throw new RequestError("The connection ended before the image was finished");
  } catch (error) {
    if (signal.aborted) tile.end("cancelled", "Cancelled");
    else tile.end("failed", "Failed");
    if (signal.aborted) return null;
    if (!(error instanceof RequestError)) throw error;
    return error;
  }
}

function tick() {
  const seconds = (performance.now() - run.started) / 1000;
  write(at("run-figures"), `${summary(run.tiles)}, ${Math.floor(seconds)} s`);
  const share = run.tiles.reduce((sum, tile) => sum + tile.progress, 0) / run.tiles.length;
  const quarter = Math.floor(share * ANNOUNCED);
  if (quarter > (run.quarter ?? 0) && quarter < ANNOUNCED) announce(summary(run.tiles));
  run.quarter = quarter;
}

function finish(errors) {
  const { tiles, started } = run;
  const seconds = (performance.now() - started) / 1000;
  const done = tiles.filter((tile) => tile.state === "done").length;
  const error = errors.find(Boolean);
  const text = done ? `${counted(done, "image")} in ${duration(seconds)}` : error ? "Failed" : "Cancelled";
  write(at("run-figures"), text);
  announce(text);
  run = null;
  busy(false);
  if (!error) return;
  at("run").hidden = tiles.every((tile) => tile.state === "failed");
  showEmpty();
  showError(at("image-error"), error);
  reveal(at("image-error"));
}

function busy(isBusy) {
  enable(at("generate"), !isBusy);
  enable(at("cancel"), isBusy);
  at("run").setAttribute("aria-busy", String(isBusy));
}

function use(settings) {
  useSettings(settings);
  toast("The settings are in the form. They make the same image again.");
  form.elements.prompt.focus({ preventScroll: true });
  reveal(form);
}

async function copySeed(settings) {
  const copied = await copyText(settings.seed);
  toast(copied ? `Seed ${settings.seed} copied.` : `The seed is ${settings.seed}.`);
}

/** Take a deleted image off the page. */
function dropped(item) {
  shown.find((tile) => tile.item === item)?.element.remove();
  at("run").hidden = !at("tiles").childElementCount;
}

function showEmpty() {
  at("image-empty").hidden = !at("run").hidden || !gallery.isEmpty;
}

const announce = (text) => write(at("image-live"), text);

function decoded(base64) {
  const text = atob(base64);
  return new Blob([Uint8Array.from(text, (character) => character.charCodeAt(0))], { type: "image/png" });
}
