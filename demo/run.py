"""`make demo`: a server on free ports, one image and three rankings."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from genserve import Client
from genserve.serve.ports import free_ports

OUT = Path(__file__).parent / "out"
GENSERVE = Path(sys.executable).parent / "genserve"
PROMPT = "a red circle on a blue background"
DOCUMENTS = [
    "The Eiffel Tower was finished in 1889 and stands in Paris.",
    "Paris is the capital and largest city of France.",
    "Berlin is the capital of Germany.",
    "A croissant is a buttery, flaky pastry.",
    "Water boils at 100 degrees Celsius at sea level.",
    "The Great Wall of China is thousands of kilometres long.",
    "Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen.",
    "A GPU runs thousands of threads at the same time.",
]
QUESTIONS = {
    "What is the capital of France?": 1,
    "At which temperature does water boil?": 4,
    "How do plants get their energy?": 6,
}
"""Index of the right document, by question."""


def genserve(*arguments: str) -> None:
    """Print and run a `genserve` command."""
    print(f"$ genserve {shlex.join(arguments)}", flush=True)
    environment = {**os.environ, "GENSERVE_STATE_DIR": str(OUT / "state")}
    if subprocess.run([GENSERVE, *arguments], env=environment, check=False).returncode:
        raise SystemExit(1)


def rank(client: Client) -> list[dict[str, object]]:
    """Rank the documents for each question, and print the best ones."""
    rankings: list[dict[str, object]] = []
    for question, answer in QUESTIONS.items():
        ranked = client.rerank(question, DOCUMENTS)
        mark = "right" if ranked[0].index == answer else "WRONG"
        print(f"{mark}: {question}")
        for document in ranked[:3]:
            print(f"    {document.score:.4f}  {document.document}")
        rankings.append(
            {
                "question": question,
                "right": ranked[0].index == answer,
                "ranking": [{"index": each.index, "score": each.score, "document": each.document} for each in ranked],
            }
        )
    return rankings


def main() -> None:
    """Run the demo; fail unless the right document comes first for every question."""
    started = time.monotonic()
    OUT.mkdir(exist_ok=True)
    http_port, grpc_port, metrics_port = map(str, free_ports(3))
    genserve("serve", "--detach", "--http-port", http_port, "--grpc-port", grpc_port, "--metrics-port", metrics_port)
    url = f"localhost:{grpc_port}"
    try:
        genserve("generate", PROMPT, "-o", str(OUT / "image.png"), "--steps", "20", "--seed", "7", "--url", url)
        with Client(url) as client:
            rankings = rank(client)
        genserve("status", "--url", url)
    finally:
        genserve("stop", "--http-port", http_port)
    (OUT / "ranking.json").write_text(json.dumps(rankings, indent=2) + "\n")
    print(f"image:   {OUT / 'image.png'}\nranking: {OUT / 'ranking.json'}")
    print(f"done in {time.monotonic() - started:.0f} s; `make up` serves until Ctrl-C")
    if not all(ranking["right"] for ranking in rankings):
        raise SystemExit("demo: the right document did not come first")


if __name__ == "__main__":
    main()
