"""Qwen3-Reranker's true shapes with random weights, through the engine and sentence-transformers, on one device.

Random weights take as long as trained ones, so a GPU without the checkpoint can still be measured: pairs per second of
requests with 100 documents of 200 tokens, 16 at a time, and the share of the device's own rate of matrix products. The
checkpoint is written to a temporary folder (1 GB for 0.6B, 8 GB for 4B) with the demo's tokenizer. The tiny shape is
for trying it.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from compare_rerank import SOURCE
from genserve_backend.rerank.load import build
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.prompts import DEFAULT_INSTRUCTION, PREFIX, SUFFIX
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.engine import BEAT_S
from genserve_backend.worker.messages import Beat, Done, Event, Failed, Submit
from rerank_load import CHAT_WORDS, Load, Request, draw_load
from stopwatch import timed

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""As in the published configurations, but for the vocabulary, on whose size no score's time depends."""
PROMISE = 2.0
"""Pairs per second of the engine, at least so many times sentence-transformers'."""
NEVER_S = 3600.0


def write_checkpoint(shape: str, folder: Path, device: str, dtype: torch.dtype) -> int:
    """Random weights, drawn on the device; how many of them are in matrices that every token is multiplied by."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    tokenizer.add_tokens(list(CHAT_WORDS))
    config = Qwen3Config(
        **SHAPES[shape],
        vocab_size=len(tokenizer),
        num_key_value_heads=min(8, SHAPES[shape]["num_attention_heads"]),
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)


class Engine:
    """The engine, in a thread of its own."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        settings = RerankSettings.model_validate({"model_path": folder, "dtype": dtype, "score_cache_bytes": 0})
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._jobs = 0
        self._tokens = 0.0
        engine = build(settings, device, self._events.put)
        self._submit = engine.submit
        threading.Thread(target=engine.run, daemon=True).start()

    def __call__(self, load: Load) -> None:
        """Score all requests at once."""
        for request in load.requests:
            self._jobs += 1
            asked = RerankRequest(request.query, request.documents, None)
            self._submit(Submit(self._jobs, str(self._jobs), asked, time.monotonic() + NEVER_S))
        count = len(load.requests)
        while count:
            event = self._events.get()
            if isinstance(event, Failed):
                raise event.error
            self._note(event)
            count -= isinstance(event, Done)

    def tokens_read(self) -> float:
        """By all forwards; the engine tells once a second."""
        time.sleep(2.5 * BEAT_S)
        while not self._events.empty():
            self._note(self._events.get())
        return self._tokens

    def _note(self, event: Event) -> None:
        if isinstance(event, Beat):
            self._tokens += event.counts.get("tokens", 0)


def cross_encoder(folder: Path, device: str, dtype: torch.dtype) -> Callable[[Load], None]:
    """sentence-transformers, one call a request, with the same prompts and the same layers."""
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        click.echo("full_size_rerank: pip install sentence-transformers", err=True)
        sys.exit(1)
    model: Any = CrossEncoder(str(folder), device=device, num_labels=1, model_kwargs={"dtype": dtype})

    def pairs(request: Request) -> list[tuple[str, str]]:
        head = f"{PREFIX}<Instruct>: {DEFAULT_INSTRUCTION}\n<Query>: {request.query}\n<Document>: "
        return [(head, document + SUFFIX) for document in request.documents]

    def call(load: Load) -> None:
        for request in load.requests:
            model.predict(pairs(request), batch_size=len(request.documents), show_progress_bar=False)

    return call


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """What the device reaches on large matrices, FLOP/s."""
    width = 8192 if device.startswith("cuda") else 2048
    one, other = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            one @ other
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return 10 * 2 * width**3 / timed(multiply, 3)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), default=("0.6B", "4B"))
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--requests", type=click.IntRange(min=1), default=16, show_default=True, help="All at once.")
@click.option("--documents", type=click.IntRange(min=1), default=100, show_default=True, help="Of each request.")
@click.option("--tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Of each document.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--check", is_flag=True, help=f"Fail below {PROMISE} times sentence-transformers.")
def main(
    shapes: tuple[str, ...],
    device: str,
    dtype: str,
    requests: int,
    documents: int,
    tokens: int,
    repeats: int,
    check: bool,
) -> None:
    """Measure pairs per second through the engine and through sentence-transformers."""
    arithmetic: torch.dtype = getattr(torch, dtype)
    rate = matrix_rate(device, arithmetic)
    table = Table("Shape", "Engine, pairs/s", "sentence-transformers, pairs/s", "Engine is", "Of the matrix rate")
    ratios = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="genserve-full-size-") as temporary:
            folder = Path(temporary)
            weights = write_checkpoint(shape, folder, device, arithmetic)
            load = draw_load(folder, requests=requests, documents=documents, tokens=(tokens, tokens))
            engine = Engine(folder, device, dtype)
            ours = timed(partial(engine, load), repeats)
            share = 2 * weights * engine.tokens_read() / (repeats + 1) / ours / rate
            other = cross_encoder(folder, device, arithmetic)
            theirs = timed(partial(other, load), repeats)
        ratios.append(theirs / ours)
        speeds = (f"{load.pairs / seconds:.1f}" for seconds in (ours, theirs))
        table.add_row(shape, *speeds, f"{theirs / ours:.2f} x", f"{share:.0%}")
    console = Console()
    console.width = max(console.width, 110)
    console.print(f"{requests} requests at once, {documents} documents of {tokens} tokens, {dtype}, {device}")
    console.print(
        f"large matrices: {rate / 1e12:.1f} TFLOP/s; the share is of tokens times weights, attention not counted"
    )
    console.print(table)
    if check and min(ratios) < PROMISE:
        click.echo(f"{min(ratios):.2f} times sentence-transformers, promised {PROMISE}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
