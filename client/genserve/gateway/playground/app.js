// The page: tabs, the key, files that are dropped, and Escape.

import { key } from "./api.js";
import { at, toast, write } from "./dom.js";
import { cancelImages, readFile, startImages } from "./images.js";
import { cancelRanking, startRerank } from "./rerank.js";
import { showStatus, startHealth } from "./status.js";

const TABS = ["images", "rerank", "status"];
const CANCEL = { images: cancelImages, rerank: cancelRanking };

const tab = (name) => at(`tab-${name}`);
const current = () => TABS.find((name) => !at(name).hidden);

function select(name) {
  for (const each of TABS) {
    at(each).hidden = each !== name;
    tab(each).setAttribute("aria-selected", String(each === name));
    tab(each).tabIndex = each === name ? 0 : -1;
  }
  showStatus(name === "status");
}

function startTabs() {
  const ofAddress = () => TABS.find((name) => `#${name}` === location.hash) ?? TABS[0];
  for (const name of TABS) {
    tab(name).addEventListener("click", () => {
      history.replaceState(null, "", `#${name}`);
      select(name);
    });
    tab(name).addEventListener("keydown", (event) => {
      const index = TABS.indexOf(name);
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: TABS.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const target = tab(TABS[(next + TABS.length) % TABS.length]);
      target.focus();
      target.click();
    });
  }
  addEventListener("hashchange", () => select(ofAddress()));
  select(ofAddress());
}

function startKey() {
  const show = () => write(at("key-button"), key.get() ? "API key set" : "API key");
  // Once for each key: the status tab goes on to ask the gateway.
  const open = () => at("key").showPopover();
  const ask = () => document.addEventListener("key-refused", open, { once: true });
  const use = (value) => {
    key.set(value);
    ask();
    show();
    at("key").hidePopover();
    toast(value ? "The key is used from now on." : "The key is forgotten.");
  };
  at("key").addEventListener("beforetoggle", () => (at("key-input").value = key.get()));
  at("key").addEventListener("toggle", (event) => event.newState === "open" && at("key-input").focus());
  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    use(at("key-input").value.trim());
  });
  at("key-forget").addEventListener("click", () => use(""));
  ask();
  show();
}

function startFiles() {
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  const show = (isShown) => (at("drop").hidden = !isShown);
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(true);
  });
  addEventListener("dragleave", (event) => event.relatedTarget || show(false));
  addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(false);
    take(event.dataTransfer.files[0]);
  });
  document.addEventListener("png", (event) => take(event.detail));
}

function take(file) {
  if (!file) return;
  tab("images").click();
  readFile(file);
}

addEventListener("keydown", (event) => {
  const isElsewhere = at("viewer").open || at("key").matches(":popover-open");
  if (event.key === "Escape" && !isElsewhere) CANCEL[current()]?.();
});

startTabs();
startKey();
startFiles();
startRerank();
startHealth();
startImages();
