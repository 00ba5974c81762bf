"""All prompts in one call of vLLM's build for CPUs, with the Python of vLLM's environment.

``python vllm_pairs.py CHECKPOINT PROMPTS.json BLOCK`` prints JSON: seconds and scores. PROMPTS.json has lists of token
ids. BLOCK is the prefix cache's block size in tokens; 0 turns the cache off. perf/compare/rerank_prefix.py calls it.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.update(
    VLLM_CONFIGURE_LOGGING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0"
)

from vllm import LLM, PoolingParams


def main(checkpoint: str, prompts_path: str, block: int) -> None:
    """Load the model, warm up, and score all prompts."""
    llm = LLM(
        model=checkpoint,
        runner="pooling",
        convert="classify",
        hf_overrides={"method": "from_2_way_softmax", "classifier_from_token": ["no", "yes"]},
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=block > 0,
        kv_cache_memory_bytes=2 * 2**30,
        **({"block_size": block} if block else {}),
    )
    warm_up, *prompts = (
        [{"prompt_token_ids": ids} for ids in each] for each in json.loads(Path(prompts_path).read_text())
    )

    def scores(asked: list[dict[str, list[int]]]) -> list[float]:
        answers = llm.encode(asked, PoolingParams(use_activation=True), pooling_task="classify", use_tqdm=False)
        return [float(answer.outputs.data) for answer in answers]

    scores(warm_up)
    started = time.monotonic()
    found = scores([prompt for each in prompts for prompt in each])
    print("\n" + json.dumps({"seconds": time.monotonic() - started, "scores": found}), flush=True)
    os._exit(0)  # a thread of vLLM sometimes ends the process with an error


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
