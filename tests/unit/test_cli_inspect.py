"""Output of `genserve load` and `genserve config`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from genserve.cli import main
from genserve.errors import ServerUnavailable
from genserve.protocol import Call, Outputs
from genserve.types import InstanceLoad, Setting

GIB = 2**30
LOADS = [
    InstanceLoad("flux_0_0", "flux", "cuda:0", 0, 3, 12, 31 * GIB, 48 * GIB, 80 * GIB, True),
    InstanceLoad("rerank_0_0", "rerank", "cpu", None, 0, 0, None, None, None, False),
]
SETTINGS = [
    Setting("flux", "max_running", 8, "environment MAX_RUNNING"),
    Setting("flux", "dtype", "bfloat16", "config.pbtxt"),
    Setting("rerank", "prefix_cache", None, "default"),
]

Ask = Callable[..., Result]


class FakeServer:
    """Server with fixed loads and settings."""

    def __init__(self, url: str = "fake", *, is_down: bool = False) -> None:
        self.url = url
        self.is_down = is_down

    def infer(self, call: Call, timeout_s: float) -> Outputs:
        if self.is_down:
            raise ServerUnavailable(f"{self.url} is down")
        records: list[Any] = {b"load": LOADS, b"config": SETTINGS}[call.inputs["ACTION"].item()]
        items = [{name: value for name, value in asdict(record).items() if name != "url"} for record in records]
        return {
            "TASK": np.array([json.dumps(items).encode()], dtype=np.object_),
            "PREVIEW": np.array([b""], dtype=np.object_),
        }

    def close(self) -> None:
        pass


def ask(*arguments: str, server: Any = None) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="genserve", obj=server or FakeServer())


def test_load_prints_a_line_per_instance() -> None:
    result = ask("load")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "flux_0_0    cuda:0  ready      3 running  12 waiting  31.0 GiB used  48.0 of 80.0 GiB free\n"
        "rerank_0_0  cpu     not ready  0 running  0 waiting\n"
    )


def test_config_prints_a_line_per_setting() -> None:
    result = ask("config")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "flux    max_running   8         environment MAX_RUNNING\n"
        "flux    dtype         bfloat16  config.pbtxt\n"
        "rerank  prefix_cache  null      default\n"
    )


@pytest.mark.parametrize(("verb", "records"), [("load", LOADS), ("config", SETTINGS)])
def test_json_has_every_field(verb: str, records: list[Any]) -> None:
    assert json.loads(ask(verb, "--json").stdout) == [{**asdict(record), "url": "fake"} for record in records]


@pytest.mark.parametrize("verb", ["load", "config"])
def test_several_servers_are_told_apart(verb: str) -> None:
    alone = ask(verb).stdout.splitlines()
    both = ask(verb, server=[FakeServer("a"), FakeServer("b")]).stdout.splitlines()
    assert both == ["a", *(f"  {line}" for line in alone), "b", *(f"  {line}" for line in alone)]


@pytest.mark.parametrize("verb", ["load", "config"])
def test_unreachable_server_prints_one_line(verb: str) -> None:
    result = ask(verb, server=FakeServer(is_down=True))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "genserve: ServerUnavailable: fake is down\n"


@pytest.mark.parametrize("verb", ["load", "config"])
def test_one_of_two_servers_is_enough(verb: str) -> None:
    assert ask(verb, server=[FakeServer("a", is_down=True), FakeServer("b")]).stdout == ask(verb).stdout
