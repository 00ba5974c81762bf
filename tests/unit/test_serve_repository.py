"""Rendering of model repositories, and the shipped repository."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from genserve.protocol import DTYPES
from genserve.serve import repository as repository_module
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.repository import parse_gpus, render

SHIPPED = Path(__file__).parents[2] / "model_repository"
TRITON_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64"}
CONFIG = """
name: "{name}"
backend: "python"
instance_group [ {{ kind: KIND_AUTO, count: 1 }} ]
dynamic_batching {{ default_queue_policy {{ default_timeout_microseconds: 240000000, max_queue_size: 150 }} }}
parameters [ {{ key: "model_path", value: {{ string_value: "{path}" }} }} ]
"""


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_random_flux(path: Path) -> Path:
    """Create a minimal FLUX checkpoint."""
    write_json(path / "model_index.json", {"_class_name": "FluxPipeline"})
    write_json(path / "tokenizer_2" / "tokenizer_config.json", {"model_max_length": 512})
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        write_json(path / part / "config.json", {})
        (path / part / "model.safetensors").touch()
    return path


def make_rerank(path: Path) -> Path:
    """Create a minimal reranker checkpoint."""
    write_json(path / "config.json", {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}})
    (path / "model.safetensors").touch()
    return path


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, str]:
    """Return an environment with a checkpoint for each model."""
    return {
        "FLUX_MODEL_PATH": str(write_random_flux(tmp_path / "checkpoints" / "flux")),
        "RERANK_MODEL_PATH": str(make_rerank(tmp_path / "checkpoints" / "rerank")),
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Create a repository with its checkpoints alongside."""
    root = tmp_path / "repository"
    write_random_flux(tmp_path / "beside" / "flux")
    make_rerank(tmp_path / "beside" / "rerank")
    for name in ("flux", "rerank"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text("# the model")
        (root / name / "labels.txt").write_text("labels")
        (root / name / "config.pbtxt").write_text(CONFIG.format(name=name, path=f"../beside/{name}"))
    (root / "tasks").mkdir()
    (root / "tasks" / "config.pbtxt").write_text('name: "tasks"\nbackend: "python"\n')
    return root


def read_config(folder: Path, model: str) -> Any:
    return text_format.Parse((folder / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


Rendered = Callable[..., Any]


@pytest.fixture
def rendered(repository: Path, tmp_path: Path) -> Rendered:
    """Render the repository with options and an environment, and return one model's configuration."""

    def rendered(model: str, environ: dict[str, str] | None = None, **options: Any) -> Any:
        target = tmp_path / "rendered"
        render(ServeOptions(repository=repository, **options), target, environ or {})
        return read_config(target, model)

    return rendered


def placement(config: Any) -> tuple[str, int, list[int]]:
    (group,) = config.instance_group
    return model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind), group.count, list(group.gpus)


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_default_placement_is_tritons(model: str, rendered: Rendered) -> None:
    assert placement(rendered(model)) == ("KIND_AUTO", 1, [])


@pytest.mark.parametrize(
    ("model", "environ", "options", "expected"),
    [
        ("flux", {}, {"gpus": (0, 2)}, ("KIND_GPU", 1, [0, 2])),
        ("rerank", {}, {"gpus": (0, 2)}, ("KIND_GPU", 1, [0, 2])),
        ("flux", {"FLUX_GPUS": "1, 3"}, {}, ("KIND_GPU", 1, [1, 3])),
        ("rerank", {"FLUX_GPUS": "1,3"}, {}, ("KIND_AUTO", 1, [])),
        ("rerank", {"RERANK_GPUS": "5"}, {}, ("KIND_GPU", 1, [5])),
        ("flux", {"FLUX_GPUS": "1"}, {"gpus": (0,)}, ("KIND_GPU", 1, [0])),
        ("flux", {"FLUX_GPUS": ""}, {}, ("KIND_AUTO", 1, [])),
        ("rerank", {"WORKERS": "4"}, {}, ("KIND_AUTO", 4, [])),
        ("flux", {"WORKERS": "4"}, {}, ("KIND_AUTO", 1, [])),
        ("flux", {"FLUX_WORKERS": "2"}, {}, ("KIND_AUTO", 2, [])),
        ("rerank", {"WORKERS": "4"}, {"instances": {"rerank": 2}}, ("KIND_AUTO", 2, [])),
        ("flux", {}, {"instances": {"flux": 2}, "gpus": (1,)}, ("KIND_GPU", 2, [1])),
    ],
    ids=str,
)
def test_options_and_environment_place_the_instances(
    model: str,
    environ: dict[str, str],
    options: dict[str, Any],
    expected: tuple[str, int, list[int]],
    rendered: Rendered,
) -> None:
    assert placement(rendered(model, environ, **options)) == expected


PARALLEL = {"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "2"}


@pytest.mark.parametrize(
    ("model", "environ", "gpus", "first", "groups"),
    [
        ("rerank", PARALLEL, (0, 1, 2, 3), [0, 2], "0,1;2,3"),
        ("rerank", {**PARALLEL, "RERANK_GPUS": "5,3"}, None, [5], "5,3"),
        ("rerank", PARALLEL, None, [0, 2], "0,1;2,3"),
        ("rerank", {"ENGINE": "vllm"}, (0, 1), [0, 1], ""),
        ("flux", PARALLEL, (0, 1), [0, 1], ""),
    ],
    ids=["chosen", "environment", "all", "alone", "flux"],
)
def test_each_gpu_group_has_an_instance(
    model: str,
    environ: dict[str, str],
    gpus: tuple[int, ...] | None,
    first: list[int],
    groups: str,
    rendered: Rendered,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(repository_module, "_all_gpus", lambda: (0, 1, 2, 3))
    config = rendered(model, environ, gpus=gpus)
    assert placement(config) == ("KIND_GPU", 1, first)
    assert config.parameters["gpu_groups"].string_value == groups


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ((0, 1, 2), "rerank: TENSOR_PARALLEL_SIZE is 2, which does not divide the 3 GPUs 0,1,2"),
        (None, "rerank: TENSOR_PARALLEL_SIZE is 2, which does not divide the GPUs: there are none"),
    ],
    ids=["three", "none"],
)
def test_gpus_that_do_not_form_groups_are_rejected(
    gpus: tuple[int, ...] | None, message: str, rendered: Rendered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_module, "_all_gpus", lambda: ())
    with pytest.raises(ServeError) as caught:
        rendered("rerank", PARALLEL, gpus=gpus)
    assert str(caught.value) == message


def test_all_gpus_are_counted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert repository_module._all_gpus() == ()


def test_model_size_selects_the_checkpoint(rendered: Rendered, tmp_path: Path) -> None:
    chosen = make_rerank(tmp_path / "rerankers" / "Qwen3-Reranker-8B")
    environ = {"RERANK_MODEL_PATH": str(chosen.parent), "MODEL_SIZE": "8B"}
    assert rendered("rerank", environ).parameters["model_path"].string_value == str(chosen)


def test_missing_model_size_is_reported_with_its_path(rendered: Rendered, tmp_path: Path) -> None:
    (tmp_path / "rerankers").mkdir()
    with pytest.raises(ServeError, match=r"^rerank: no checkpoint .*/rerankers/Qwen3-Reranker-4B \(set RERANK"):
        rendered("rerank", {"RERANK_MODEL_PATH": str(tmp_path / "rerankers"), "MODEL_SIZE": "4B"})


@pytest.mark.parametrize(
    ("environ", "size", "timeout_us"),
    [
        ({}, 150, 240_000_000),
        ({"MAX_GLOBAL_QUEUE_SIZE": "7"}, 7, 240_000_000),
        ({"TASK_TIMEOUT": "1.5"}, 150, 1_500_000),
        ({"MAX_GLOBAL_QUEUE_SIZE": "", "TASK_TIMEOUT": ""}, 150, 240_000_000),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_environment_sets_queue_size_and_timeout(
    model: str, environ: dict[str, str], size: int, timeout_us: int, rendered: Rendered
) -> None:
    policy = rendered(model, environ).dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (size, timeout_us)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FLUX_GPUS": "zero"}, "FLUX_GPUS is 'zero'; allowed: GPU ids as in 0,1"),
        ({"FLUX_GPUS": "0,-1"}, "FLUX_GPUS is '0,-1'; allowed: GPU ids as in 0,1"),
        ({"RERANK_GPUS": "0;1"}, "RERANK_GPUS is '0;1'; allowed: GPU ids as in 0,1"),
        ({"WORKERS": "0"}, "WORKERS is '0'; allowed: a whole number, at least 1"),
        ({"FLUX_WORKERS": "two"}, "FLUX_WORKERS is 'two'; allowed: a whole number, at least 1"),
        ({"MAX_GLOBAL_QUEUE_SIZE": "-1"}, "MAX_GLOBAL_QUEUE_SIZE is '-1'; allowed: a whole number, at least 1"),
        ({"TASK_TIMEOUT": "soon"}, "flux: TASK_TIMEOUT: "),
        ({"MAX_NUM_SEQS": "0"}, "rerank: MAX_NUM_SEQS: "),
        ({"FLUX_MODEL_PATH": "/no/such"}, "flux: no checkpoint folder at /no/such (set FLUX_MODEL_PATH)"),
        ({"RERANK_MODEL_PATH": "/no/such"}, "rerank: no checkpoint folder at /no/such (set RERANK_MODEL_PATH)"),
    ],
    ids=str,
)
def test_invalid_setting_is_reported_by_name(environ: dict[str, str], message: str, rendered: Rendered) -> None:
    with pytest.raises(ServeError) as caught:
        rendered("flux", environ)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ((), ["flux", "rerank", "tasks"]),
        (("flux",), ["flux", "tasks"]),
        (("rerank",), ["rerank", "tasks"]),
        (("rerank", "flux"), ["flux", "rerank", "tasks"]),
        (("tasks",), ["tasks"]),
    ],
    ids=str,
)
def test_selected_models_include_tasks(
    models: tuple[str, ...], expected: list[str], repository: Path, tmp_path: Path
) -> None:
    target = tmp_path / "rendered"
    assert list(render(ServeOptions(repository=repository, models=models), target, {}).models) == expected
    assert sorted(path.name for path in target.iterdir()) == expected


