"""Place of an instance: its model, its device and its repository, from Triton's ``initialize`` arguments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Model, instance and device that Triton assigns to an instance."""

    model: str
    instance: str
    device: str
    """Device in torch's notation: ``cuda:N`` or ``cpu``."""
    gpu_id: int | None
    parameters: dict[str, str]
    """The ``parameters {}`` of the model's config.pbtxt."""
    repository: Path

    @classmethod
    def of(cls, args: dict[str, str]) -> Place:
        """Parse Triton's arguments."""
        on_gpu = args["model_instance_kind"] == "GPU"
        gpu_id = int(args["model_instance_device_id"]) if on_gpu else None
        config = json.loads(args["model_config"])
        return cls(
            model=args["model_name"],
            instance=args["model_instance_name"],
            device="cpu" if gpu_id is None else f"cuda:{gpu_id}",
            gpu_id=gpu_id,
            parameters={name: value["string_value"] for name, value in config.get("parameters", {}).items()},
            repository=Path(args["model_repository"]).parent,
        )

    def describe(self) -> dict[str, object]:
        """Return the fields that every INFO has."""
        return {"instance": self.instance, "device": self.device}
