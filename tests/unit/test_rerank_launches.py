"""Kernel launches of a forward with Qwen3-Reranker-0.6B's shape, counted on torch's meta device.

Each operator that is no view and no allocation counts as one launch. `rms_norm`, `linear` and FlashAttention are one
kernel each on a GPU.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3Model

from genserve_backend.rerank import varlen
from genserve_backend.rerank.decoder import PackedDecoder
from genserve_backend.rerank.packing import prepare_packing
from genserve_backend.rerank.prefix import Prefix, PrefixCache
from genserve_backend.rerank.prefix_store import PrefixStore, Shape
from genserve_backend.rerank.scorers.layouts import Packed, TokenSequence

META = torch.device("meta")
LAYERS = 28
QUERY = Prefix(tuple(range(80)), Prefix(tuple(range(60))))
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "set_"}


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        returned = func._schema.returns
        is_view = bool(returned) and all(each.alias_info and not each.alias_info.is_write for each in returned)
        if not is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator in place of each of the kernels that the meta device lacks."""
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda states, *_: states.contiguous().neg())
    monkeypatch.setattr(varlen, "serves", lambda query: True)
    monkeypatch.setattr(varlen, "attend", lambda query, key, value, **_: query.transpose(1, 2).neg())


def model() -> Qwen3Model:
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=1000,
        dtype=torch.bfloat16,
    )
    with META:
        made = Qwen3Model(config).to(torch.bfloat16)
    made.rotary_emb.to(META)
    return made


def launches(decoder: Any, *, prefix: bool) -> tuple[int, int]:
    """Return the launches of a forward that computes its prefixes, and of the next one, which has them cached."""
    shape = Shape.of(decoder.config, torch.bfloat16)
    cache, store = PrefixCache(slots=1000), PrefixStore(shape, slots=1000, device=META)
    ids = [*range(80), *range(200)]
    batch = [TokenSequence(ids, [], 0, prefix=QUERY if prefix else None) for _ in range(8)]
    found = []
    for _ in range(2):
        counted = Launches()
        with counted, torch.no_grad():
            plan = cache.plan([sequence.prefix for sequence in batch])
            lengths = [*(each.length for each in batch), *(len(entry.prefix.new_ids) for entry in plan.missing)]
            layout = Packed(
                batch,
                last=True,
                plan=plan,
                placed=store.place(plan, lengths),
                first_position=0,
                one_position=True,
                types=False,
                device=META,
            )
            decoder(**layout.inputs, use_cache=False)
        found.append(counted.counts.total())
    return found[0], found[1]


@pytest.mark.parametrize(("prefix", "per_layer"), [(True, 19), (False, 18)], ids=["prefix", "no prefix"])
def test_decoder_launches_a_third_of_the_kernels(prefix: bool, per_layer: int) -> None:
    plain = model()
    prepare_packing(plain, one_position=True)
    before = launches(plain, prefix=prefix)[1]
    after = launches(PackedDecoder(model()), prefix=prefix)[1]
    print(f"launches per forward: transformers' layers {before}, decoder {after}")
    assert after <= LAYERS * per_layer + 30
    assert after < 0.4 * before


def test_missing_prefixes_cost_one_launch_per_layer() -> None:
    missing, cached = launches(PackedDecoder(model()), prefix=True)
    assert missing - cached <= LAYERS + 5


def test_prefixes_of_a_layer_are_gathered_by_one_operator() -> None:
    counted = Launches()
    shape = SimpleNamespace(num_key_value_heads=2, num_attention_heads=2, head_dim=8, num_hidden_layers=2)
    store = PrefixStore(Shape.of(shape, torch.bfloat16), slots=100, device=META)
    plan = PrefixCache(slots=100).plan([QUERY, None])
    placed = store.place(plan, [3, 4, 60, 20])
    assert placed is not None
    rows = placed.on_device(*(torch.from_numpy(each).to(META) for each in placed.index_arrays))
    cached = PrefixCache(slots=100)
    cached.plan([QUERY])
    again = store.place(cached.plan([QUERY, QUERY, None]), [3, 2, 4])
    assert again is not None
    rows = again.on_device(*(torch.from_numpy(each).to(META) for each in again.index_arrays))
    with counted:
        gathered = rows.gather(1)
    assert gathered.shape == (80 + 3 + 80 + 2 + 4, 2, 2, 8)
    assert counted.counts == {"index_select": 1}
