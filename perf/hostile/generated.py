"""Requests that schemathesis generates from the gateway's OpenAPI document: valid ones, and ones that break a rule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from hostile.attack import Attack, request

BODIES_SHARE = 0.9
"""Share of the requests with a body: most of what can go wrong is there."""
LATIN = "latin-1"
"""Encoding of headers."""
PREPARED = ("method", "url", "headers", "params", "json", "data")
OWN_HEADERS = frozenset({"accept-encoding", "connection", "content-length", "host", "user-agent"})
"""Headers that the attack itself has, or that say nothing."""


def generated(document: dict[str, Any], count: int, *, seed: int) -> Iterator[Attack]:
    """Yield about `count` requests, equally many of each operation and kind; most of them have a body.

    Args:
        document: The OpenAPI document.
        count: Number of requests.
        seed: Seed of the generation.
    """
    found = schemathesis.openapi.from_dict(document).get_all_operations()
    operations = [each.ok() for each in found if isinstance(each, Ok)]
    bodies = [each for each in operations if each.method == "post"]
    others = [each for each in operations if each.method != "post"]
    for chosen, share in ((bodies, BODIES_SHARE), (others, 1 - BODIES_SHARE)):
        each = math.ceil(count * share / len(chosen) / len(GenerationMode))
        for operation in chosen:
            for mode in GenerationMode:
                yield from _cases(operation.as_strategy(generation_mode=mode), each, seed)


def _cases(strategy: SearchStrategy[Any], count: int, seed: int) -> list[Attack]:
    found: list[Attack] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def collect(case: Any) -> None:
        with contextlib.suppress(UnicodeError, requests.RequestException):  # cannot be sent at all
            found.append(_attack(case))

    with contextlib.suppress(Unsatisfiable):  # nothing about this operation can be broken
        collect()
    return found


def _attack(case: schemathesis.Case[Any]) -> Attack:
    arguments = case.as_transport_kwargs(base_url="http://gateway")
    prepared = requests.Request(**{name: arguments[name] for name in PREPARED if name in arguments}).prepare()
    body = prepared.body or b""
    headers = [
        (name.encode(LATIN), value if isinstance(value, bytes) else value.encode(LATIN))
        for name, value in prepared.headers.items()
        if name.lower() not in OWN_HEADERS
    ]
    sent = request(
        (prepared.method or "GET").encode(),
        prepared.path_url.encode(),
        body if isinstance(body, bytes) else body.encode(),
        headers=headers,
    )
    return Attack(f"generated {case.operation.label}", (sent,))
