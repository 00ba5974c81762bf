// The rerank tab.

import { ask } from "./api.js";
import { at, copyOf, counted, duration, reveal, showError, write } from "./dom.js";
import { changed, enable, fill, isEnabled, remember } from "./forms.js";

const EXAMPLE = {
  query: "What is the capital of France?",
  documents: [
    "Berlin is the capital of Germany.",
    "Paris is the capital and largest city of France.",
    "The Eiffel Tower was finished in 1889 and stands in Paris.",
    "France is famous for its cheese and wine.",
    "A capital letter begins a sentence.",
    "The Seine flows through the north of France.",
  ].join("\n"),
  instruction: "",
};
const DIGITS = 4;

const form = at("rerank-form");
let controller = null;

/** Start the tab. */
export function startRerank() {
  remember(form, "genserve.rerank");
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    rank();
  });
  form.elements.documents.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  at("rank-cancel").addEventListener("click", cancelRanking);
  at("rerank-example").addEventListener("click", () => {
    for (const [name, value] of Object.entries(EXAMPLE)) fill(form, name, value);
    changed(form);
    form.requestSubmit();
  });
  show();
}

/** Stop the ranking; return whether there was one. */
export function cancelRanking() {
  if (!controller || !isEnabled(at("rank-cancel"))) return false;
  controller.abort();
  return true;
}

async function rank() {
  const documents = lines();
  if (controller || !documents.length) return;
  controller = new AbortController();
  busy(true);
  showError(at("rerank-error"), null);
  const started = performance.now();
  try {
    const body = { query: form.elements.query.value, documents };
    if (form.elements.instruction.value) body.instruction = form.elements.instruction.value;
    const answer = await ask("v2/rerank", { body: JSON.stringify(body), signal: controller.signal });
    render(answer, documents, (performance.now() - started) / 1000);
  } catch (error) {
    if (!controller.signal.aborted) showError(at("rerank-error"), error);
  } finally {
    controller = null;
    busy(false);
  }
}

function render(answer, documents, seconds) {
  const tokens = answer.usage?.total_tokens;
  const figures = [counted(documents.length, "document"), tokens && counted(tokens, "token"), duration(seconds)];
  write(at("ranking-figures"), figures.filter(Boolean).join(", "));
  at("ranked").replaceChildren(
    ...answer.results.map(({ index, relevance_score: score }) => {
      const element = copyOf("ranked-template");
      element.querySelector(".score").textContent = score.toFixed(DIGITS);
      element.querySelector(".text").textContent = documents[index];
      element.querySelector(".fill").style.setProperty("--share", score);
      return element;
    }),
  );
  at("rerank-empty").hidden = true;
  at("ranking").hidden = false;
  reveal(at("ranking"));
}

function busy(isBusy) {
  enable(at("rank"), !isBusy);
  enable(at("rank-cancel"), isBusy);
  at("ranking").setAttribute("aria-busy", String(isBusy));
}

function show() {
  const count = lines().length;
  write(at("rank"), count ? `Rank ${counted(count, "document")}` : "Rank documents");
  write(at("document-count"), count ? counted(count, "document") : "No documents");
}

function lines() {
  const all = form.elements.documents.value.split("\n").map((line) => line.trim());
  return all.filter(Boolean);
}
