// One image on its way, and when it is finished.

import { copyOf, counted, write } from "./dom.js";

const PERCENT = 100;

/** Tile of one image. Its size is fixed from the start: nothing moves while previews arrive. */
export class Tile {
  /**
   * @param {object} request - The image's request, with its seed and shape.
   * @param {object} labels - `name` for its buttons, as "image 2".
   * @param {object} actions - Functions `stop`, `open`, `use` and `seed`.
   */
  constructor(request, { name }, actions) {
    this.element = copyOf("tile-template");
    this.request = request;
    this.progress = 0;
    const find = (selector) => this.element.querySelector(selector);
    this.parts = {
      preview: find(".preview"),
      open: find(".open"),
      final: find(".final"),
      message: find(".message"),
      bar: find("progress"),
      stop: find(".stop"),
      state: find(".state"),
      download: find(".download"),
    };
    find(".frame").style.aspectRatio = `${request.shape.width} / ${request.shape.height}`;
    this.parts.bar.setAttribute("aria-label", `Progress of ${name}`);
    this.parts.stop.setAttribute("aria-label", `Cancel ${name}`);
    this.parts.stop.addEventListener("click", actions.stop);
    this.parts.open.addEventListener("click", () => actions.open(this.item));
    find(".use").addEventListener("click", () => actions.use(this.item.settings));
    find(".seed").addEventListener("click", () => actions.seed(this.item.settings));
    this.#mark("waiting", "Sent");
  }

  get state() {
    return this.element.dataset.state;
  }

  /** Show a progress event: place in the queue, step and preview. */
  async show(event) {
    if (event.state === "waiting") {
      this.#mark("waiting", waiting(event.queue_position));
      return;
    }
    if (event.state !== "running") return;
    this.progress = event.steps ? event.step / event.steps : 0;
    this.parts.bar.value = this.progress;
    const isVisible = event.preview_b64 || !this.parts.preview.hidden;
    this.#mark("running", isVisible ? "" : "Starting", `Step ${event.step} of ${event.steps}`);
    if (event.preview_b64) await this.#preview(`data:image/jpeg;base64,${event.preview_b64}`);
  }

  /** Show the finished image. */
  async finish(item) {
    this.item = item;
    const { final, open, download, bar } = this.parts;
    const { seed, steps, width, height, prompt } = item.settings;
    final.src = item.url;
    final.alt = prompt ?? "";
    await final.decode().catch(() => {});
    open.hidden = false;
    open.setAttribute("aria-label", `Open image: ${prompt ?? ""}`);
    download.href = item.url;
    download.download = item.file;
    this.progress = 1;
    bar.value = 1;
    const facts = [`Seed ${seed}`, steps && counted(steps, "step"), width && `${width} × ${height}`];
    this.#mark("done", "", facts.filter(Boolean).join(", "));
  }

  /** Show that there is no image, and why. */
  end(state, message) {
    this.#mark(state, message, state === "cancelled" ? this.parts.state.textContent : `Seed ${this.request.seed}`);
  }

  async #preview(source) {
    const next = new Image();
    next.src = source;
    await next.decode().catch(() => {});
    if (this.state !== "running") return;
    this.parts.preview.src = source;
    this.parts.preview.hidden = false;
  }

  #mark(state, message, caption = `Seed ${this.request.seed}`) {
    this.element.dataset.state = state;
    write(this.parts.message, message);
    write(this.parts.state, caption);
  }
}

function waiting(place) {
  if (place === undefined || place === null) return "Waiting in the queue";
  if (place <= 1) return "Next in the queue";
  return `Number ${place} in the queue`;
}

/** Return the progress of several tiles as one sentence. */
export function summary(tiles) {
  const done = tiles.filter((tile) => tile.state === "done").length;
  const running = tiles.filter((tile) => tile.state === "running");
  if (tiles.length === 1) return running.length ? running[0].parts.state.textContent : "Waiting";
  const share = tiles.reduce((sum, tile) => sum + tile.progress, 0) / tiles.length;
  return `${done} of ${tiles.length} done, ${Math.floor(share * PERCENT)}%`;
}
