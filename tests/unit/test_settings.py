"""Where a setting's value comes from, and what is said about one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from genserve_backend.settings import FluxSettings, RerankSettings, SettingsError, load

REPOSITORY = Path("/models")


def flux(parameters: dict[str, str] | None = None, **environ: str) -> FluxSettings:
    return load(FluxSettings, {"model_path": "flux", **(parameters or {})}, repository=REPOSITORY, environ=environ)


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
def test_a_relative_path_starts_at_the_repository_only_when_it_is_a_parameter(
    parameter: str, environ: dict[str, str], expected: str
) -> None:
    assert flux({"model_path": parameter}, **environ).model_path == Path(expected)


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


def test_a_missing_path_is_named() -> None:
    with pytest.raises(SettingsError, match="model_path in config.pbtxt: .*required"):
        load(RerankSettings, {}, repository=REPOSITORY, environ={"FLUX_MODEL_PATH": "/f"})


@pytest.mark.parametrize("value", ["4096", str(2**28)])
def test_the_pixel_budget_reaches_its_limits(value: str) -> None:
    assert flux(MAX_PIXELS=value).max_pixels == int(value)


def test_settings_cannot_be_changed() -> None:
    settings = flux()
    with pytest.raises(ValueError, match="frozen"):
        settings.threads = 2
