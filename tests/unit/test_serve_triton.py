"""Fetching tritonserver and its command line, without running it."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genserve.serve import process, triton, wheels
from genserve.serve.options import ServeError, ServeOptions
from genserve.serve.ports import check_ports
from genserve.serve.process import clear_abandoned_segments
from genserve.serve.triton import STUB, Triton, embedded_triton, find_libpython, find_triton
from genserve.serve.wheels import STUB_NUMPY, TRITON, check_platform, fetch
from genserve_backend.worker.link import WORKER_PATH_ENV

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PORTS_FLAGS = [("http_port", "--http-port"), ("grpc_port", "--grpc-port"), ("metrics_port", "--metrics-port")]


# The command line.


def command(options: ServeOptions, **values: Any) -> list[str]:
    return Triton(Path("/bin/tritonserver"), source="PATH", **values).command(
        options, repository=Path("/rendered"), shm_prefix="genserve-1-2-"
    )


def test_command_line_reflects_the_options() -> None:
    options = ServeOptions(
        host="0.0.0.0", http_port=9000, grpc_port=9001, metrics_port=9002, exit_timeout_s=7, repository=Path("/given")
    )
    line = command(options, arguments=("--cache-directory=/c",))
    assert line[0] == "/bin/tritonserver"
    assert {
        "--model-repository=/rendered",
        "--http-address=0.0.0.0",
        "--http-port=9000",
        "--grpc-address=0.0.0.0",
        "--grpc-port=9001",
        "--metrics-address=0.0.0.0",
        "--metrics-port=9002",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--exit-timeout-secs=7",
        "--backend-config=python,shm-region-prefix-name=genserve-1-2-",
        "--log-info=false",
        "--cache-directory=/c",
    } <= set(line)
    assert not any("/given" in word for word in line)


def test_verbose_enables_triton_info_lines() -> None:
    assert "--log-info=true" in command(ServeOptions(verbose=True))


@pytest.mark.parametrize("present", [True, False], ids=["gpu", "no-gpu"])
def test_gpu_metrics_are_off_without_a_gpu(present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidiactl"
    if present:
        device.touch()
    monkeypatch.setattr(triton, "NVIDIA_DEVICE", device)
    assert ("--allow-gpu-metrics=false" in command(ServeOptions())) != present


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("fd00::2", "[fd00::2]"),
        ("example.org", "example.org"),
    ],
    ids=str,
)
def test_addresses_are_reachable_from_this_machine(host: str, address: str) -> None:
    assert ServeOptions(host=host).addresses == {
        "http": f"http://{address}:8000",
        "grpc": f"{address}:8001",
        "metrics": f"http://{address}:8002/metrics",
    }


# The platform and the interpreter.


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    system: str = "Linux",
    machine: str = "x86_64",
    libc: tuple[str, str] = ("glibc", "2.39"),
) -> None:
    monkeypatch.setattr(sys, "platform", system.lower())
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)


@pytest.mark.parametrize(
    "libc", [("glibc", "2.35"), ("glibc", "2.100"), ("glibc", "3.0"), ("glibc", "2.36.9000")], ids=str
)
def test_supported_platform_passes(libc: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, libc=libc)
    check_platform(TRITON)


@pytest.mark.parametrize(
    ("pretended", "message"),
    [
        (
            {"system": "Darwin", "machine": "arm64"},
            "Linux on x86_64 only, and this is Darwin on arm64: use the container",
        ),
        ({"machine": "aarch64"}, "Linux on x86_64 only, and this is Linux on aarch64: use the container"),
        ({"libc": ("glibc", "2.31")}, "needs glibc 2.35 or later, found 2.31: use the container"),
        ({"libc": ("glibc", "2.9")}, "needs glibc 2.35 or later, found 2.9: use the container"),
        ({"libc": ("", "")}, "needs glibc 2.35 or later, found none (musl?): use the container"),
    ],
    ids=["mac", "arm", "old-glibc", "older-glibc", "musl"],
)
def test_unsupported_platform_is_referred_to_the_container(
    pretended: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **pretended)
    with pytest.raises(ServeError) as caught:
        check_platform(TRITON)
    assert str(caught.value).startswith("nvidia-pytriton ")
    assert message in str(caught.value)


@pytest.mark.parametrize("version", [(3, 9), (3, 13)], ids=str)
def test_unsupported_python_is_rejected(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", FakeVersion((*version, 0)))
    with pytest.raises(ServeError, match=rf"Python 3.10 to 3.12, not {version[0]}\.{version[1]}: "):
        find_libpython()


class FakeVersion(tuple[int, ...]):
    """Substitute for sys.version_info."""

    __slots__ = ()

    @property
    def major(self) -> int:
        return self[0]

    @property
    def minor(self) -> int:
        return self[1]


@pytest.fixture
def supported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", FakeVersion((3, 11, 7)))


def test_python_without_shared_library_is_rejected(
    supported_python: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path), "MULTIARCH": None}.get)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "prefix"))
    with pytest.raises(ServeError) as caught:
        find_libpython()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'prefix'} has no libpython3.11.so.1.0, which Triton needs: ")
    assert "install libpython3.11," in message
    assert "\n" not in message


@pytest.mark.parametrize("place", ["libdir", "prefix/lib"])
def test_shared_library_is_found_in_libdir_or_prefix(
    place: str, supported_python: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", {"LIBDIR": str(tmp_path / "libdir"), "MULTIARCH": None}.get)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "prefix"))
    library = tmp_path / place / "libpython3.11.so.1.0"
    library.parent.mkdir(parents=True)
    library.touch()
    assert find_libpython() == library


# Fetching.


class Pip:
    """Fake pip that records its calls and installs a file or fails."""

    def __init__(self, *, returncode: int = 0, stderr: str = "") -> None:
        self.returncode, self.stderr = returncode, stderr
        self.commands: list[list[str]] = []
        self.requirements: list[str] = []

    def __call__(self, command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.requirements.append(Path(command[command.index("--requirement") + 1]).read_text())
        target = Path(command[command.index("--target") + 1])
        target.mkdir()
        (target / "file").touch()
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pretend(monkeypatch)
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("wheel", [TRITON, STUB_NUMPY], ids=lambda wheel: wheel.name)
def test_wheel_is_fetched_once_with_its_hashes(
    wheel: wheels.Wheel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    folder = fetch(wheel)
    assert folder == cache / wheel.folder_name
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert fetch(wheel) == folder
    (line,), (requirements,) = pip.commands, pip.requirements
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} <= set(line)
    assert requirements.startswith(f"{wheel.name}=={wheel.version} ")
    assert all(f"--hash=sha256:{digest}" in requirements for digest in wheel.sha256)


def test_each_python_has_its_own_numpy() -> None:
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in STUB_NUMPY.folder_name
    assert "cp" not in TRITON.folder_name


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: slow\nERROR: first\nERROR: no matching distribution\nnotice: a new pip", "no matching distribution"),
        ("Traceback\nOSError: no space left on device", "OSError: no space left on device"),
        ("", "pip ended with 2"),
    ],
    ids=["errors", "traceback", "silent"],
)
def test_failed_pip_gives_one_line_and_leaves_nothing(
    stderr: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip(returncode=2, stderr=stderr))
    with pytest.raises(ServeError) as caught:
        fetch(TRITON)
    assert str(caught.value) == f"cannot fetch {TRITON.name} {TRITON.version}: {reason}"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(subprocess, "run", Pip())
    assert fetch(TRITON).is_dir()


def test_unwritable_cache_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    monkeypatch.setenv("GENSERVE_CACHE_DIR", str(cache / "below"))
    monkeypatch.setattr(subprocess, "run", Pip())
    with pytest.raises(ServeError, match=r"cannot create .*below: .* \(set GENSERVE_CACHE_DIR to a folder"):
        fetch(TRITON)


def test_installed_triton_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_triton()
    assert (found.binary, found.source, found.arguments, found.environment) == (binary, "PATH", (), {})


@pytest.fixture
def fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache with the files of both wheels, and a libpython."""
    server = cache / TRITON.folder_name / "pytriton" / "tritonserver"
    for name in (
        "bin/tritonserver",
        "backends/python/libtriton_python.so",
        "backends/python/triton_python_backend_utils.py",
        f"backends/python/{STUB}",
        f"python_backend_stubs/{VERSION}/{STUB}",
    ):
        path = server / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (cache / STUB_NUMPY.folder_name / "numpy").mkdir(parents=True)
    monkeypatch.setattr(triton, "find_libpython", lambda: Path("/lib/of/python/libpython.so"))
    return server


