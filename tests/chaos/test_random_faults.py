"""A short run of perf/studies/random_faults.py: random faults under mixed load."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from studies import random_faults


@pytest.mark.timeout(400)
def test_every_request_gets_the_right_response_despite_random_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("flux", "rerank"):
        monkeypatch.setenv(f"{model.upper()}_MODEL_PATH", str(ROOT / "demo" / model))
    report = random_faults.run(seconds=20, count=3, seed=1, callers=2, log=tmp_path / "server.log")
    assert len(report.faults) >= 3
    assert report.passed, report
