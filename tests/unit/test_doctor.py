"""`genserve doctor` on intact and damaged checkpoints: the demo's FLUX, and tiny rerankers of the real layouts."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from genserve.cli import main
from genserve.serve import device_memory, load_trial, model_check
from genserve.serve import doctor as doctor_module
from genserve.serve.checkpoint_check import Contents, check_flux, check_rerank
from genserve.serve.device_memory import Device, find_cpu, find_gpus
from genserve.serve.doctor import MODELS
from genserve.serve.finding import Finding, in_units
from genserve.serve.load_trial import TRIALS, TrialError, try_model
from genserve.serve.model_check import check_models
from genserve.serve.options import ServeOptions
from genserve.serve.repository import CHECKPOINTS
from genserve.serve.weights import Tensor, Weights
from genserve_backend.flux.memory import flux_1_dev
from genserve_backend.settings import FluxSettings, load
from genserve_backend.worker.link import WORKER_PATH_ENV

ROOT = Path(__file__).parents[2]
DEMO_FLUX = ROOT / "demo" / "flux"
OPTIONS = ServeOptions(repository=ROOT / "model_repository")
GIB = 2**30
FLUX_1_DEV = {
    "transformer": {name: size for block in flux_1_dev().transformer.blocks.values() for name, size in block.items()},
    "text_encoder_2": {name: size for block in flux_1_dev().t5.blocks.values() for name, size in block.items()},
    "text_encoder": {"clip": flux_1_dev().clip},
    "vae": {"vae": flux_1_dev().vae},
}
"""Tensors in the sizes of FLUX.1-dev's."""