def test_unselected_model_needs_no_checkpoint(rendered: Rendered) -> None:
    rendered("rerank", {"FLUX_MODEL_PATH": "/no/such"}, models=("rerank",))


def test_relative_model_path_becomes_absolute(rendered: Rendered, tmp_path: Path) -> None:
    config = rendered("flux")
    assert config.parameters["model_path"].string_value == str(tmp_path / "beside" / "flux")


def test_relative_lora_path_becomes_absolute(rendered: Rendered, repository: Path, tmp_path: Path) -> None:
    config = repository / "flux" / "config.pbtxt"
    config.write_text(config.read_text() + 'parameters [ { key: "lora_path", value: { string_value: "../loras" } } ]')
    assert rendered("flux").parameters["lora_path"].string_value == str(tmp_path / "loras")


def test_adapters_need_no_folder(rendered: Rendered) -> None:
    assert "lora_path" not in rendered("flux").parameters


def test_environment_model_path_becomes_absolute(
    rendered: Rendered, checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = rendered("flux", {"FLUX_MODEL_PATH": "checkpoints/flux"})
    assert config.parameters["model_path"].string_value == checkpoints["FLUX_MODEL_PATH"]


def test_files_other_than_config_are_linked(repository: Path, rendered: Rendered, tmp_path: Path) -> None:
    rendered("flux")
    folder = tmp_path / "rendered" / "flux"
    assert not (folder / "config.pbtxt").is_symlink()
    for name in ("1", "labels.txt"):
        assert (folder / name).is_symlink()
        assert (folder / name).resolve() == repository / "flux" / name
    assert (folder / "1" / "model.py").read_text() == "# the model"


def test_source_repository_is_unchanged(repository: Path, rendered: Rendered) -> None:
    before = {path: path.read_text() for path in repository.rglob("*") if path.is_file()}
    rendered("flux", {"MAX_GLOBAL_QUEUE_SIZE": "7"}, gpus=(3,))
    assert {path: path.read_text() for path in repository.rglob("*") if path.is_file()} == before


def test_config_without_name_takes_the_folder_name(repository: Path, rendered: Rendered) -> None:
    path = repository / "flux" / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "flux"', ""))
    assert placement(rendered("flux", {"FLUX_GPUS": "1"})) == ("KIND_GPU", 1, [1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "flux" / "config.pbtxt").write_text("name: {"), "is not a Triton configuration"),
        (lambda root: (root / "flux" / "config.pbtxt").write_bytes(b"\xff"), "cannot read"),
        (lambda root: (root / "flux" / "config.pbtxt").write_text('nmae: "flux"'), "is not a Triton configuration"),
        (lambda root: (root / "flux" / "config.pbtxt").write_text('name: "flux"'), "model_path"),
    ],
    ids=["syntax", "no-utf8", "unknown-field", "no-model-path"],
)
def test_invalid_config_is_reported(
    damage: Callable[[Path], Any], message: str, repository: Path, rendered: Rendered
) -> None:
    damage(repository)
    with pytest.raises(ServeError, match=message):
        rendered("flux")


