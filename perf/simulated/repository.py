"""Model repository and import path of servers with a simulated device."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from common.command import FLUX_CHECKPOINT, ROOT

ENGINE, SIMULATED_ENGINE = "genserve_backend.flux.build:build", "simulated.engine:build"


@dataclass(frozen=True)
class SimulatedRepository:
    """Rendered folders.

    Attributes:
        models: The model repository, for ``--repository``.
        packages: Folder for PYTHONPATH. `genserve serve` passes folders of the name ``site-packages`` on to workers.
    """

    models: Path
    packages: Path


def render(folder: Path) -> SimulatedRepository:
    """Write the repository of `flux` and `tasks` into `folder`: the real one, except for the name of FLUX's engine.

    Raises:
        ValueError: FLUX's model.py does not name its engine as expected.
    """
    models, packages = folder / "model_repository", folder / "site-packages"
    for name in ("flux", "tasks"):
        shutil.copytree(ROOT / "model_repository" / name, models / name, ignore=shutil.ignore_patterns("__pycache__"))
    model = models / "flux" / "1" / "model.py"
    source = model.read_text(encoding="utf-8")
    if source.count(ENGINE) != 1:
        raise ValueError(f"{ENGINE} is not in model_repository/flux/1/model.py exactly once")
    model.write_text(source.replace(ENGINE, SIMULATED_ENGINE), encoding="utf-8")
    packages.mkdir()
    (packages / "simulated").symlink_to(Path(__file__).parent, target_is_directory=True)
    return SimulatedRepository(models, packages)


def link_checkpoint(folder: Path, name: str) -> Path:
    """Return a checkpoint folder with this name, which INFO gives as ``model``. It is the demo's, never loaded."""
    checkpoint = folder / name
    checkpoint.symlink_to(FLUX_CHECKPOINT, target_is_directory=True)
    return checkpoint
