"""Generator of the tables in docs/ that follow from the code.

``python docs/generate.py`` rewrites every block between ``<!-- generated: NAME -->`` and ``<!-- end -->``. With
``--check`` it changes nothing and fails if a block is out of date. tests/unit/test_docs.py does the same.
"""

# ruff: noqa: E402  # the adapter imports Triton's module, which exists only inside Triton
from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from google.protobuf import text_format
from pydantic_core import PydanticUndefined
from tritonclient.grpc import model_config_pb2

sys.modules.setdefault("triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))

from genserve import errors as client_errors
from genserve.protocol import MAX_TASK_ID_CHARACTERS
from genserve.retry import Deadline, Retries
from genserve.serve.flux_memory import describe
from genserve.types import InstanceLoad, Setting
from genserve_backend import errors as backend_errors
from genserve_backend.adapter.metrics import INSTANCE_METRICS
from genserve_backend.adapter.reply import CODES
from genserve_backend.flux import memory as flux_memory
from genserve_backend.flux import request as flux
from genserve_backend.flux.lora.request import MAX_ADAPTERS, MAX_WEIGHT
from genserve_backend.flux.metrics import METRICS as FLUX_METRICS
from genserve_backend.rerank import request as rerank
from genserve_backend.rerank.metrics import METRICS as RERANK_METRICS
from genserve_backend.settings import SIZE_LIMITS, Env, FluxSettings, ModelSettings, RerankSettings
from genserve_backend.worker.metrics import Counter

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent / "model_repository"
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

GRPC_CODES = {"INVALID_ARG": "INVALID_ARGUMENT"}
"""gRPC codes whose names differ from Triton's."""
HTTP_STATUSES = {"INVALID_ARG": "400", "CANCELLED": "400, or 499", "UNAVAILABLE": "503", "INTERNAL": "500"}
"""HTTP statuses of Triton's codes. Newer versions of Triton answer CANCELLED with 499."""
CLIENT_ONLY = {
    client_errors.QueueFull: ("UNAVAILABLE; RESOURCE_EXHAUSTED of a gateway", "503; 429 of a gateway"),
    client_errors.ServerUnavailable: ("UNAVAILABLE", "503; 502 of a gateway"),
    client_errors.NotAllowed: ("UNAUTHENTICATED, PERMISSION_DENIED of a gateway", "401, 403 of a gateway"),
}
"""Codes of the errors that Triton, a gateway or the network causes."""

Row = Sequence[str]

PIXELS = f"multiples of {flux.SIZE_MULTIPLE}, from {flux.MIN_SIZE}; HEIGHT x WIDTH at most MAX_PIXELS"
INPUTS: dict[str, dict[str, Row]] = {
    "flux": {
        "PROMPT": (f"1 to {flux.MAX_PROMPT_CHARACTERS:,} characters", "The text to draw"),
        "NEGATIVE_PROMPT": (
            f"0 to {flux.MAX_PROMPT_CHARACTERS:,} characters",
            '""',
            "Content to keep out of the image. Turns on true classifier-free guidance",
        ),
        "TRUE_CFG_SCALE": (
            f"{flux.MIN_TRUE_CFG:g} to {flux.MAX_TRUE_CFG:g}",
            f"{flux.DEFAULT_TRUE_CFG:g}",
            "Scale of true classifier-free guidance. Ignored without NEGATIVE_PROMPT",
        ),
        "HEIGHT": (PIXELS, "the checkpoint's native size", "Pixels"),
        "WIDTH": (PIXELS, "the checkpoint's native size", "Pixels"),
        "STEPS": (f"1 to {flux.MAX_STEPS}", "the checkpoint's: dev 28, schnell 4", "Denoising steps"),
        "GUIDANCE": (f"0 to {flux.MAX_GUIDANCE:g}", "the checkpoint's: dev 3.5", "Guidance scale"),
        "SEED": ("-1 to 2^63 - 1", "-1", "-1 selects a random seed below 2^32"),
        "CACHE": (
            f"0 to {flux.MAX_CACHE:g}",
            "0",
            "Threshold of [skipped steps](operating.md#skipped-steps). 0 computes every step",
        ),
        "LORA": (
            f'a list of at most {MAX_ADAPTERS} `{{"name": string, "weight": number}}`; weights from {-MAX_WEIGHT:g} to'
            f" {MAX_WEIGHT:g}, 1 if missing",
            "`[]`",
            "JSON list of the image's [adapters](#lora-adapters)",
        ),
        "FORMAT": (", ".join(flux.FORMATS), flux.FORMATS[0], "Image format"),
        "ENCODING": (
            ", ".join(flux.ENCODINGS),
            flux.ENCODINGS[0],
            "Encoding of IMAGE. JSON callers need base64: JSON has no bytes",
        ),
        "TASK_ID": (
            f"0 to {MAX_TASK_ID_CHARACTERS} characters",
            "the request id, else a random id",
            "Id for `tasks` and the log",
        ),
    },
    "rerank": {
        "QUERY": (f"1 to {rerank.MAX_QUERY_CHARACTERS:,} characters", "The query"),
        "DOCUMENTS": (
            f"1 to {rerank.MAX_DOCUMENTS:,} documents of at most {rerank.MAX_DOCUMENT_CHARACTERS:,} characters",
            "The documents. Requests with different N may share a batch",
        ),
        "INSTRUCTION": (
            f"0 to {rerank.MAX_INSTRUCTION_CHARACTERS:,} characters",
            "the model's own",
            "Task instruction. Models without instructions ignore it",
        ),
        "WINDOWS": (
            f"1 to {rerank.MAX_WINDOWS}",
            "1",
            "Most overlapping windows of a document beyond the length limit. The highest score counts; 1 truncates",
        ),
    },
    "tasks": {
        "ACTION": (
            "status, cancel, list, load, config",
            "`status` and `cancel` need TASK_ID. `list` returns every task in flight, `load` every instance, `config`"
            " every setting",
        ),
        "TASK_ID": (f"1 to {MAX_TASK_ID_CHARACTERS} characters", '""', "The task's TASK_ID or request id"),
    },
}
"""Range, default (of optional inputs) and meaning of every input."""
OUTPUTS: dict[str, dict[str, str]] = {
    "flux": {
        "IMAGE": "The encoded image, with the seed and the settings in its metadata",
        "SEED": "The seed used. Sent again, it gives the same image",
        "INFO": "JSON object: [fields](#info-of-flux)",
    },
    "rerank": {
        "SCORES": "Relevance from 0 to 1, in the order of DOCUMENTS",
        "INFO": "JSON object: [fields](#info-of-rerank)",
    },
    "tasks": {
        "TASK": "JSON object, or a list of them for `list`, `load` and `config`: [fields](#fields-of-task)",
        "PREVIEW": "A small JPEG of the unfinished image; empty without one",
    },
}


def table(header: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)


def config(model: str) -> Any:
    """Return a model's Triton configuration."""
    return text_format.Parse((REPOSITORY / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def _tensor(model: Any, tensor: Any) -> tuple[str, str]:
    """Return type and shape of a tensor."""
    dtype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    dims = [*(["B"] if model.max_batch_size else []), *("N" if dim < 0 else str(dim) for dim in tensor.dims)]
    return dtype, f"[{', '.join(dims)}]"


def inputs(name: str) -> str:
    """Return the table of a model's inputs."""
    model, rows = config(name), []
    for tensor in model.input:
        allowed, *default, meaning = INPUTS[name][tensor.name]
        if tensor.optional != bool(default):
            raise SystemExit(f"docs/generate.py: {name} {tensor.name} needs a default only if it is optional")
        rows.append((tensor.name, *_tensor(model, tensor), allowed, *(default or ["required"]), meaning))
    return table(("input", "type", "shape", "allowed", "default", "meaning"), rows)


def outputs(name: str) -> str:
    """Return the table of a model's outputs."""
    model = config(name)
    rows = [(tensor.name, *_tensor(model, tensor), OUTPUTS[name][tensor.name]) for tensor in model.output]
    return table(("output", "type", "shape", "meaning"), rows)


def queues() -> str:
    """Return the table of the models' batch and queue limits."""
    rows = []
    for name in ("flux", "rerank"):
        model = config(name)
        policy = model.dynamic_batching.default_queue_policy
        timeout_s = policy.default_timeout_microseconds / 1e6
        rows.append((f"`{name}`", str(model.max_batch_size), str(policy.max_queue_size), f"{timeout_s:g} s"))
    return table(("model", "rows per request (B)", "waiting requests per priority level", "timeout"), rows)


def errors() -> str:
    """Return the error table."""
    rows = []
    for kind in client_errors.GenServeError.__subclasses__():
        if kind in CLIENT_ONLY:
            grpc, http = CLIENT_ONLY[kind]
        else:
            code = CODES[getattr(backend_errors, kind.__name__)]
            grpc, http = GRPC_CODES.get(code, code), HTTP_STATUSES[code]
        meaning = _paragraph(inspect.getdoc(kind) or "")
        rows.append((f"`{kind.__name__}`", meaning, grpc, http, _retry(kind)))
    return table(("class", "meaning", "gRPC code", "HTTP status", "retried by the client"), rows)


def _paragraph(docstring: str) -> str:
    """Return a docstring's first paragraph as a table cell."""
    return " ".join(docstring.split("\n\n", maxsplit=1)[0].split()).replace("``", "`").rstrip(".")


def _retry(kind: type[client_errors.GenServeError]) -> str:
    def is_retried(error: client_errors.GenServeError) -> bool:
        return Retries(60.0, Deadline(600.0)).pause_after(error) is not None

    if kind is client_errors.QueueFull and is_retried(kind("", retry_after=1.0)):
        return "with `retry_for`, after `retry_after`"
    return "with `retry_for`" if is_retried(kind("")) else "no"


def settings(kind: type[ModelSettings], model: str | None) -> str:
    """Return the table of the settings that a class declares, with defaults of the model's config.pbtxt."""
    shipped = config(model).parameters if model else {}
    rows = []
    meanings = _field_docstrings(kind)
    for name, meaning in meanings.items():
        field = kind.model_fields[name]
        env = next((str(mark) for mark in field.metadata if isinstance(mark, Env)), "")
        if name in {"model_path", "threads"} and not env:
            continue  # each model declares its own
        default = shipped[name].string_value if name in shipped else _default(field.default)
        rows.append((env, name, default, _allowed(field), meaning))
    return table(("environment", "parameter", "default", "allowed", "meaning"), rows)


def _field_docstrings(kind: type[ModelSettings]) -> dict[str, str]:
    """Return the docstring's first paragraph of each field that a class declares."""
    source = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    node = next(node for node in source.body if isinstance(node, ast.ClassDef))
    meanings = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            if not (isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)):
                raise SystemExit(f"docs/generate.py: {kind.__name__}.{field.target.id} has no docstring")
            meanings[field.target.id] = _paragraph(str(text.value.value))
    return meanings


def _default(value: Any) -> str:
    if value is None or value == () or value is PydanticUndefined:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(field: Any) -> str:
    """Return the values that a field allows."""
    choices = [value for part in _parts(field.annotation) for value in _choices(part)]
    if choices:
        return ", ".join(map(str, choices))
    bounds: dict[str, str] = {}
    for mark in field.metadata:
        found = {name: getattr(mark, name, None) for name in ("ge", "gt", "le")}
        bounds |= {name: f"{value:,.0f}" for name, value in found.items() if value is not None}
    low, high = bounds.get("ge"), bounds.get("le")
    if low and high:
        return f"{low} to {high}"
    above = [f"above {bounds['gt']}"] if "gt" in bounds else []
    return ", ".join([*above, *([f"from {low}"] if low else []), *([f"at most {high}"] if high else [])])


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, without None."""
    if get_origin(annotation) in {Union, types.UnionType}:
        yield from (part for part in get_args(annotation) if part is not type(None))
    else:
        yield annotation


def _choices(part: Any) -> tuple[Any, ...]:
    return ("true", "false") if part is bool else get_args(part) if get_origin(part) is Literal else ()


def sizes() -> str:
    """Return the table of the limits that MODEL_SIZE selects."""
    rows = [
        (
            size,
            str(limits.max_num_seqs),
            f"{limits.gpu_tokens} ({limits.cpu_tokens})",
            f"{limits.prefix_cache_bytes // 2**20} MiB",
        )
        for size, limits in SIZE_LIMITS.items()
    ]
    return table(("MODEL_SIZE", "MAX_NUM_SEQS", "MAX_NUM_BATCHED_TOKENS on a GPU (CPU)", "prefix_cache_bytes"), rows)


CARDS_GIB = (12, 16, 24, 48, 80)
"""GPU memory in the table of FLUX.1-dev's memory."""


def memory_table() -> str:
    """Return the table of the settings with which FLUX.1-dev fits into a GPU, and its memory in GiB."""
    sizes, plain = flux_memory.flux_1_dev(), FluxSettings(model_path=Path("model"))

    def gib(size: int) -> str:
        return f"{size / 2**30:.1f}"

    rows = []
    for card in CARDS_GIB:
        fits = flux_memory.need(sizes, plain, "cuda").total <= card * 2**30
        changes = {} if fits else flux_memory.advise(sizes, plain, "cuda", memory=card * 2**30)
        if changes is None:
            rows.append((f"{card} GB", "none", *("",) * 5))
            continue
        need = flux_memory.need(sizes, plain.model_copy(update=changes), "cuda")
        settings = f"`{describe(changes)}`" if changes else "the defaults"
        rows.append(
            (f"{card} GB", settings, *map(gib, (need.weights, need.passing, need.forwards, need.total, need.host)))
        )
    return table(("GPU", "settings", "weights", "copied for each use", "forwards", "together", "host memory"), rows)


def metrics() -> str:
    """Return the table of the metrics that the models add to Triton's."""
    models: dict[tuple[str, str, str], list[str]] = {}
    labels: dict[tuple[str, str, str], list[str]] = {}
    served = {"flux": (*INSTANCE_METRICS, *FLUX_METRICS), "rerank": (*INSTANCE_METRICS, *RERANK_METRICS)}
    for model, described in served.items():
        for metric in described:
            key = metric.name, type(metric).__name__.lower(), metric.help
            if model not in models.setdefault(key, []):
                models[key].append(model)
            if isinstance(metric, Counter):
                labels.setdefault(key, []).extend(f"{name}={value}" for name, value in metric.labels)
    rows = []
    for key, names in models.items():
        marks = ", ".join(dict.fromkeys(labels.get(key, ())))
        rows.append((f"`{key[0]}`", key[1], ", ".join(names), key[2] + (f": {marks}" if marks else "")))
    return table(("metric", "kind", "model", "meaning"), rows)


JSON_TYPES = {"str": "string", "int": "integer", "bool": "boolean", "int | None": "integer or null", "Any": "any"}
"""Names of JSON's types, by annotation."""
CLIENT_FIELDS = {"url"}
"""Fields that the client adds to an answer."""


def fields(kind: type[Any]) -> str:
    """Return the table of the fields of an answer that the client returns as the dataclass `kind`."""
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(kind) or "", flags=re.MULTILINE))
    rows = [
        (field.name, JSON_TYPES[str(field.type)], _paragraph(meanings[field.name]).replace("None", "null"))
        for field in dataclasses.fields(kind)
        if field.name not in CLIENT_FIELDS
    ]
    return table(("field", "type", "meaning"), rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "flux-inputs": lambda: inputs("flux"),
    "flux-outputs": lambda: outputs("flux"),
    "rerank-inputs": lambda: inputs("rerank"),
    "rerank-outputs": lambda: outputs("rerank"),
    "tasks-inputs": lambda: inputs("tasks"),
    "tasks-outputs": lambda: outputs("tasks"),
    "load-fields": lambda: fields(InstanceLoad),
    "config-fields": lambda: fields(Setting),
    "queues": queues,
    "errors": errors,
    "settings": lambda: settings(ModelSettings, None),
    "flux-memory": memory_table,
    "flux-settings": lambda: settings(FluxSettings, "flux"),
    "rerank-settings": lambda: settings(RerankSettings, "rerank"),
    "sizes": sizes,
    "metrics": metrics,
}


def generated(text: str) -> str:
    """Return a document with its blocks rewritten."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]]()}\n{block[3]}", text)


def main() -> None:
    """Rewrite the documents, or check them with ``--check``."""
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        if generated(text) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(generated(text))
    if stale and "--check" in sys.argv:
        sys.exit(f"out of date, run python docs/generate.py: {', '.join(stale)}")


if __name__ == "__main__":
    main()