def test_missing_or_empty_repository_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no model repository at .*none .*--repository"):
        render(ServeOptions(repository=tmp_path / "none"), tmp_path / "rendered", {})
    with pytest.raises(ServeError, match="no models in"):
        render(ServeOptions(repository=tmp_path), tmp_path / "rendered", {})


def test_unknown_model_is_reported(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"no model sdxl in .*, which has flux, rerank, tasks"):
        render(ServeOptions(repository=repository, models=("flux", "sdxl")), tmp_path / "rendered", {})


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), (",", None), ("0", (0,)), ("0,1", (0, 1)), (" 3 , 1 ,", (3, 1))], ids=repr
)
def test_gpus_are_parsed(text: str, expected: tuple[int, ...] | None) -> None:
    assert parse_gpus(text) == expected


# The repository that is shipped.


@pytest.fixture(params=["flux", "rerank", "tasks"])
def shipped(request: pytest.FixtureRequest) -> Any:
    return read_config(SHIPPED, request.param)


def test_shipped_inputs_have_the_client_dtypes(shipped: Any) -> None:
    for tensor in shipped.input:
        assert model_config_pb2.DataType.Name(tensor.data_type) == TRITON_TYPES[DTYPES[tensor.name]], tensor.name


def test_client_dtypes_cover_exactly_the_shipped_inputs() -> None:
    names = {tensor.name for model in ("flux", "rerank", "tasks") for tensor in read_config(SHIPPED, model).input}
    assert names == DTYPES.keys()


