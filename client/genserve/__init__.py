"""GenServe's client: FLUX and a reranker behind Triton, in two verbs.

>>> from genserve import Client
>>> with Client("localhost:8001") as client:
...     image = client.generate("a red circle on a blue background", seed=7)
...     ranked = client.rerank("capital of France", ["Paris is ...", "Berlin is ..."], top_n=1)
"""

from genserve.client import Client
from genserve.errors import (
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    OutOfMemory,
    QueueFull,
    ServerError,
    ServerUnavailable,
)
from genserve.types import GeneratedImage, ModelStatus, RankedDocument, ServerStatus

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "GenServeError",
    "GeneratedImage",
    "InvalidInput",
    "ModelStatus",
    "OutOfMemory",
    "QueueFull",
    "RankedDocument",
    "ServerError",
    "ServerStatus",
    "ServerUnavailable",
]
