"""GenServe client: image generation with FLUX and reranking, served by Triton.

>>> from genserve import Client
>>> with Client("localhost:8001") as client:
...     image = client.generate("a red circle on a blue background", seed=7)
...     ranked = client.rerank("capital of France", ["Paris is ...", "Berlin is ..."], top_n=1)
"""

from genserve.access import TLS
from genserve.aio import AsyncClient
from genserve.bulk import MapResult
from genserve.client import Client
from genserve.errors import (
    Cancelled,
    DeadlineExceeded,
    GenServeError,
    InvalidInput,
    NotAllowed,
    OutOfMemory,
    QueueFull,
    ServerError,
    ServerUnavailable,
)
from genserve.handles import AsyncTask, Task
from genserve.protocol import Call, Outputs
from genserve.transport import AsyncTransport, Transport
from genserve.types import (
    GeneratedImage,
    ImageFormat,
    InstanceLoad,
    ModelStatus,
    Priority,
    RankedDocument,
    Ranking,
    ServerStatus,
    Setting,
    TaskState,
    TaskStatus,
)

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncTask",
    "AsyncTransport",
    "Call",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "GenServeError",
    "GeneratedImage",
    "ImageFormat",
    "InstanceLoad",
    "InvalidInput",
    "MapResult",
    "ModelStatus",
    "NotAllowed",
    "OutOfMemory",
    "Outputs",
    "Priority",
    "QueueFull",
    "RankedDocument",
    "Ranking",
    "ServerError",
    "ServerStatus",
    "ServerUnavailable",
    "Setting",
    "Task",
    "TaskState",
    "TaskStatus",
    "Transport",
]