Damage = Callable[[Path], Any]


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def halve(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def make_folder(name: str) -> Damage:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


@pytest.fixture
def flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the demo's FLUX that FLUX_MODEL_PATH names."""
    monkeypatch.setenv("FLUX_MODEL_PATH", str(tmp_path / "flux"))
    return Path(shutil.copytree(DEMO_FLUX, tmp_path / "flux"))


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rerankers")
    return {
        "bi": tiny_models.bert_bi_encoder(folder / "bi"),
        "cross": tiny_models.bert_cross_encoder(folder / "cross"),
        "causal": tiny_models.qwen3_causal(folder / "causal"),
    }


@pytest.fixture
def copied(rerankers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        monkeypatch.setenv("RERANK_MODEL_PATH", str(tmp_path / kind))
        return Path(shutil.copytree(rerankers[kind], tmp_path / kind))

    return copy


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "find_gpus", list)
    for name in ("FLUX_GPUS", "RERANK_GPUS", "FLUX_WORKERS", "WORKERS"):
        monkeypatch.delenv(name, raising=False)


def findings(model: str, trial_s: float | None = None) -> list[Finding]:
    return list(check_models([model], OPTIONS, trial_s=trial_s))


def failures(model: str) -> list[str]:
    return [finding.detail for finding in findings(model) if finding.state == "fail"]


# Files.


def test_intact_flux_is_complete(flux: Path) -> None:
    contents = check_flux(flux)
    assert contents.problems == []
    assert contents.weights.keys() == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    # The VAE is stored in float16, and takes twice the space in float32.
    stored = (flux / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert contents.weights["vae"].loaded_bytes("float32") == pytest.approx(2 * stored, rel=0.01)
    complete, memory = findings("flux")
    assert complete == Finding("flux", "ok", f"checkpoint in {flux}: 14 files, {contents.tensors} tensors")
    assert memory.state == "ok"
    assert f"weights take {in_units(contents.loaded_bytes('float32'))} in float32; cpu has" in memory.detail


@pytest.mark.parametrize("kind", ["bi", "cross", "causal"])
def test_intact_reranker_is_complete(kind: str, copied: Callable[[str], Path]) -> None:
    assert check_rerank(copied(kind)).problems == []
    assert [finding.state for finding in findings("rerank")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model_index.json"), "model_index.json is missing"),
        (write("model_index.json", "{"), "model_index.json is not JSON"),
        (write("model_index.json", "[]"), "model_index.json holds no JSON object"),
        (write("model_index.json", '{"_class_name": "StableDiffusionPipeline"}'), "holds a StableDiffusionPipeline"),
        (lambda folder: shutil.rmtree(folder / "vae"), r"/vae is missing$"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), r"/scheduler is missing$"),
        (remove("scheduler/scheduler_config.json"), "scheduler_config.json is missing"),
        (remove("transformer/config.json"), "transformer/config.json is missing"),
        (write("vae/config.json", b"\xff\xfe"), "vae/config.json is not JSON"),
        (make_folder("text_encoder/config.json"), "text_encoder/config.json is a folder"),
        (
            remove("transformer/diffusion_pytorch_model.safetensors"),
            "transformer/diffusion_pytorch_model.safetensors is missing",
        ),
        (
            halve("text_encoder_2/model.safetensors"),
            r"text_encoder_2/model.safetensors is damaged \(547,360 bytes\): its length does not match its header",
        ),
        (make_folder("vae/diffusion_pytorch_model.safetensors"), "diffusion_pytorch_model.safetensors is a folder"),
        (write("tokenizer/tokenizer.json", '{"version": "1.0"}'), "tokenizer/tokenizer.json is no tokenizer: "),
        (remove("tokenizer_2/tokenizer.json"), "tokenizer_2 has no tokenizer.json, and no other file"),
        (remove("tokenizer_2/tokenizer_config.json"), "tokenizer_2/tokenizer_config.json is missing"),
        (write("tokenizer/tokenizer_config.json", "null"), "tokenizer_config.json holds no JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_file_of_flux_is_the_only_failure(damage: Damage, message: str, flux: Path) -> None:
    damage(flux)
    (detail,) = failures("flux")
    assert re.search(message, detail)


def test_every_damaged_file_is_named(flux: Path) -> None:
    remove("scheduler/scheduler_config.json")(flux)
    halve("vae/diffusion_pytorch_model.safetensors")(flux)
    write("tokenizer/tokenizer.json", b"")(flux)
    remove("text_encoder/model.safetensors")(flux)
    found = failures("flux")
    named = ("scheduler_config.json", "vae/diffusion_pytorch_model", "tokenizer/tokenizer.json", "text_encoder/model")
    assert len(found) == len(named)
    assert all(any(name in detail for detail in found) for name in named)


@pytest.mark.parametrize("entry", ["null", '["diffusers"]', "[null, null]", '"x"', "1"])
def test_part_that_the_index_does_not_name_is_reported(entry: str, flux: Path) -> None:
    index = json.loads((flux / "model_index.json").read_text())
    write("model_index.json", json.dumps({**index, "vae": json.loads(entry)}))(flux)
    assert failures("flux") == [f"{flux / 'model_index.json'} names no vae"]


def test_slow_tokenizer_files_replace_a_fast_one(flux: Path) -> None:
    remove("tokenizer/tokenizer.json")(flux)
    assert check_flux(flux).problems == []
    remove("tokenizer/merges.txt")(flux)
    assert check_flux(flux).problems == [f"{flux / 'tokenizer' / 'merges.txt'} is missing"]
    write("tokenizer/merges.txt", b"\xff")(flux)
    assert check_flux(flux).problems == [f"{flux / 'tokenizer' / 'merges.txt'} is not UTF-8 text"]


@pytest.fixture
def pieces(flux: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A FLUX whose tokenizer_2 is a SentencePiece model, and a parser for it that needs no package."""
    parser = types.ModuleType("sentencepiece.sentencepiece_model_pb2")

    class ModelProto:
        def ParseFromString(self, data: bytes) -> None:  # noqa: N802
            if data.startswith(b"damaged"):
                from google.protobuf.message import DecodeError

                raise DecodeError
            self.pieces = list(data)

    vars(parser)["ModelProto"] = ModelProto
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", parser)
    remove("tokenizer_2/tokenizer.json")(flux)
    write("tokenizer_2/spiece.model", b"pieces")(flux)
    return parser


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"pieces", None), (b"damaged", "is no SentencePiece model"), (b"", "is a SentencePiece model without pieces")],
)
def test_sentence_pieces_are_parsed(content: bytes, problem: str | None, flux: Path, pieces: types.ModuleType) -> None:
    path = flux / "tokenizer_2" / "spiece.model"
    path.write_bytes(content)
    assert check_flux(flux).problems == ([f"{path} {problem}"] if problem else [])


@pytest.mark.parametrize("package", ["sentencepiece.sentencepiece_model_pb2", "google.protobuf.message"])
def test_missing_package_of_a_tokenizer_is_named(
    package: str, flux: Path, pieces: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (problem,) = check_flux(flux).problems
    assert problem.startswith(f"{flux / 'tokenizer_2' / 'spiece.model'} needs sentencepiece and protobuf: ")
    assert package in problem


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("bi", remove("1_Pooling/config.json"), "1_Pooling/config.json is missing"),
        ("bi", write("modules.json", "[1]"), "modules.json is not a list of sentence-transformers modules"),
        ("bi", write("sentence_bert_config.json", "["), "sentence_bert_config.json is not JSON"),
        ("cross", remove("config.json"), "config.json is missing"),
        ("cross", remove("model.safetensors"), "model.safetensors is missing"),
        ("cross", remove("tokenizer.json"), "has no tokenizer.json, and no other file that a tokenizer is built from"),
        ("causal", halve("model.safetensors"), "model.safetensors is damaged"),
        ("causal", halve("tokenizer.json"), "tokenizer.json is no tokenizer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_file_of_a_reranker_is_named(
    kind: str, damage: Damage, message: str, copied: Callable[[str], Path]
) -> None:
    damage(copied(kind))
    (detail,) = failures("rerank")
    assert message in detail


def test_classifier_is_no_reranker(copied: Callable[[str], Path]) -> None:
    folder = copied("cross")
    config = json.loads((folder / "config.json").read_text())
    write("config.json", json.dumps({**config, "id2label": {"0": "a", "1": "b"}}))(folder)
    (detail,) = failures("rerank")
    assert detail == f"{folder} is a classifier with 2 labels; a reranker has exactly one"


def test_shards_of_a_reranker_are_checked(copied: Callable[[str], Path]) -> None:
    folder = copied("causal")
    whole = check_rerank(folder).loaded_bytes("bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    contents = check_rerank(folder)
    assert (contents.problems, contents.loaded_bytes("bfloat16")) == ([], whole)
    shards[0].unlink()
    halve(shards[1].name)(folder)
    found = failures("rerank")
    assert found[0] == f"{shards[0]} is missing"
    assert found[1].startswith(f"{shards[1]} is damaged")
    (memory,) = [finding.detail for finding in findings("rerank") if "weights take" in finding.detail]
    assert "weights take at least" in memory


@pytest.mark.parametrize("model", ["flux", "rerank"])
def test_missing_checkpoint_names_the_setting(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{model.upper()}_MODEL_PATH", str(tmp_path / "nowhere"))
    assert failures(model) == [f"no checkpoint folder at {tmp_path / 'nowhere'} (set {model.upper()}_MODEL_PATH)"]


def test_invalid_setting_is_the_finding(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_PIXELS", "few")
    (finding,) = findings("flux")
    assert finding.state == "fail"
    assert finding.detail.startswith("MAX_PIXELS: ")


def test_random_damage_is_only_a_finding(flux: Path) -> None:
    chance = random.Random(3)
    files = sorted(path for path in flux.rglob("*") if path.is_file())
    for _ in range(150):
        path = chance.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(min(len(content), 4_000))
            content[place : place + chance.randint(0, 9)] = chance.randbytes(chance.randint(0, 9))
        path.write_bytes(content)
        found = findings("flux")
        assert found
        assert not [finding.detail for finding in found if "the check ended with" in finding.detail]
        assert all(finding.detail.isprintable() for finding in found)
        path.write_bytes(whole)
    assert failures("flux") == []


class Panic(BaseException):
    """A BaseException that is no Exception, like pyo3's PanicException."""


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_unexpected_exception_is_a_finding(
    kind: type[BaseException], flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(_: Path) -> None:
        raise kind("line one\nline two \ud800")

    monkeypatch.setitem(model_check.FILE_CHECKS, "flux", surprise)
    (finding,) = findings("flux")
    assert finding == Finding("flux", "fail", f"the check ended with {kind.__name__}: line one line two \\ud800")


def test_ctrl_c_ends_the_checks(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(model_check.FILE_CHECKS, "flux", interrupt)
    with pytest.raises(KeyboardInterrupt):
        findings("flux")


# Memory.


@pytest.mark.parametrize(
    ("free", "total", "state", "words"),
    [
        (2 * GIB, 4 * GIB, "ok", "cuda:0 has 2.0 GiB of 4.0 GiB free"),
        (GIB // 1024, 4 * GIB, "warn", "cuda:0 has 1.0 MiB of 4.0 GiB free: end what else uses it"),
        (GIB // 1024, GIB // 512, "fail", "too much for cuda:0 with 2.0 MiB"),
    ],
)
def test_weights_are_compared_with_the_gpu(
    free: int, total: int, state: str, words: str, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "find_gpus", lambda: [Device("cuda:0", free, total)])
    finding = findings("flux")[-1]
    assert finding.state == state
    assert words in finding.detail
    assert f"weights take {in_units(check_flux(flux).loaded_bytes('bfloat16'))} in bfloat16" in finding.detail


def test_every_gpu_of_a_model_is_checked(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [Device(f"cuda:{gpu}", GIB, GIB) for gpu in range(3)]
    monkeypatch.setattr(model_check, "find_gpus", lambda: gpus)
    assert len(findings("flux")) == 1 + 3
    monkeypatch.setenv("FLUX_GPUS", "2,0")
    monkeypatch.setenv("FLUX_WORKERS", "2")
    details = [finding.detail for finding in findings("flux")[1:]]
    assert len(details) == 2
    assert "cuda:0 has" in details[0]
    assert "cuda:2 has" in details[1]
    twice = in_units(2 * check_flux(flux).loaded_bytes("bfloat16"))
    assert all(f"{twice} for 2 instances" in detail for detail in details)
    monkeypatch.setenv("FLUX_GPUS", "3")
    assert failures("flux") == ["no GPU 3: torch finds 3"]


def test_tensor_parallel_gpus_share_the_weights(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check_rerank(copied("causal")).loaded_bytes("bfloat16")
    monkeypatch.setattr(model_check, "find_gpus", lambda: [Device(f"cuda:{gpu}", GIB, GIB) for gpu in range(2)])
    for name, value in {"ENGINE": "vllm", "TENSOR_PARALLEL_SIZE": "2", "RERANK_GPUS": "1,0"}.items():
        monkeypatch.setenv(name, value)
    _, first, second = findings("rerank")
    assert f"weights take {in_units(whole / 2)} in bfloat16" in first.detail
    assert (first.state, second.state) == ("ok", "ok")


def test_gpus_that_are_not_there_are_reported(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_GPUS", "0")
    assert failures("flux") == ["no GPU 0: torch finds 0"]


def test_configured_dtype_counts(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUX_DTYPE", "bfloat16")
    assert f"{in_units(check_flux(flux).loaded_bytes('bfloat16'))} in bfloat16" in findings("flux")[-1].detail


def test_quantized_and_offloaded_weights_count_as_they_are(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "find_gpus", lambda: [Device("cuda:0", 8 * GIB, 8 * GIB, (8, 9))])
    whole = check_flux(flux).loaded_bytes("bfloat16")
    monkeypatch.setenv("FLUX_DTYPE", "fp8")
    monkeypatch.setenv("FLUX_T5_DTYPE", "int8wo")
    (finding,) = findings("flux")[1:]
    assert finding.state == "ok"
    taken = re.search(r"weights take ([\d.]+) MiB in fp8", finding.detail)
    assert taken
    assert whole / 2 < float(taken[1]) * 2**20 < 0.8 * whole
    monkeypatch.setenv("FLUX_OFFLOAD", "blocks")
    assert re.search(r"weights take [\d.]+ MiB in fp8, besides [\d.]+ MiB in host memory;", findings("flux")[-1].detail)


@pytest.mark.parametrize(
    ("dtype", "device", "words"),
    [
        ("fp8", Device("cuda:0", GIB, GIB, (8, 6)), "FLUX_DTYPE=fp8 needs a GPU of capability 8.9 or higher"),
        ("fp8", None, "this instance is on cpu"),
        ("int8", Device("cuda:0", GIB, GIB, (9, 0)), "FLUX_DTYPE=int8 needs a CPU that has VNNI"),
    ],
    ids=["fp8-on-an-old-gpu", "fp8-on-a-cpu", "int8-on-a-gpu"],
)
def test_dtype_without_its_device_is_reported(
    dtype: str, device: Device | None, words: str, flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "find_gpus", lambda: [device] if device else [])
    monkeypatch.setenv("FLUX_DTYPE", dtype)
    (failure,) = failures("flux")
    assert words in failure


def test_small_gpu_gets_the_settings_that_fit(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {
        part: Weights([Tensor("BF16", values, name) for name, values in tensors.items()], 1)
        for part, tensors in FLUX_1_DEV.items()
    }
    monkeypatch.setitem(model_check.FILE_CHECKS, "flux", lambda _: Contents(9, weights))
    config = flux / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_attention_heads": 24, "attention_head_dim": 128}))
    vae = flux / "vae" / "config.json"
    vae.write_text(
        json.dumps({**json.loads(vae.read_text()), "block_out_channels": [128, 256, 512, 512], "sample_size": 1024})
    )

    def advice(gib: int, capability: tuple[int, int], **environ: str) -> Finding:
        monkeypatch.setattr(model_check, "find_gpus", lambda: [Device("cuda:0", gib * GIB, gib * GIB, capability)])
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return findings("flux")[-1]

    assert advice(48, (8, 6)).state == "ok"
    too_small = advice(24, (8, 6))
    assert too_small.state == "fail"
    assert "too much for cuda:0 with 24.0 GiB: it fits with FLUX_DTYPE=int8wo FLUX_T5_DTYPE=int8wo" in too_small.detail
    assert "it fits with FLUX_DTYPE=fp8 FLUX_T5_DTYPE=int8wo" in advice(24, (8, 9)).detail
    near = advice(32, (9, 0))
    assert near.state == "warn"
    assert "with forwards at the limits about" in near.detail
    assert advice(24, (8, 9), FLUX_DTYPE="fp8", FLUX_T5_DTYPE="int8wo").state == "ok"
    assert "no setting makes it fit" in advice(2, (8, 9)).detail


def test_cpu_has_the_memory_of_the_machine_or_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = find_cpu()
    assert cpu.name == "cpu"
    assert 0 < cpu.free <= cpu.total
    limits = tmp_path / "max", tmp_path / "limit"
    monkeypatch.setattr(device_memory, "CGROUP_LIMITS", limits)
    limits[0].write_text("max\n")
    assert find_cpu().total > 2**20
    limits[1].write_text(f"{2**20}\n")
    assert find_cpu() == Device("cpu", 2**20, 2**20)


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (
            "print('[[1, 2, [8, 9]], [3, 4, [9, 0]]]')",
            [Device("cuda:0", 1, 2, (8, 9)), Device("cuda:1", 3, 4, (9, 0))],
        ),
        ("print('no JSON')", []),
        ("raise SystemExit('CUDA error')", []),
    ],
    ids=["two", "no-json", "error"],
)
def test_gpus_are_asked_in_another_process(probe: str, expected: list[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "PROBE", probe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_gpus() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_gpus() == []


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1.5 * 2**20, "1.5 MiB"), (24 * 2**30, "24.0 GiB")],
)
def test_sizes_have_units(size: float, text: str) -> None:
    assert in_units(size) == text


# Trials.


def test_every_model_has_its_checks_and_its_trial() -> None:
    assert set(MODELS) == set(CHECKPOINTS) == set(TRIALS)


@pytest.fixture
def scripted(flux: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], str]:
    """Return a function that tries FLUX with an engine of worker_handlers.py and a request for it."""
    path = [str(Path(__file__).parent), *filter(None, sys.path)]
    monkeypatch.setenv(WORKER_PATH_ENV, ":".join(path))
    settings = load(FluxSettings, {}, repository=ROOT)

    def attempt(factory: str, request: Any = ("echo", "result"), *, timeout_s: float = 60.0) -> str:
        trial = load_trial.Trial(f"worker_handlers:{factory}", lambda _: request, str)
        monkeypatch.setitem(load_trial.TRIALS, "flux", trial)
        return try_model("flux", settings, "cpu", timeout_s=timeout_s)

    return attempt


def test_trial_reports_seconds_and_memory(scripted: Callable[..., str]) -> None:
    said = scripted("build_scripted")
    assert said.startswith("loaded on cpu in ")
    assert "; result took " in said
    assert said.endswith(" MiB")


@pytest.mark.parametrize(
    ("factory", "request_", "message"),
    [
        ("build_broken", None, "the model cannot be loaded: ValueError: first line; peak memory"),
        ("build_without_checkpoint", None, "the model cannot be loaded: no checkpoint folder at"),
        ("build_crashing", None, "the worker died while the model was being loaded: signal SIGKILL, as the system"),
        ("build_scripted", ("crash", None), "the worker died while a small request was running: signal SIGKILL"),
        ("build_scripted", ("refuse", "why"), "a small request failed: InvalidInput: why"),
        ("no_such_factory", None, "the model cannot be loaded: AttributeError"),
    ],
    ids=["broken", "no-checkpoint", "crash-at-start", "crash", "refused", "no-engine"],
)
def test_failed_trial_has_a_reason(factory: str, request_: Any, message: str, scripted: Callable[..., str]) -> None:
    with pytest.raises(TrialError) as caught:
        scripted(factory, request_)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_trial_ends_at_its_time_limit(scripted: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(TrialError, match=r"not within 3 s: (a small request was running|the model was being loaded)"):
        scripted("build_scripted", ("hang", str(tmp_path / "gate")), timeout_s=3.0)


def test_trial_saves_no_image(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_TEST_IMAGES", str(tmp_path / "saved"))
    (*_, tried) = findings("flux", trial_s=120.0)
    assert tried.state == "ok"
    assert "an image of 64 x 64 pixels" in tried.detail
    assert not (tmp_path / "saved").exists()


def test_trial_of_a_checkpoint_that_lacks_a_tensor_fails(copied: Callable[[str], Path]) -> None:
    """The files are intact, and only the loader knows which tensors the model needs."""
    folder = copied("cross")
    config = json.loads((folder / "config.json").read_text())
    write("config.json", json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))(folder)
    *before, tried = findings("rerank", trial_s=120.0)
    assert {finding.state for finding in before} == {"ok"}
    assert tried.state == "fail"
    assert f"the weights in {folder} lack" in tried.detail


def test_model_that_cannot_fit_is_not_tried(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "find_cpu", lambda: Device("cpu", 1, 1))
    monkeypatch.setattr(model_check, "try_model", lambda *_, **__: pytest.fail("tried"))
    assert findings("flux", trial_s=1.0)[-1].state == "fail"


# The command line.


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run doctor without the checks of this machine."""
    monkeypatch.setenv("GENSERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(doctor_module, "CHECKS", ())
    monkeypatch.chdir(ROOT)
    return lambda *arguments: CliRunner().invoke(main, ["doctor", *arguments], prog_name="genserve")


def test_model_option_limits_the_checks(flux: Path, copied: Callable[[str], Path], invoke: Callable[..., Any]) -> None:
    copied("bi")
    assert {line.split()[1] for line in invoke().stdout.splitlines()} == {"flux", "rerank"}
    result = invoke("--model", "flux", "--json")
    assert result.exit_code == 0
    assert [(each["subject"], each["state"]) for each in json.loads(result.stdout)] == [("flux", "ok")] * 2


def test_failure_is_one_line_and_exit_code_1(flux: Path, invoke: Callable[..., Any]) -> None:
    remove("vae/diffusion_pytorch_model.safetensors")(flux)
    result = invoke("--model", "flux")
    assert result.exit_code == 1
    assert result.stderr == "genserve: 1 of 1 checks failed\n"
    assert result.stdout == f"fail  flux         {flux}/vae/diffusion_pytorch_model.safetensors is missing\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tasks"], "allowed: flux, rerank"),
        (["--timeout", "0"], "0.0 is not in the range"),
        (["--load", "--url", "localhost:1"], "do not go with --url"),
        (["--model", "flux", "--url", "localhost:1"], "do not go with --url"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_rejected(arguments: list[str], message: str, invoke: Callable[..., Any]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_load_option_sets_the_time_limit(
    flux: Path, invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []

    def attempt(*_: Any, timeout_s: float) -> str:
        limits.append(timeout_s)
        return "loaded"

    monkeypatch.setattr(model_check, "try_model", attempt)
    assert invoke("--model", "flux").exit_code == 0
    assert limits == []
    assert "flux         loaded" in invoke("--model", "flux", "--load").stdout
    assert invoke("--model", "flux", "--load", "--timeout", "7").exit_code == 0
    assert limits == [900.0, 7.0]
