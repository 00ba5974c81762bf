"""torch.compile in workers: the folder that keeps its code for the next start, and the end of its processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from genserve_backend.logs import log

FOLDER_ENV = "TORCHINDUCTOR_CACHE_DIR"
"""torch's own variable; Triton's cache is below this folder too."""

logger = logging.getLogger(__name__)


def use_cache(folder: Path | None) -> None:
    """Keep compiled code in a folder that only this user can access. Call it before anything is compiled.

    Without such a folder the start takes longer, but succeeds: torch then uses one in the temporary directory.

    Args:
        folder: None keeps the folder of torch's own variable, or else selects the default one.
    """
    if folder is None and os.environ.get(FOLDER_ENV):
        return
    try:
        chosen = folder or default_folder(os.environ)
        chosen.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = chosen.stat().st_uid
        if owner != os.getuid():
            # What is in the folder will be executed.
            raise PermissionError(f"{chosen} belongs to user {owner}")
        if not os.access(chosen, os.W_OK | os.X_OK):
            raise PermissionError(f"{chosen} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        log(logger, logging.WARNING, "compiled code is not kept", reason=str(error))
        return
    os.environ[FOLDER_ENV] = str(chosen)


def stop_compilers() -> None:
    """End the processes in which Inductor compiles for GPUs; it starts new ones if it has to compile again.

    By itself it ends the workers after a minute, and keeps their parent, which has imported torch too.
    """
    from torch._inductor.async_compile import shutdown_compile_workers  # the import starts them

    shutdown_compile_workers()


def default_folder(environ: Mapping[str, str]) -> Path:
    """Return the folder below the one that `genserve serve` fetches binaries to.

    Raises:
        RuntimeError: The user has no home.
    """
    if own := environ.get("GENSERVE_CACHE_DIR"):
        return Path(own) / "compiled"
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "genserve" / "compiled"
