// Images kept in this browser: a bounded IndexedDB store.

const NAME = "genserve";
const STORE = "images";
const MAX_IMAGES = 60;
const MAX_BYTES = 128 * 2 ** 20;

let opened;

const newestFirst = (one, other) => other.created - one.created;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const transaction = (await database()).transaction(STORE, mode);
  const request = work(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** Images `{id, created, blob, settings}`, the newest first. Without a database they live as long as the page. */
export class Shelf {
  items = [];
  kept = true;

  /** Load the images of earlier visits. */
  async load() {
    try {
      const items = await run("readonly", (store) => store.getAll());
      this.items = items.filter((item) => item.blob instanceof Blob).sort(newestFirst);
    } catch {
      this.kept = false; // as in some private windows
    }
  }

  /** Add an image; drop the oldest ones beyond the limits, and return them. */
  async add(item) {
    this.items.push(item);
    this.items.sort(newestFirst);
    await this.#store((store) => store.put(item));
    let size = 0;
    const over = this.items.filter((each, index) => (size += each.blob.size) > MAX_BYTES || index >= MAX_IMAGES);
    for (const each of over) await this.remove(each.id);
    return over;
  }

  /** Remove an image. */
  async remove(id) {
    this.items = this.items.filter((each) => each.id !== id);
    await this.#store((store) => store.delete(id));
  }

  async #store(work) {
    if (!this.kept) return;
    try {
      await run("readwrite", work);
    } catch {
      this.kept = false; // no room left
    }
  }
}
