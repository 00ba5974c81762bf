"""Tensors of the public contract: arguments to inputs, outputs to results."""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeVar, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from genserve.errors import InvalidInput, ServerError
from genserve.types import (
    Adapters,
    GeneratedImage,
    InstanceLoad,
    Priority,
    RankedDocument,
    Ranking,
    Setting,
    TaskState,
    TaskStatus,
)

PRIORITIES: dict[Priority, int] = {"high": 1, "normal": 2, "low": 3}
"""Triton's priority levels; 1 is served first."""
MAX_TASK_ID_CHARACTERS = 256
LORA_FORMS = 'a name, (name, weight), {name: weight}, or a list of names, pairs or {"name": name, "weight": weight}'

DTYPES = {
    "PROMPT": "BYTES",
    "NEGATIVE_PROMPT": "BYTES",
    "TRUE_CFG_SCALE": "FP32",
    "HEIGHT": "INT32",
    "WIDTH": "INT32",
    "STEPS": "INT32",
    "GUIDANCE": "FP32",
    "SEED": "INT64",
    "CACHE": "FP32",
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
    """Inference request, independent of the protocol.

    Attributes:
        model: Name of the model.
        inputs: Arrays by tensor name.
        outputs: Names of the requested output tensors.
        priority: Triton's priority level, 1 to 3.
        request_id: The request's id in the server's log.
    """

    model: str
    inputs: dict[str, npt.NDArray[Any]]
    outputs: tuple[str, ...]
    priority: int = PRIORITIES["normal"]
    request_id: str = ""


Outputs = dict[str, npt.NDArray[Any]]
"""Arrays by tensor name."""

Json = TypeVar("Json", dict[str, Any], list[dict[str, Any]])
Record = TypeVar("Record", InstanceLoad, Setting)


def generate_call(
    prompt: str,
    *,
    priority: Priority,
    task_id: str,
    lora: Adapters = (),
    **settings: Any,
) -> Call:
    """Return a `flux` request for one image. Settings that are None are not sent, nor is an empty `lora`."""
    values: dict[str, Any] = {"PROMPT": prompt, "TASK_ID": task_id}
    values |= {name.upper(): value for name, value in settings.items() if value is not None}
    if adapters := lora_adapters(lora):
        values["LORA"] = json.dumps(adapters)
    return Call(
        "flux",
        {name: _array(name, [value], (1, 1)) for name, value in values.items()},
        ("IMAGE", "SEED", "INFO"),
        priority=_priority(priority),
        request_id=_task_id(task_id),
    )


def generated_image(outputs: Outputs) -> GeneratedImage:
    """Return the image in a `flux` answer."""
    data = outputs["IMAGE"].item()
    if not isinstance(data, bytes):
        raise ServerError("IMAGE is not binary data")
    return GeneratedImage(
        data=data,
        seed=int(outputs["SEED"].item()),
        info=_json("INFO", outputs["INFO"].item()),
    )


def rerank_call(
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None,
    windows: int,
    priority: Priority,
    task_id: str,
) -> Call:
    """Return a `rerank` request for one query. The task id travels as the request id; the model has no TASK_ID."""
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
        request_id=_task_id(task_id),
    )


def ranking(outputs: Outputs, documents: Sequence[str], top_n: int | None) -> Ranking:
    """Return at most `top_n` documents by descending score. Ties keep the request's order."""
    scores = tuple(float(score) for score in outputs["SCORES"].reshape(-1))
    if len(scores) != len(documents):
        raise ServerError(f"SCORES has {len(scores)} values for {len(documents)} documents")
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    best = tuple(RankedDocument(index, scores[index], documents[index]) for index in order[:top_n])
    return Ranking(best, scores, _json("INFO", outputs["INFO"].item()))


def tasks_call(action: str, task_id: str = "") -> Call:
    """Return a `tasks` request."""
    inputs = {"ACTION": _array("ACTION", [action], (1,)), "TASK_ID": _array("TASK_ID", [task_id], (1,))}
    return Call("tasks", inputs, ("TASK", "PREVIEW"))


def task_status(outputs: Outputs) -> TaskStatus:
    """Return the task in the answer to ``status`` or ``cancel``."""
    return _task(_json("TASK", outputs["TASK"].item()), bytes(outputs["PREVIEW"].item()))


def task_list(outputs: Outputs) -> list[TaskStatus]:
    """Return the tasks in the answer to ``list``, without previews."""
    return [_task(task) for task in _decoded("TASK", outputs["TASK"].item(), list)]


def instance_loads(outputs: Outputs) -> list[InstanceLoad]:
    """Return the instances in the answer to ``load``."""
    return [_record(InstanceLoad, item) for item in _decoded("TASK", outputs["TASK"].item(), list)]


