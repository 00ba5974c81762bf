"""The contract's tensors: arguments to inputs, outputs to results. Shared by every kind of client."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from genserve.errors import InvalidInput, ServerError
from genserve.types import GeneratedImage, RankedDocument

PRIORITIES = {"high": 1, "normal": 2, "low": 3}
"""Triton's levels; 1 is served first."""

DTYPES = {
    "PROMPT": "BYTES",
    "NEGATIVE_PROMPT": "BYTES",
    "TRUE_CFG_SCALE": "FP32",
    "HEIGHT": "INT32",
    "WIDTH": "INT32",
    "STEPS": "INT32",
    "GUIDANCE": "FP32",
    "SEED": "INT64",
    "LORA": "BYTES",
    "FORMAT": "BYTES",
    "ENCODING": "BYTES",
    "TASK_ID": "BYTES",
    "QUERY": "BYTES",
    "DOCUMENTS": "BYTES",
    "INSTRUCTION": "BYTES",
    "WINDOWS": "INT32",
    "ACTION": "BYTES",
}
NUMPY = {"BYTES": np.object_, "FP32": np.float32, "INT32": np.int32, "INT64": np.int64}


@dataclass(frozen=True)
class Call:
    """One inference request, whatever it travels over.

    Attributes:
        inputs: Tensor name to array.
        outputs: Names of the tensors wanted.
        priority: Triton's level, 1 to 3.
        queue_timeout_s: Seconds that it may wait in the server's queue, or None for the server's own limit.
        request_id: Identifies it in the server's log.
    """

    model: str
    inputs: dict[str, npt.NDArray[Any]]
    outputs: tuple[str, ...]
    priority: int = PRIORITIES["normal"]
    queue_timeout_s: float | None = None
    request_id: str = field(default="")

    @property
    def queue_timeout_us(self) -> int | None:
        """The same in Triton's unit."""
        return None if self.queue_timeout_s is None else max(1, round(self.queue_timeout_s * 1e6))


Outputs = dict[str, npt.NDArray[Any]]


def generate_call(
    prompt: str,
    *,
    priority: str,
    timeout: float | None,
    task_id: str,
    lora: Sequence[dict[str, Any]],
    **settings: Any,
) -> Call:
    """A `flux` request for one image; settings that are None keep the server's defaults."""
    values: dict[str, Any] = {"PROMPT": prompt, "TASK_ID": task_id}
    values |= {name.upper(): value for name, value in settings.items() if value is not None}
    if lora:
        values["LORA"] = _lora(lora)
    return Call(
        "flux",
        {name: _array(name, [value], (1, 1)) for name, value in values.items()},
        ("IMAGE", "SEED", "INFO"),
        priority=_priority(priority),
        queue_timeout_s=timeout,
        request_id=task_id,
    )


def generated_image(outputs: Outputs) -> GeneratedImage:
    """The image in a `flux` answer."""
    return GeneratedImage(
        data=bytes(outputs["IMAGE"].item()), seed=int(outputs["SEED"].item()), info=_json(outputs["INFO"].item())
    )


def rerank_call(
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None,
    windows: int,
    priority: str,
    timeout: float | None,
    request_id: str,
) -> Call:
    """A `rerank` request for one query."""
    inputs = {"QUERY": _array("QUERY", [query], (1, 1)), "DOCUMENTS": _array("DOCUMENTS", documents, (1, -1))}
    if instruction is not None:
        inputs["INSTRUCTION"] = _array("INSTRUCTION", [instruction], (1, 1))
    if windows != 1:
        inputs["WINDOWS"] = _array("WINDOWS", [windows], (1, 1))
    return Call(
        "rerank",
        inputs,
        ("SCORES", "INFO"),
        priority=_priority(priority),
        queue_timeout_s=timeout,
        request_id=request_id,
    )


def ranking(outputs: Outputs, documents: Sequence[str], top_n: int | None) -> list[RankedDocument]:
    """The documents by falling score, equal ones in the order they came in; at most `top_n`."""
    scores = [float(score) for score in outputs["SCORES"].reshape(-1)]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [RankedDocument(index, scores[index], documents[index]) for index in order[:top_n]]


def tasks_call(action: str, task_id: str = "") -> Call:
    """A `tasks` request."""
    inputs = {"ACTION": _array("ACTION", [action], (1,)), "TASK_ID": _array("TASK_ID", [task_id], (1,))}
    return Call("tasks", inputs, ("TASK",))


def task_answer(outputs: Outputs) -> Any:
    """The JSON in a `tasks` answer."""
    return json.loads(outputs["TASK"].item())


def _array(name: str, values: Sequence[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    dtype = DTYPES[name]
    try:
        plain = [_PLAIN[dtype](value) for value in values]
        return np.array(plain, dtype=NUMPY[dtype]).reshape(shape)
    except (TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidInput(f"{name} cannot be sent as {dtype}: {error}") from None


def _text(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is not text")
    return value.encode()


def _real(value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{type(value).__name__} is not a number")
    return float(value)


# operator.index and not int(), which takes 4.7 for 4 and "4" for a number.
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "BYTES": _text,
    "FP32": _real,
    "INT32": operator.index,
    "INT64": operator.index,
}


def _lora(adapters: Sequence[dict[str, Any]]) -> str:
    try:
        return json.dumps(list(adapters))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"LORA cannot be sent as JSON: {error}") from None


def _priority(name: str) -> int:
    if name not in PRIORITIES:
        raise InvalidInput(f"priority is {name!r}; allowed: {', '.join(PRIORITIES)}")
    return PRIORITIES[name]


def _json(value: bytes) -> dict[str, Any]:
    decoded = json.loads(value)
    if not isinstance(decoded, dict):
        raise ServerError("INFO is not a JSON object")
    return decoded
