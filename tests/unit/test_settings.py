"""Settings: origin of values, and errors for invalid ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from genserve_backend.settings import (
    SIZE_LIMITS,
    FluxSettings,
    ModelSettings,
    RerankSettings,
    SettingsError,
    in_force,
    load,
    weights_dtype,
)

REPOSITORY = Path("/models")


def flux(parameters: dict[str, str] | None = None, **environ: str) -> FluxSettings:
    return load(FluxSettings, {"model_path": "flux", **(parameters or {})}, repository=REPOSITORY, environ=environ)


def rerank(parameters: dict[str, str] | None = None, **environ: str) -> RerankSettings:
    return load(RerankSettings, {"model_path": "rerank", **(parameters or {})}, repository=REPOSITORY, environ=environ)


@pytest.mark.parametrize(
    ("parameters", "environ", "expected"),
    [
        ({}, {}, 240.0),
        ({"task_timeout_s": "10"}, {}, 10.0),
        ({}, {"TASK_TIMEOUT": "20"}, 20.0),
        ({"task_timeout_s": "10"}, {"TASK_TIMEOUT": "20"}, 20.0),
        ({"task_timeout_s": "10"}, {"TASK_TIMEOUT": ""}, 10.0),
        ({}, {"TASK_TIMEOUT": ""}, 240.0),
        ({}, {"task_timeout_s": "20"}, 240.0),
    ],
    ids=["default", "parameter", "environment", "both", "empty-over-parameter", "empty", "field-name-is-no-variable"],
)
def test_environment_over_parameter_over_default(
    parameters: dict[str, str], environ: dict[str, str], expected: float
) -> None:
    assert flux(parameters, **environ).task_timeout_s == expected


def test_every_documented_variable_reaches_its_field() -> None:
    environ = {"MAX_PIXELS": "65536", "MAX_GPU_QUEUE_SIZE": "3", "FLUX_MODEL_PATH": "/f", "RERANK_MODEL_PATH": "/r"}
    environ |= {"MAX_NUM_SEQS": "7", "MAX_NUM_BATCHED_TOKENS": "99"}
    image = load(FluxSettings, {}, repository=REPOSITORY, environ=environ)
    assert (image.max_pixels, image.max_gpu_queue_size, image.model_path) == (65_536, 3, Path("/f"))
    ranking = load(RerankSettings, {}, repository=REPOSITORY, environ=environ)
    assert (ranking.max_num_seqs, ranking.max_num_batched_tokens, ranking.model_path) == (7, 99, Path("/r"))


@pytest.mark.parametrize(
    ("parameter", "environ", "expected"),
    [
        ("../demo/flux", {}, "/demo/flux"),
        ("flux", {}, "/models/flux"),
        ("/elsewhere/flux", {}, "/elsewhere/flux"),
        ("flux", {"FLUX_MODEL_PATH": "/given/flux"}, "/given/flux"),
        ("flux", {"FLUX_MODEL_PATH": "given/flux"}, "given/flux"),
    ],
    ids=["up", "below", "absolute", "environment", "relative-environment"],
)
def test_relative_parameter_starts_at_the_repository(parameter: str, environ: dict[str, str], expected: str) -> None:
    assert flux({"model_path": parameter}, **environ).model_path == Path(expected)
    environ = {name.replace("FLUX_MODEL", "LORA"): value for name, value in environ.items()}
    assert flux({"lora_path": parameter}, **environ).lora_path == Path(expected)


@pytest.mark.parametrize("parameters", [{}, {"lora_path": "../demo/loras"}], ids=["no-parameter", "parameter"])
def test_empty_variable_sets_no_adapters_folder(parameters: dict[str, str]) -> None:
    expected = Path("/demo/loras") if parameters else None
    assert flux(parameters, LORA_PATH="").lora_path == expected


@pytest.mark.parametrize(
    ("parameters", "environ", "parts"),
    [
        ({}, {"TASK_TIMEOUT": "soon"}, ["TASK_TIMEOUT: ", "number", "'soon'"]),
        ({}, {"TASK_TIMEOUT": "0"}, ["TASK_TIMEOUT: ", "greater than 0", "'0'"]),
        ({}, {"TASK_TIMEOUT": "nan"}, ["TASK_TIMEOUT: ", "'nan'"]),
        ({}, {"TASK_TIMEOUT": "86401"}, ["TASK_TIMEOUT: ", "86400"]),
        ({}, {"MAX_PIXELS": "4095"}, ["MAX_PIXELS: ", "4096", "'4095'"]),
        ({"max_pixels": "1.5"}, {}, ["parameter max_pixels in config.pbtxt: ", "'1.5'"]),
        ({"max_pixels": "many"}, {"MAX_PIXELS": "few"}, ["MAX_PIXELS: ", "'few'"]),
        ({"dtype": "int8"}, {}, ["parameter dtype in config.pbtxt: ", "bfloat16", "'int8'"]),
        ({"threads": "-1"}, {}, ["parameter threads in config.pbtxt: ", "'-1'"]),
        ({"max_pixel": "4096"}, {}, ["parameter max_pixel in config.pbtxt: ", "not permitted", "'4096'"]),
        ({"max_num_seqs": "4"}, {}, ["parameter max_num_seqs in config.pbtxt: ", "not permitted"]),
    ],
    ids=lambda value: value[0].strip(": ") if isinstance(value, list) else "",
)
def test_errors_name_the_origin_and_the_value(
    parameters: dict[str, str], environ: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        flux(parameters, **environ)
    message = str(caught.value)
    assert message.startswith(parts[0])
    assert all(part in message for part in parts)
    assert "\n" not in message


def test_missing_path_is_named() -> None:
    with pytest.raises(SettingsError, match="model_path in config.pbtxt: .*required"):
        load(RerankSettings, {}, repository=REPOSITORY, environ={"FLUX_MODEL_PATH": "/f"})


@pytest.mark.parametrize("value", ["4096", str(2**28)])
def test_pixel_limit_accepts_its_bounds(value: str) -> None:
    assert flux(MAX_PIXELS=value).max_pixels == int(value)


# The engine of the reranker.


def test_each_model_has_its_own_dtype() -> None:
    environ = {"FLUX_DTYPE": "float16", "RERANK_DTYPE": "int8"}
    assert flux(**environ).dtype == "float16"
    assert rerank(**environ).dtype == "int8"
    assert (flux().dtype, rerank().dtype) == ("auto", "auto")


def test_vllm_settings_come_from_the_environment() -> None:
    settings = rerank(ENGINE="vllm", GPU_MEMORY_UTILIZATION="0.5", TENSOR_PARALLEL_SIZE="2")
    assert (settings.engine, settings.gpu_memory_utilization, settings.tensor_parallel_size) == ("vllm", 0.5, 2)
    plain = rerank()
    assert (plain.engine, plain.gpu_memory_utilization, plain.tensor_parallel_size) == ("torch", 0.9, 1)


@pytest.mark.parametrize(
    ("environ", "parts"),
    [
        ({"ENGINE": "onnx"}, ["ENGINE: ", "'torch' or 'vllm'", "'onnx'"]),
        ({"ENGINE": "vllm", "RERANK_DTYPE": "int8"}, ["ENGINE: ", "RERANK_DTYPE", "'vllm'"]),
        ({"ENGINE": "vllm", "RERANK_COMPILE": "true"}, ["ENGINE: ", "RERANK_COMPILE", "'vllm'"]),
        ({"RERANK_DTYPE": "int8", "RERANK_COMPILE": "1"}, ["RERANK_COMPILE: ", "RERANK_DTYPE", "'1'"]),
        ({"RERANK_COMPILE": "often"}, ["RERANK_COMPILE: ", "'often'"]),
        ({"RERANK_DTYPE": "int4"}, ["RERANK_DTYPE: ", "int8", "'int4'"]),
        ({"GPU_MEMORY_UTILIZATION": "0"}, ["GPU_MEMORY_UTILIZATION: ", "greater than 0", "'0'"]),
        ({"GPU_MEMORY_UTILIZATION": "1.1"}, ["GPU_MEMORY_UTILIZATION: ", "less than or equal to 1", "'1.1'"]),
        ({"GPU_MEMORY_UTILIZATION": "nan"}, ["GPU_MEMORY_UTILIZATION: ", "'nan'"]),
        ({"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "0"}, ["TENSOR_PARALLEL_SIZE: ", "'0'"]),
        ({"TENSOR_PARALLEL_SIZE": "2"}, ["TENSOR_PARALLEL_SIZE: ", "ENGINE=vllm", "'2'"]),
        ({"MODEL_SIZE": "2B"}, ["MODEL_SIZE: ", "'0.6B', '4B' or '8B'", "'2B'"]),
    ],
    ids=str,
)
def test_invalid_engine_setting_is_named(environ: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        rerank(**environ)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"GPU_MEMORY_UTILIZATION": "0.9"}, 0.9),
        ({"GPU_MEMORY_UTILIZATION": "0.9", "ENGINE": "vllm"}, None),
    ],
    ids=str,
)
def test_memory_share_is_opt_in(environ: dict[str, str], expected: float | None) -> None:
    settings: RerankSettings = pickle.loads(pickle.dumps(rerank(**environ)))
    assert settings.memory_share == expected
    assert flux(**environ).memory_share is None


@pytest.mark.parametrize(
    ("device", "environ", "expected"),
    [
        ("cuda:1", {}, (1,)),
        ("cpu", {}, ()),
        ("cpu", {"ENGINE": "vllm"}, ()),
        ("cuda:1", {"ENGINE": "vllm"}, (1,)),
        ("cuda:1", {"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "2"}, (1, 2)),
        ("cuda:1", {"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "2", "gpu_groups": "0,2;1,5"}, (1, 5)),
        ("cuda:3", {"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "2", "gpu_groups": "0,2;1,5"}, (3, 4)),
    ],
    ids=str,
)
def test_instance_uses_its_gpu_group(device: str, environ: dict[str, str], expected: tuple[int, ...]) -> None:
    parameters = {"gpu_groups": environ["gpu_groups"]} if "gpu_groups" in environ else {}
    assert rerank(parameters, **environ).gpus(device) == expected


def test_flux_instance_uses_one_gpu() -> None:
    assert flux().gpus("cuda:3") == (3,)
    assert flux().gpus("cpu") == ()


@pytest.mark.parametrize(
    ("environ", "device", "expected"),
    [({}, "cpu", 0.25), ({}, "cuda", 0.0), ({"max_padding": "1"}, "cuda", 1.0)],
    ids=str,
)
def test_padding_limit_depends_on_the_device(environ: dict[str, str], device: str, expected: float) -> None:
    settings = load(FluxSettings, {"model_path": "/f", **environ}, repository=Path("/"), environ={})
    assert settings.padding_limit(device) == expected


# The size of the reranker.


def limits(settings: RerankSettings) -> tuple[int, int, int, int]:
    budgets = settings.token_budget("cuda:0"), settings.token_budget("cpu")
    return settings.max_num_seqs, *budgets, settings.prefix_cache_bytes


def test_model_size_sets_the_default_limits() -> None:
    sizes = [limits(rerank(MODEL_SIZE=size)) for size in SIZE_LIMITS]
    assert limits(rerank()) == sizes[0] == (256, 16_384, 1_024, 256 * 2**20)
    assert sizes[1:] == [(128, 8_192, 256, 512 * 2**20), (64, 4_096, 128, 512 * 2**20)]
    chosen = rerank({"prefix_cache_bytes": "5"}, MODEL_SIZE="8B", MAX_NUM_SEQS="9", MAX_NUM_BATCHED_TOKENS="700")
    assert limits(chosen) == (9, 700, 700, 5)


@pytest.mark.parametrize(
    ("file", "expected"),
    [(None, "Qwen3-Reranker-4B"), ("config.json", ""), ("modules.json", "")],
    ids=["several", "one", "sentence-transformers"],
)
@pytest.mark.parametrize("is_parameter", [True, False], ids=["parameter", "environment"])
def test_model_size_selects_the_folder(file: str | None, expected: str, is_parameter: bool, tmp_path: Path) -> None:
    if file:
        (tmp_path / file).touch()
    environ = {"MODEL_SIZE": "4B"} | ({} if is_parameter else {"RERANK_MODEL_PATH": str(tmp_path)})
    found = load(RerankSettings, {"model_path": str(tmp_path)}, repository=REPOSITORY, environ=environ)
    assert found.model_path == tmp_path / expected
    assert limits(found) == limits(rerank(MODEL_SIZE="4B"))


def test_without_model_size_the_path_is_the_folder(tmp_path: Path) -> None:
    assert rerank(RERANK_MODEL_PATH=str(tmp_path)).model_path == tmp_path


# Origins.


def sources(
    kind: type[ModelSettings], parameters: dict[str, str] | None = None, device: str = "cpu", **environ: str
) -> dict[str, tuple[Any, str]]:
    """Return value and source of every setting in force."""
    given = {"model_path": "folder", **(parameters or {})}
    settings = load(kind, given, repository=REPOSITORY, environ=environ)
    found = in_force(settings, given, device=device, environ=environ)
    assert [setting.name for setting in found] == list(kind.model_fields)
    json.dumps(found)
    return {setting.name: (setting.value, setting.source) for setting in found}


def test_source_is_environment_parameter_or_default() -> None:
    found = sources(FluxSettings, {"task_timeout_s": "10", "max_running": "3"}, TASK_TIMEOUT="20", MAX_PIXELS="")
    assert found["task_timeout_s"] == (20.0, "environment TASK_TIMEOUT")
    assert found["max_running"] == (3, "config.pbtxt")
    assert found["max_pixels"] == (2048 * 2048, "default")
    assert found["model_path"] == ("/models/folder", "config.pbtxt")
    assert found["max_padding"] == (None, "default")


def test_value_equal_to_the_default_has_its_own_source() -> None:
    found = sources(RerankSettings, {"max_length": "0"}, ENGINE="torch", RERANK_MODEL_PATH="/given")
    assert found["max_length"] == (0, "config.pbtxt")
    assert found["engine"] == ("torch", "environment ENGINE")
    assert found["model_path"] == ("/given", "environment RERANK_MODEL_PATH")
    assert found["max_num_batched_tokens"] == (0, "default")


def test_values_are_json() -> None:
    environ = {"SAVE_TEST_IMAGES": "/images", "FLUX_DTYPE": "float16"}
    found = sources(FluxSettings, {"start_timeout_s": "inf"}, **environ)
    assert found["save_test_images"] == ("/images", "environment SAVE_TEST_IMAGES")
    assert found["dtype"] == ("float16", "environment FLUX_DTYPE")
    found = sources(RerankSettings, {"gpu_groups": "0,1;2,3"})
    assert found["gpu_groups"] == ([[0, 1], [2, 3]], "config.pbtxt")
    assert found["compiled"] == (False, "default")


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 128), ("cuda:0", 4_096)])
def test_limits_of_a_size_name_it_as_their_source(device: str, tokens: int) -> None:
    found = sources(RerankSettings, device=device, MODEL_SIZE="8B")
    assert found["model_size"] == ("8B", "environment MODEL_SIZE")
    assert found["max_num_seqs"] == (64, "MODEL_SIZE")
    assert found["prefix_cache_bytes"] == (512 * 2**20, "MODEL_SIZE")
    assert found["max_num_batched_tokens"] == (tokens, "MODEL_SIZE")
    assert found["score_cache_bytes"][1] == "default"
    assert found["model_path"] == ("/models/folder/Qwen3-Reranker-8B", "config.pbtxt")


def test_set_limit_has_its_own_source_despite_a_size() -> None:
    environ = {"MAX_NUM_SEQS": "9", "MAX_NUM_BATCHED_TOKENS": "700"}
    found = sources(RerankSettings, {"prefix_cache_bytes": "5", "model_size": "8B"}, **environ)
    assert found["max_num_seqs"] == (9, "environment MAX_NUM_SEQS")
    assert found["max_num_batched_tokens"] == (700, "environment MAX_NUM_BATCHED_TOKENS")
    assert found["prefix_cache_bytes"] == (5, "config.pbtxt")
    assert found["model_size"] == ("8B", "config.pbtxt")


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda:1", "bfloat16"),
        ("int8", "cpu", "float32"),
        ("float16", "cpu", "float16"),
    ],
)
def test_weights_have_the_dtype_of_the_device(dtype: Any, device: str, expected: str) -> None:
    assert weights_dtype(dtype, device) == expected