def test_embedded_triton_uses_the_running_python(fetched: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/given")
    found = embedded_triton()
    assert found.binary == fetched / "bin" / "tritonserver"
    assert TRITON.version in found.source
    assert found.environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert found.environment["LD_LIBRARY_PATH"] == f"/lib/of/python{os.pathsep}/given"
    numpy = str(cache / STUB_NUMPY.folder_name)
    assert found.environment["PYTHONPATH"].split(os.pathsep)[0] == numpy
    assert numpy not in found.environment[WORKER_PATH_ENV]
    assert found.environment[WORKER_PATH_ENV] in found.environment["PYTHONPATH"]


def test_backend_stub_matches_the_running_python(fetched: Path) -> None:
    for _ in range(2):
        (argument,) = [word for word in embedded_triton().arguments if word.startswith("--backend-directory=")]
        python = Path(argument.partition("=")[2]) / "python"
        assert (python / STUB).read_text() == f"python_backend_stubs/{VERSION}/{STUB}"
        assert (python / "libtriton_python.so").read_text() == "backends/python/libtriton_python.so"
        assert (python / "triton_python_backend_utils.py").is_file()


# Ports and shared memory.


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def with_ports(*, http_port: int, grpc_port: int, metrics_port: int) -> ServeOptions:
    return ServeOptions(http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


@pytest.mark.parametrize(("field", "flag"), PORTS_FLAGS, ids=[flag for _, flag in PORTS_FLAGS])
def test_port_in_use_is_reported_with_its_flag(field: str, flag: str, listening: int) -> None:
    ports = {"http_port": free_port(), "grpc_port": free_port(), "metrics_port": free_port()}
    check_ports(with_ports(**ports))
    with pytest.raises(ServeError) as caught:
        check_ports(with_ports(**{**ports, field: listening}))
    assert str(caught.value) == f"port {listening} on 127.0.0.1: Address already in use (choose another with {flag})"


def test_foreign_address_is_reported() -> None:
    with pytest.raises(ServeError, match=r"port \d+ on 192\.0\.2\.1: Cannot assign requested address"):
        check_ports(ServeOptions(host="192.0.2.1", http_port=free_port()))


def test_unresolvable_host_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_arguments: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "socket", FakeSocket)
    monkeypatch.setattr(FakeSocket, "bind", unknown)
    with pytest.raises(ServeError, match="on nowhere: Name or service not known"):
        check_ports(ServeOptions(host="nowhere"))


class FakeSocket(socket.socket):
    """Socket with a replaceable bind."""


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(process, "SHM_FOLDER", tmp_path)
    return tmp_path


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    return ended.pid


def test_only_segments_of_dead_servers_are_removed(segments: Path) -> None:
    dead = dead_pid()
    abandoned = [f"genserve-{dead}-0badcafe-region_1", f"genserve-{dead}-0badcafe-region_2"]
    kept = [
        f"genserve-{os.getpid()}-0badcafe-region_1",
        f"other-{dead}-region",
        f"genserve{dead}-region",
        "genserve-notes-txt",
        "genserve-",
    ]
    for name in (*abandoned, *kept):
        (segments / name).touch()
    clear_abandoned_segments()
    assert sorted(path.name for path in segments.iterdir()) == sorted(kept)


def test_segments_of_another_user_are_kept(segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = dead_pid()
    foreign, own = segments / f"genserve-{dead}-a-foreign", segments / f"genserve-{dead}-b-own"
    foreign.touch()
    own.touch()
    unlink = Path.unlink

    def unlink_own(path: Path, missing_ok: bool = False) -> None:
        if path == foreign:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_own)
    clear_abandoned_segments()
    assert foreign.exists()
    assert not own.exists()
