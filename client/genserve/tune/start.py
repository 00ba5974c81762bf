"""Configuration to start from: the environment in force, or that of a running server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genserve.serve.options import ServeError
from genserve.serve.process import MODEL_PATH_ENVS
from genserve.serve.repository import CHECKPOINTS, GPU_ENV, INSTANCE_ENV, parse_settings, read_config
from genserve.types import InstanceLoad, Setting
from genserve_backend.settings import Env, ModelSettings

FROM_ENVIRONMENT = "environment "
"""Start of a setting's source that names its variable."""
THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Variable with the threads per worker of torch, unless a setting has them."""
PATH_ENV = {"flux": "FLUX_MODEL_PATH", "rerank": "RERANK_MODEL_PATH"}


@dataclass(frozen=True)
class Start:
    """Configuration in force.

    Attributes:
        environment: The variables of the models' settings that are set, with absolute paths.
        repository: The model repository.
    """

    environment: Mapping[str, str]
    repository: Path

    def settings(self, model: str, values: Mapping[str, str], tuned: Sequence[str]) -> ModelSettings:
        """Return the settings of a model with other values of the tuned variables.

        Raises:
            ServeError: They are not usable.
        """
        others = {name: value for name, value in self.environment.items() if name not in tuned}
        config = read_config(self.repository / model / "config.pbtxt")
        return parse_settings(model, config, self.repository, {**others, **values})


def variables(model: str) -> tuple[str, ...]:
    """Return the environment variables of a model's settings and of its placement."""
    fields = CHECKPOINTS[model][0].model_fields.values()
    own = (str(mark) for field in fields for mark in field.metadata if isinstance(mark, Env))
    return (*own, INSTANCE_ENV[model], GPU_ENV[model])


def from_environment(models: Sequence[str], repository: Path, environ: Mapping[str, str] = os.environ) -> Start:
    """Return the configuration of a server that starts in this environment."""
    names = dict.fromkeys([*(name for model in models for name in variables(model)), THREADS_VARIABLE])
    found = {name: environ[name] for name in names if environ.get(name)}
    paths = {name: str(Path(found[name]).absolute()) for name in MODEL_PATH_ENVS if name in found}
    return Start({**found, **paths}, repository)


def from_server(
    models: Sequence[str], repository: Path, settings: Sequence[Setting], instances: Sequence[InstanceLoad]
) -> Start:
    """Return the configuration of a running server.

    Args:
        models: Names of the models.
        repository: The model repository for the trials.
        settings: The server's settings, from `Client.config`.
        instances: The server's instances, from `Client.gpu_load`.

    Raises:
        ServeError: The server does not have a model, or its checkpoint is not on this machine.
    """
    found: dict[str, str] = {}
    for model in models:
        own = {setting.name: setting for setting in settings if setting.model == model}
        counts = Counter(instance.device for instance in instances if instance.model == model)
        if not own or not counts:
            raise ServeError(f"the server has no instance of {model}")
        path = Path(own["model_path"].value)
        if not path.is_dir():
            raise ServeError(f"{model}: no checkpoint at {path}; tune a server on its own machine")
        for setting in own.values():
            if setting.source.startswith(FROM_ENVIRONMENT):
                found[setting.source.removeprefix(FROM_ENVIRONMENT)] = _text(setting.value)
        found[PATH_ENV[model]] = str(path)
        if (count := max(counts.values())) > 1:
            found[INSTANCE_ENV[model]] = str(count)
    return Start(found, repository)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