def settings_in_force(outputs: Outputs) -> list[Setting]:
    """Return the settings in the answer to ``config``."""
    return [_record(Setting, item) for item in _decoded("TASK", outputs["TASK"].item(), list)]


def _record(kind: type[Record], item: object) -> Record:
    """Return a JSON object as `kind`. Every field must be there with its type; other fields are ignored."""
    if not isinstance(item, dict):
        raise ServerError(f"TASK holds {type(item).__name__} in place of {kind.__name__}")
    values = {}
    for name, annotation in get_type_hints(kind).items():
        if name == "url":  # known to the client only
            continue
        if name not in item:
            raise ServerError(f"TASK holds {kind.__name__} without {name}")
        values[name] = value = item[name]
        # type() rather than isinstance(): to Python, True is an int.
        if annotation is not Any and type(value) not in (get_args(annotation) or (annotation,)):
            raise ServerError(f"TASK holds {kind.__name__} with {name} {value!r:.80}")
    return kind(**values)


def _task(task: dict[str, Any], preview: bytes = b"") -> TaskStatus:
    if task.get("state") not in get_args(TaskState):
        raise ServerError(f"TASK has the state {task.get('state')!r}")
    names = {field.name for field in fields(TaskStatus)} - {"preview"}
    return TaskStatus(**{name: value for name, value in task.items() if name in names}, preview=preview)


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


# operator.index rather than int(), which accepts 4.7 and "4".
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "BYTES": _text,
    "FP32": _real,
    "INT32": operator.index,
    "INT64": operator.index,
}


def lora_adapters(given: Adapters | None) -> list[dict[str, Any]]:
    """Return adapters in the form of the tensor LORA: ``{"name": str, "weight": float}`` each.

    Args:
        given: One adapter, weights by name, or a sequence of adapters; None for none.

    Raises:
        InvalidInput: `given` has another form, an empty name, or a weight that is not a finite number.
    """
    if given is None:
        return []
    if _is_adapter(given):
        return [_adapter(given)]
    if isinstance(given, Mapping):
        return [_adapter(pair) for pair in given.items()]
    if isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray)):
        return [_adapter(each) for each in given]
    raise _not_lora(given)


def _is_adapter(given: Any) -> bool:
    """Return whether the value is one adapter: a name, a pair of name and weight, or a mapping with a name."""
    if isinstance(given, Mapping):
        return isinstance(given.get("name"), str)  # {"name": 1.0} is an adapter called "name"
    if isinstance(given, (tuple, list)):
        return len(given) == 2 and not isinstance(given[1], (str, tuple, list, Mapping))
    return isinstance(given, str)


def _adapter(given: Any) -> dict[str, Any]:
    name, weight = given, 1.0
    if isinstance(given, (tuple, list)) and len(given) == 2:
        name, weight = given
    elif isinstance(given, Mapping) and given.keys() <= {"name", "weight"}:
        name, weight = given.get("name"), given.get("weight", 1.0)
    if not isinstance(name, str):
        raise _not_lora(given)
    try:
        is_name = bool(name.encode())
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise InvalidInput(f"LORA has the name {reprlib.repr(name)}; allowed: text, not empty")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not _is_finite(weight):
        raise InvalidInput(f"LORA has the weight {reprlib.repr(weight)} for {name!r:.80}; allowed: a finite number")
    return {"name": name, "weight": float(weight)}


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _not_lora(given: Any) -> InvalidInput:
    return InvalidInput(f"LORA is {reprlib.repr(given)}; allowed: {LORA_FORMS}")


def _priority(name: Priority) -> int:
    if not isinstance(name, str) or name not in PRIORITIES:
        raise InvalidInput(f"priority is {name!r}; allowed: {', '.join(PRIORITIES)}")
    return PRIORITIES[name]


def _task_id(task_id: str) -> str:
    _array("TASK_ID", [task_id], (1,))  # raises InvalidInput unless it is text
    if len(task_id) > MAX_TASK_ID_CHARACTERS:
        raise InvalidInput(f"TASK_ID is {len(task_id):,} characters long; allowed: at most {MAX_TASK_ID_CHARACTERS}")
    return task_id


def _json(name: str, value: bytes) -> dict[str, Any]:
    return _decoded(name, value, dict)


def _decoded(name: str, value: bytes, kind: type[Json]) -> Json:
    try:
        decoded = json.loads(value)
    except ValueError:
        raise ServerError(f"{name} is not JSON") from None
    if not isinstance(decoded, kind):
        raise ServerError(f"{name} is not a JSON {'object' if kind is dict else 'list'}")
    return decoded
