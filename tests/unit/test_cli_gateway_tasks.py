"""Options of `genserve gateway` for durable tasks, files and webhooks."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from genserve.cli import main


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str, **environment: str) -> tuple[Result, Any]:
    """Return the result of `genserve gateway` and its settings, None if it does not run."""
    seen: list[Any] = [None]
    monkeypatch.setattr("uvicorn.run", lambda app, **_: seen.append(app.state.settings))
    result = CliRunner().invoke(main, ["gateway", *arguments], env=environment)
    return result, seen[-1]


def test_options_and_environment_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b64encode(b"s" * 32).decode()
    result, settings = options(
        monkeypatch,
        *("--port", "4321", "--keep-tasks", "2d", "--keep-files", "90", "--max-tasks", "7"),
        *("--webhook-allow", "10.0.0.0/8", "--webhook-allow", "hooks", "--public-url", "https://a.example/"),
        GENSERVE_STATE_DIR=str(tmp_path),
        GENSERVE_WEBHOOK_SECRET=secret,
        GENSERVE_RESULTS=str(tmp_path / "images"),
    )
    assert result.exit_code == 0, result.output
    assert settings.tasks == f"sqlite:///{tmp_path}/gateway-4321/tasks.db"
    assert (tmp_path / "gateway-4321" / "tasks.db").exists()
    assert (settings.keep_tasks_s, settings.keep_files_s, settings.max_tasks) == (172_800, 90, 7)
    assert (settings.webhook_allow, settings.public_url) == (("10.0.0.0/8", "hooks"), "https://a.example")
    assert settings.results == tmp_path / "images"
    assert settings.webhook_secret.get_secret_value() == secret
    assert secret not in repr(settings)


def test_tasks_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, settings = options(monkeypatch, "--tasks", "off", GENSERVE_STATE_DIR=str(tmp_path))
    assert result.exit_code == 0, result.output
    assert settings.tasks is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mysql://u:hidden@h/n"], "mysql is not supported; allowed: sqlite:///PATH"),
        (["--tasks", "postgresql://u:hidden@127.0.0.1:1/n"], "StoreUnavailable: the database of the tasks"),
        (["--tasks", "sqlite:////proc/none/tasks.db"], "/proc/none: "),
        (["--webhook-secret", "hidden"], "allowed: 24 to 64 bytes in base64"),
        (["--webhook-allow", "10.0.0.0/99"], "neither a network"),
        (["--public-url", "nowhere"], "Error: the public URL has another form"),
        (["--keep-tasks", "soon"], "'soon' is not a length of time; allowed: as 90s, 30m, 24h or 7d"),
        (["--keep-files", "0h"], "'0h' is not a length of time"),
    ],
)
def test_unusable_options_are_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, settings = options(monkeypatch, *arguments, GENSERVE_STATE_DIR=str(tmp_path))
    assert settings is None
    assert result.exit_code in {1, 2}
    assert message in result.output.splitlines()[-1]
    assert "hidden" not in result.output