def test_shipped_models_have_a_python_file(shipped: Any) -> None:
    assert (SHIPPED / shipped.name / "1" / "model.py").is_file()
    assert shipped.backend == "python"


@pytest.mark.parametrize(
    ("model", "required"),
    [("flux", {"PROMPT"}), ("rerank", {"QUERY", "DOCUMENTS"}), ("tasks", {"ACTION"})],
    ids=["flux", "rerank", "tasks"],
)
def test_shipped_models_require_only_the_contract_inputs(model: str, required: set[str]) -> None:
    config = read_config(SHIPPED, model)
    assert {tensor.name for tensor in config.input if not tensor.optional} == required


@pytest.mark.parametrize(
    ("model", "outputs"),
    [
        ("flux", {"IMAGE": "TYPE_STRING", "SEED": "TYPE_INT64", "INFO": "TYPE_STRING"}),
        ("rerank", {"SCORES": "TYPE_FP32", "INFO": "TYPE_STRING"}),
        ("tasks", {"TASK": "TYPE_STRING", "PREVIEW": "TYPE_STRING"}),
    ],
    ids=["flux", "rerank", "tasks"],
)
def test_shipped_outputs_match_the_contract(model: str, outputs: dict[str, str]) -> None:
    found = read_config(SHIPPED, model).output
    assert {tensor.name: model_config_pb2.DataType.Name(tensor.data_type) for tensor in found} == outputs


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_shipped_queue_policies_match_the_contract(model: str) -> None:
    batching = read_config(SHIPPED, model).dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    policy = batching.default_queue_policy
    assert policy.max_queue_size == 150
    assert policy.default_timeout_microseconds == 240_000_000
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override


def test_shipped_batching_matches_the_contract() -> None:
    flux, rerank = read_config(SHIPPED, "flux"), read_config(SHIPPED, "rerank")
    assert flux.max_batch_size == 8
    assert list(flux.dynamic_batching.preferred_batch_size) == [1]
    assert {tensor.name: tensor.allow_ragged_batch for tensor in rerank.input}["DOCUMENTS"]
    assert not flux.model_transaction_policy.decoupled
    assert not rerank.model_transaction_policy.decoupled


def test_shipped_repository_renders(checkpoints: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "rendered"
    assert render(ServeOptions(repository=SHIPPED), target, checkpoints).models == ("flux", "rerank", "tasks")
    for model in ("flux", "rerank"):
        before, after = read_config(SHIPPED, model), read_config(target, model)
        assert after.parameters["model_path"].string_value == checkpoints[f"{model.upper()}_MODEL_PATH"]
        for config in (before, after):
            for name in {"model_path", "lora_path"} & set(config.parameters):
                del config.parameters[name]
        assert after == before
    assert read_config(target, "tasks") == read_config(SHIPPED, "tasks")
