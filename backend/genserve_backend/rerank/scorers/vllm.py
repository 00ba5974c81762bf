"""Causal reranker run by vLLM: its kernels, its prefix cache and its tensor parallelism, with our prompts.

vLLM is optional: only this module imports it, and only if ENGINE is vllm. Each call scores one of our batches, so
order, cancellation and the score cache stay with our engine.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.devices import resolve_dtype
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers.base import Scorer, Slice
from genserve_backend.rerank.scorers.layouts import TokenSequence
from genserve_backend.rerank.scorers.pretrained import load_config, load_tokenizer
from genserve_backend.rerank.scorers.prompts import ANSWERS, Prompts
from genserve_backend.settings import RerankSettings
from genserve_backend.worker.isolate import DeviceLost

KIND = "causal"
"""The kind of reranker that vLLM serves."""
ENVIRONMENT = {
    "VLLM_CONFIGURE_LOGGING": "0",  # its log lines have our format
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # all of its processes are on this machine
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit our threads and their locks
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers would be bound to the same cores
}
"""Defaults for vLLM's environment variables."""
CPU_BLOCK = 32
"""Block size of the key-value cache on a CPU, in tokens. vLLM's own 128 is more than most prompts share."""


class VllmCausal(Scorer):
    """A ForCausalLM reranker in vLLM.

    An output is the logit of "yes" minus that of "no" after the last token; score = its sigmoid.

    Args:
        checkpoint: The folder to load.
        settings: The limits, passed on to vLLM.
        device: The device to run on.
        max_length: Tokens of a prompt, at most.

    Raises:
        CheckpointError: vLLM is not installed, or cannot serve this checkpoint on this device.
    """

    packs = True

    def __init__(
        self, checkpoint: RerankCheckpoint, settings: RerankSettings, device: torch.device, *, max_length: int
    ) -> None:
        if checkpoint.kind != KIND:
            raise CheckpointError(
                f"ENGINE is vllm, which serves {KIND} rerankers (ForCausalLM) alone; {checkpoint.path} is a "
                f"{checkpoint.kind}: set ENGINE to torch"
            )
        llm_class = _import_llm(device)
        _require_no_bias(checkpoint)
        config = load_config(checkpoint.path)
        self._prompts = Prompts(
            checkpoint,
            config=config,
            tokenizer=load_tokenizer(checkpoint.path),
            max_length=max_length,
            shares=False,  # vLLM finds shared prefixes by itself
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.llm: Any = llm_class(
                model=str(checkpoint.path),
                load_format="safetensors",
                use_tqdm_on_load=False,
                max_model_len=max_length,
                **_as_reranker(),
                **_limits(config, settings, device, max_length=max_length),
            )
        self._is_parallel = settings.tensor_parallel_size > 1
        self._reused_tokens = 0

    @property
    def prefix_tokens_reused(self) -> int:
        """Tokens of the prompts so far that vLLM's prefix cache had already computed."""
        return self._reused_tokens

    def tokenize(self, request: RerankRequest) -> Iterator[Slice]:
        """Yield a prompt for each window of each document."""
        return self._prompts.tokenize(request)

    def forward(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Score the prompts with vLLM, which may take several steps.

        Raises:
            DeviceLost: vLLM has failed and cannot go on.
        """
        from vllm import PoolingParams

        prompts = [{"prompt_token_ids": sequence.ids} for sequence in batch]
        logits = PoolingParams(use_activation=False)
        try:
            results = self.llm.encode(prompts, logits, pooling_task="classify", use_tqdm=False)
        except Exception as error:
            self._recover(error)
            raise
        self._reused_tokens += sum(result.num_cached_tokens for result in results)
        return torch.stack([result.outputs.data for result in results]).float().cpu()

    def scores(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of the logit differences."""
        return outputs[:, 0].sigmoid()

    def _recover(self, error: Exception) -> None:
        """Prepare vLLM for the next forward after a failed one; raise DeviceLost if that is impossible.

        vLLM counts keys and values as cached as soon as it plans to compute them, so those of a failed forward have to
        be evicted. With tensor parallelism only some of its processes may have done the step.
        """
        try:
            engine = self.llm.llm_engine
            is_ready = not self._is_parallel and not engine.has_unfinished_requests() and engine.reset_prefix_cache()
        except Exception:  # the first error is the one to report
            is_ready = False
        if not is_ready:
            raise DeviceLost(f"vLLM cannot go on after {type(error).__name__}") from error


def _import_llm(device: torch.device) -> Any:
    """Import vLLM's engine class, configured to live and log inside this worker process."""
    if importlib.util.find_spec("vllm") is None:
        raise CheckpointError("ENGINE is vllm, but the package vllm is not installed in the workers' Python")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its scheduler runs in this process and ends with it. Processes of tensor parallelism end when their pipe closes.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM
            from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"ENGINE is vllm, but the package vllm cannot be imported: {reason}") from error
    if current_platform.device_type != device.type:
        runs_on = current_platform.device_type or "nothing"
        raise CheckpointError(f"ENGINE is vllm, which runs on {runs_on} here, and this instance on {device.type}")
    return LLM


def _as_reranker() -> dict[str, Any]:
    """Return the options that make vLLM compute only the difference of the two answers' logits, for each prompt."""
    return {
        "runner": "pooling",
        "convert": "classify",
        "hf_overrides": {"method": "from_2_way_softmax", "classifier_from_token": list(ANSWERS)},
        "enable_chunked_prefill": True,  # a prompt may be longer than a step
    }


def _limits(config: Any, settings: RerankSettings, device: torch.device, *, max_length: int) -> dict[str, Any]:
    """Translate our settings into vLLM's options."""
    budget = settings.token_budget(str(device))
    dtype = resolve_dtype(settings.dtype, str(device))
    limits: dict[str, Any] = {
        "dtype": dtype,
        "max_num_batched_tokens": budget,
        "max_num_seqs": min(settings.max_num_seqs, budget),  # vLLM rejects more sequences than tokens
        "enable_prefix_caching": settings.prefix_cache_bytes > 0,
    }
    if device.type == "cuda":
        parallel = settings.tensor_parallel_size
        limits |= {"gpu_memory_utilization": settings.gpu_memory_utilization, "tensor_parallel_size": parallel}
        return limits | ({"distributed_executor_backend": "mp"} if parallel > 1 else {})
    blocks = -(-max(max_length, budget) // CPU_BLOCK) + 1  # vLLM reserves one
    forward_bytes = blocks * CPU_BLOCK * _bytes_per_token(config, dtype)
    return limits | {
        "enforce_eager": True,  # compiling takes minutes on a CPU
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": forward_bytes + settings.prefix_cache_bytes,
    }


def _bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the memory of the keys and values of a token."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)


def _require_no_bias(checkpoint: RerankCheckpoint) -> None:
    """Raise CheckpointError for a bias of the logits, which vLLM ignores when it extracts the answers' weights."""
    for file in checkpoint.path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            if "lm_head.bias" in weights.keys():  # noqa: SIM118  # no mapping
                raise CheckpointError(f"{checkpoint.path} has a bias behind its last matrix: set ENGINE to torch")
