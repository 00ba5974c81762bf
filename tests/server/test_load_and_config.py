"""Load and settings of a real server through plain tritonclient, and `doctor --load` with the demo's checkpoints."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from conftest import PROTOCOLS, ROOT, Server, wait_until

from genserve import Client
from genserve.protocol import instance_loads, settings_in_force
from genserve.types import InstanceLoad, Setting
from genserve_backend.settings import FluxSettings, RerankSettings


def ask(server: Server, action: str, protocol: str = "grpc") -> list[dict[str, Any]]:
    """Return the TASK of an answer of `tasks`, without the package's own client."""
    module = triton_grpc if protocol == "grpc" else triton_http
    tensor = module.InferInput("ACTION", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([action.encode()], dtype=np.object_))
    with module.InferenceServerClient(f"localhost:{server.ports[protocol == 'grpc']}") as client:
        answer = client.infer("tasks", [tensor])
    assert answer.as_numpy("PREVIEW")[0] == b""
    listed: list[dict[str, Any]] = json.loads(answer.as_numpy("TASK")[0])
    return listed


def names_of(kind: type[InstanceLoad] | type[Setting]) -> set[str]:
    """Return the fields of an answer: those of the client's class, except the one that the client adds."""
    return {field.name for field in fields(kind)} - {"url"}


def load_of(server: Server, instance: str) -> dict[str, Any]:
    (load,) = [load for load in ask(server, "load") if load["instance"] == instance]
    return load


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_load_lists_every_instance_with_its_memory(protocol: str, server: Server) -> None:
    wait_until(lambda: all(load["memory_used"] for load in ask(server, "load")), what="a heartbeat of every worker")
    loads = {load["instance"]: load for load in ask(server, "load", protocol)}
    assert list(loads) == ["flux_0_0", "rerank_0_0"]
    for instance, load in loads.items():
        assert load.keys() == names_of(InstanceLoad)
        assert (load["model"], load["device"], load["gpu_id"]) == (instance.partition("_")[0], "cpu", None)
        assert (load["running"], load["waiting"], load["ready"]) == (0, 0, True)
        resident = server.worker(load["model"]).memory_info().rss
        assert load["memory_used"] == pytest.approx(resident, rel=0.5)
        assert load["memory_total"] == pytest.approx(psutil.virtual_memory().total, rel=0.01)
        assert 0 < load["memory_free"] < load["memory_total"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_config_lists_every_setting_with_its_source(protocol: str, server: Server) -> None:
    settings = ask(server, "config", protocol)
    assert all(setting.keys() == names_of(Setting) for setting in settings)
    names = [(setting["model"], setting["name"]) for setting in settings]
    expected = {"flux": FluxSettings, "rerank": RerankSettings}
    assert names == [(model, name) for model, kind in expected.items() for name in kind.model_fields]
    found = {(setting["model"], setting["name"]): (setting["value"], setting["source"]) for setting in settings}
    assert found["flux", "model_path"] == (str(ROOT / "demo" / "flux"), "environment FLUX_MODEL_PATH")
    assert found["rerank", "score_cache_bytes"] == (0, "environment SCORE_CACHE_BYTES")
    assert found["flux", "max_running"] == (16, "default")
    assert found["rerank", "max_num_seqs"] == (256, "default")


def test_answers_are_those_that_the_client_parses(server: Server) -> None:
    def outputs(action: str) -> dict[str, Any]:
        return {"TASK": np.array([json.dumps(ask(server, action)).encode()], dtype=np.object_)}

    assert {load.instance for load in instance_loads(outputs("load"))} == {"flux_0_0", "rerank_0_0"}
    assert {setting.model for setting in settings_in_force(outputs("config"))} == {"flux", "rerank"}


def test_task_in_flight_counts_where_it_runs(server: Server) -> None:
    with Client(server.grpc, timeout=120) as client, ThreadPoolExecutor(1) as pool:
        made = pool.submit(client.generate, "a long one", steps=100, height=256, width=256, task_id="counted")
        wait_until(lambda: load_of(server, "flux_0_0")["running"] == 1, what="the task to run")
        assert load_of(server, "rerank_0_0")["running"] == 0
        client.cancel("counted")
        assert made.exception() is not None
    wait_until(lambda: load_of(server, "flux_0_0")["running"] == 0, what="the task to end")


def test_instance_is_listed_as_not_ready_while_its_worker_is_replaced(server: Server) -> None:
    server.worker("rerank").kill()
    wait_until(lambda: not load_of(server, "rerank_0_0")["ready"], what="the instance to be not ready")
    assert load_of(server, "rerank_0_0")["memory_used"] is None
    assert load_of(server, "flux_0_0")["ready"]
    wait_until(lambda: load_of(server, "rerank_0_0")["ready"], what="another worker")


def test_every_instance_of_a_model_is_listed(pair: Server) -> None:
    assert [load["instance"] for load in ask(pair, "load")] == ["flux_0_0", "flux_0_1"]
    settings = ask(pair, "config")
    assert {setting["model"] for setting in settings} == {"flux"}
    assert len(settings) == len(FluxSettings.model_fields)


def test_doctor_loads_the_demo_checkpoints(server: Server) -> None:
    checked = server.command("doctor", "--load", "--json", "--http-port", str(server.http_port))
    assert checked.returncode == 0, checked.stdout
    assert checked.stderr == ""
    findings = json.loads(checked.stdout)
    tried = {finding["subject"]: finding["detail"] for finding in findings if "loaded on" in finding["detail"]}
    assert tried.keys() == {"flux", "rerank"}
    assert "an image of 64 x 64 pixels" in tried["flux"]
    assert "a score took" in tried["rerank"]
    assert all("peak memory" in detail for detail in tried.values())
