"""The changes that `genserve tune` tries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_serve_repository import SHIPPED, make_rerank, write_random_flux

from genserve.tune.load import image_load, rerank_load
from genserve.tune.run import demand_of, look_at
from genserve.tune.search import Change
from genserve.tune.space import LOSSLESS, LOSSY, Demand, Machine, Space, set_values, tuned
from genserve.tune.start import Start, variables
from genserve.types import InstanceLoad

GIB = 2**30
CPU = Machine("cpu", cores=4, default_threads=4, instance_bytes=GIB, total_bytes=16 * GIB, has_int8=True)
GPU = Machine("cuda:0", cores=16, default_threads=16, instance_bytes=30 * GIB, total_bytes=80 * GIB, capability=(9, 0))
MANY = Demand(requests=64, items=10_000, tokens=10_000_000, sizes=2)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "FLUX_MODEL_PATH": str(write_random_flux(tmp_path / "flux")),
        "RERANK_MODEL_PATH": str(make_rerank(tmp_path / "rerank")),
    }


@pytest.fixture
def offered(environment: dict[str, str]) -> Any:
    def changes(
        model: str, machine: Machine = CPU, demand: Demand = MANY, *, lossy: bool = False, **values: str
    ) -> list[Change]:
        names = tuned(model, lossy=lossy)
        given = {**environment, **values}
        start = Start(given, SHIPPED)
        before = set_values(model, given, lossy=lossy)
        space = Space(
            model, lambda each: start.settings(model, each, names), machine, demand, before=before, lossy=lossy
        )
        return space.changes(before)

    return changes


def tried(changes: list[Change]) -> list[dict[str, str | None]]:
    return [dict(change.variables) for change in changes if not change.refused]


def test_defaults_of_settings_in_force_come_first(offered: Any) -> None:
    changes = tried(offered("rerank", RERANK_THREADS="1", MAX_NUM_BATCHED_TOKENS="64"))
    assert changes[:2] == [{"RERANK_THREADS": None}, {"MAX_NUM_BATCHED_TOKENS": None}]


def test_instances_share_the_cores(offered: Any) -> None:
    changes = tried(offered("flux"))
    assert [change for change in changes if "FLUX_WORKERS" in change] == [
        {"FLUX_WORKERS": "2", "FLUX_THREADS": "2"},
        {"FLUX_WORKERS": "4", "FLUX_THREADS": "1"},
    ]
    from_two = tried(offered("flux", FLUX_WORKERS="2", FLUX_THREADS="4"))
    assert {"FLUX_WORKERS": "2", "FLUX_THREADS": "2"} in from_two
    assert {"FLUX_WORKERS": None, "FLUX_THREADS": None} in from_two


def test_limits_have_neighbours_until_the_load_does_not_reach_them(offered: Any) -> None:
    assert [change for change in tried(offered("rerank")) if "MAX_NUM_BATCHED_TOKENS" in change] == [
        {"MAX_NUM_BATCHED_TOKENS": value} for value in ("2048", "512", "4096")
    ]
    small = tried(offered("rerank", demand=Demand(1, 10, 600)))
    assert [change for change in small if "MAX_NUM_BATCHED_TOKENS" in change] == [{"MAX_NUM_BATCHED_TOKENS": "512"}]
    assert not [change for change in small if "MAX_NUM_SEQS" in change]
    unknown = tried(offered("rerank", demand=Demand(None, None, None)))
    assert {"MAX_NUM_SEQS": "1024"} in unknown


def test_neighbour_that_is_the_default_is_named_so(offered: Any) -> None:
    changes = tried(offered("flux", FLUX_MAX_RUNNING="8"))
    assert changes.count({"FLUX_MAX_RUNNING": None}) == 2  # the second one is not tried again
    assert {"FLUX_MAX_RUNNING": "16"} not in changes


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_lossy_settings_need_the_option(model: str, offered: Any) -> None:
    def names(*, lossy: bool) -> set[str]:
        return {name for change in offered(model, lossy=lossy) for name in change.variables}

    assert names(lossy=False) <= set(LOSSLESS[model])
    assert names(lossy=True) >= set(LOSSY[model])


def test_lossy_settings_in_force_are_left_alone(offered: Any) -> None:
    changes = offered("rerank", RERANK_DTYPE="bfloat16")
    assert not [change for change in changes if "RERANK_DTYPE" in change.variables]
    assert {"RERANK_DTYPE": None} in tried(offered("rerank", lossy=True, RERANK_DTYPE="bfloat16"))


def refusals(changes: list[Change], name: str) -> dict[str | None, str | None]:
    return {change.variables[name]: change.refused for change in changes if name in change.variables}


def test_dtypes_that_the_device_lacks_are_refused(offered: Any) -> None:
    old = Machine("cpu", cores=4, default_threads=4, has_int8=False)
    assert "VNNI" in str(refusals(offered("flux", old, lossy=True), "FLUX_DTYPE")["int8"])
    assert "VNNI" in str(refusals(offered("rerank", old, lossy=True), "RERANK_DTYPE")["int8"])
    assert refusals(offered("flux", old, lossy=True), "FLUX_DTYPE")["bfloat16"] is None
    assert refusals(offered("flux", GPU, lossy=True), "FLUX_DTYPE") == {"fp8": None}
    ampere = Machine("cuda:0", cores=16, default_threads=16, capability=(8, 0))
    assert "capability 8.9" in str(refusals(offered("flux", ampere, lossy=True), "FLUX_DTYPE")["fp8"])


def test_memory_and_the_compiler_limit_the_changes(offered: Any) -> None:
    workers = refusals(offered("flux", GPU), "FLUX_WORKERS")
    assert workers["2"] is None
    assert workers["4"] == "4 instances need about 120.0 GiB, and the device has 80.0 GiB"
    bare = Machine("cpu", cores=4, default_threads=4, has_compiler=False)
    assert refusals(offered("rerank", bare), "RERANK_COMPILE") == {"true": "there is no C or C++ compiler"}


def test_settings_that_exclude_each_other_are_not_offered(offered: Any) -> None:
    assert {"FLUX_COMPILE": "true"} in tried(offered("flux"))
    assert {"FLUX_COMPILE": "true"} not in tried(offered("flux", FLUX_OFFLOAD="blocks"))
    assert {"RERANK_COMPILE": "true"} not in tried(offered("rerank", RERANK_DTYPE="int8"))


def test_padding_is_tried_for_several_sizes_only(offered: Any) -> None:
    assert {"FLUX_MAX_PADDING": "1"} in tried(offered("flux", lossy=True))
    one = Demand(requests=64, items=64, tokens=10**6, sizes=1)
    assert "FLUX_MAX_PADDING" not in {name for each in tried(offered("flux", CPU, one, lossy=True)) for name in each}


def test_vllm_keeps_its_own_instances(offered: Any) -> None:
    names = {name for change in tried(offered("rerank", GPU, ENGINE="vllm")) for name in change}
    assert names == {"MAX_NUM_BATCHED_TOKENS", "MAX_NUM_SEQS"}


def test_tuned_variables_are_settings() -> None:
    for model in LOSSLESS:
        assert set(tuned(model, lossy=True)) <= set(variables(model))


def test_demand_follows_from_the_load() -> None:
    images = demand_of(image_load(in_flight=4, sizes=[(64, 64), (128, 64)], steps=1), 1024)
    assert images == Demand(4, 4, 2 * (16 + 32), 2)
    assert demand_of(image_load(in_flight=2, sizes=[], steps=1), 1024).tokens == 2 * 4096
    rankings = demand_of(rerank_load(in_flight=3, documents=5, length=10), 0)
    assert (rankings.requests, rankings.items) == (3, 15)
    assert demand_of(image_load(in_flight=4, sizes=[], steps=1, rate=2.0), 1024) == Demand(None, None, None, 1)


def test_machine_follows_from_the_first_server(tmp_path: Path) -> None:
    loads = [
        InstanceLoad(f"flux_0_{index}", "flux", "cpu", None, 0, 0, used, 8 * GIB, 16 * GIB, ready=True)
        for index, used in enumerate((GIB, 2 * GIB))
    ]
    machine = look_at(loads, Start({"OMP_NUM_THREADS": "1"}, tmp_path), dtypes=False)
    assert (machine.device, machine.default_threads) == ("cpu", 1)
    assert (machine.instance_bytes, machine.total_bytes) == (2 * GIB, 16 * GIB)
    assert look_at(loads, Start({}, tmp_path), dtypes=False).default_threads == machine.cores
