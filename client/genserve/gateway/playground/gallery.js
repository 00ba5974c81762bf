// Finished images: thumbnails, and a window with one image and its settings.

import { writtenAdapters } from "./adapters.js";
import { at, copyOf, counted, keyed, toast, write } from "./dom.js";
import { newId } from "./api.js";
import { pngSettings } from "./png.js";
import { Shelf } from "./shelf.js";

const SURE_MS = 4000;
const SHOWN = {
  model: "Model",
  seed: "Seed",
  size: "Size",
  steps: "Steps",
  guidance: "Guidance",
  negative_prompt: "Negative prompt",
  true_cfg_scale: "True CFG",
  lora: "LoRA",
  cache: "Cache",
  dtype: "Precision",
};

/** Gallery of this browser's images. */
export class Gallery {
  #shelf = new Shelf();
  #current = new Set();
  #shown = null;
  #actions;

  /**
   * @param {object} actions - Functions: `use` and `seed` get an image's settings, `dropped` gets a deleted image, and
   *   `changed` gets nothing.
   */
  constructor(actions) {
    this.#actions = actions;
  }

  /** Show the images of earlier visits. */
  async start() {
    at("open-file").addEventListener("change", (event) => {
      const [file] = event.target.files;
      if (file) document.dispatchEvent(new CustomEvent("png", { detail: file }));
      event.target.value = "";
    });
    this.#startClear();
    this.#startViewer();
    await this.#shelf.load();
    this.#shelf.items.forEach(addAddress);
    this.#render();
  }

  /** The images that are not on the page elsewhere. */
  get #listed() {
    return this.#shelf.items.filter((item) => !this.#current.has(item.id));
  }

  get isEmpty() {
    return !this.#listed.length;
  }

  /**
   * Keep an image, which the page shows elsewhere for now. Return the item.
   *
   * @param {number} created - Milliseconds since the epoch; the order of the gallery.
   * @param {object} settings - What the file may not say itself.
   */
  async add(blob, created, settings) {
    const found = await pngSettings(blob);
    const item = { id: newId(), created, blob, settings: { ...settings, ...found } };
    this.#current.add(item.id);
    const dropped = await this.#shelf.add(item);
    dropped.forEach((each) => URL.revokeObjectURL(each.url));
    addAddress(item);
    this.#render();
    return item;
  }

  /** List all images: those that were shown elsewhere have gone from there. */
  listAll() {
    this.#current.clear();
    this.#render();
  }

  /** Open an image in the window. */
  open(item) {
    this.#shown = item;
    this.#renderViewer();
    at("viewer").showModal();
    at("viewer-title").focus();
  }

  #render() {
    const items = this.#listed;
    at("gallery").hidden = this.isEmpty;
    const place = this.#shelf.kept ? "kept in this browser" : "gone when this page closes";
    write(at("gallery-figures"), `${counted(items.length, "image")}, ${place}`);
    keyed(at("thumbnails"), items, {
      key: (item) => item.id,
      create: (item) => this.#thumbnail(item),
      update: () => {},
    });
    this.#actions.changed();
  }

  #thumbnail(item) {
    const element = copyOf("thumbnail-template");
    const image = element.querySelector("img");
    image.src = item.url;
    image.alt = item.settings.prompt ?? "An image without a prompt";
    element.querySelector("button").title = `${image.alt}, seed ${item.settings.seed}`;
    element.querySelector("button").addEventListener("click", () => this.open(item));
    return element;
  }

  #startClear() {
    const button = at("clear");
    let timer;
    const ask = (isSure) => {
      button.dataset.sure = String(isSure);
      write(button, isSure ? `Delete ${counted(this.#listed.length, "image")}?` : "Clear");
      clearTimeout(timer);
      if (isSure) timer = setTimeout(() => ask(false), SURE_MS);
    };
    button.addEventListener("click", async () => {
      if (button.dataset.sure !== "true") return ask(true);
      ask(false);
      for (const item of this.#listed) await this.#drop(item);
      this.#render();
      toast("The gallery is empty.");
    });
  }

  async #drop(item) {
    await this.#shelf.remove(item.id);
    this.#actions.dropped(item);
    URL.revokeObjectURL(item.url);
  }

  #startViewer() {
    const viewer = at("viewer");
    const turn = (by) => {
      const items = this.#shelf.items;
      const next = items[items.indexOf(this.#shown) + by];
      if (!next) return;
      this.#shown = next;
      this.#renderViewer();
    };
    at("viewer-close").addEventListener("click", () => viewer.close());
    at("viewer-newer").addEventListener("click", () => turn(-1));
    at("viewer-older").addEventListener("click", () => turn(1));
    at("viewer-seed").addEventListener("click", () => this.#actions.seed(this.#shown.settings));
    at("viewer-use").addEventListener("click", () => {
      viewer.close();
      this.#actions.use(this.#shown.settings);
    });
    at("viewer-delete").addEventListener("click", async () => {
      const items = this.#shelf.items;
      const index = items.indexOf(this.#shown);
      const next = items[index + 1] ?? items[index - 1];
      await this.#drop(this.#shown);
      this.#shown = next;
      if (next) this.#renderViewer();
      else viewer.close();
      this.#render();
    });
    viewer.addEventListener("click", (event) => {
      if (event.target === viewer) viewer.close(); // the backdrop
    });
    viewer.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") turn(-1);
      if (event.key === "ArrowRight") turn(1);
    });
  }

  #renderViewer() {
    const { url, file, settings } = this.#shown;
    const items = this.#shelf.items;
    const index = items.indexOf(this.#shown);
    at("viewer-image").src = url;
    at("viewer-image").alt = settings.prompt ?? "";
    write(at("viewer-title"), settings.prompt ?? "No prompt");
    at("viewer-download").href = url;
    at("viewer-download").download = file;
    at("viewer-newer").disabled = index <= 0;
    at("viewer-older").disabled = index < 0 || index === items.length - 1;
    const values = {
      ...settings,
      size: settings.width && `${settings.width} × ${settings.height}`,
      lora: writtenAdapters(settings.lora ?? []),
      cache: settings.cache || "",
    };
    const rows = Object.entries(SHOWN)
      .filter(([name]) => values[name] !== undefined && values[name] !== "")
      .filter(([name]) => name !== "true_cfg_scale" || settings.negative_prompt);
    at("viewer-settings").replaceChildren(
      ...rows.map(([name, label]) => {
        const row = document.createElement("div");
        const term = document.createElement("dt");
        const value = document.createElement("dd");
        term.textContent = label;
        value.textContent = values[name];
        row.append(term, value);
        return row;
      }),
    );
  }
}

/** Give an item an address to show and a name to save it under. They are not stored. */
function addAddress(item) {
  item.url = URL.createObjectURL(item.blob);
  item.file = `genserve-${item.settings.seed ?? item.id}.png`;
}
