"""Result types."""

from __future__ import annotations

import io
import json
import sys

import pytest
from PIL import Image

from genserve import RankedDocument, Ranking, TaskStatus

BEST = RankedDocument(2, 0.9, "c")
REST = [RankedDocument(0, 0.5, "a"), RankedDocument(1, 0.1, "b")]
DOCUMENTS = [BEST, *REST]


def ranking(**info: object) -> Ranking:
    return Ranking(tuple(DOCUMENTS), (0.5, 0.1, 0.9), dict(info))


def test_ranking_behaves_like_a_list() -> None:
    ranked = ranking()
    assert list(ranked) == DOCUMENTS
    assert (len(ranked), ranked[0], ranked[-1]) == (3, BEST, REST[-1])
    assert ranked[1:] == REST
    with pytest.raises(IndexError):
        ranked[3]
    assert not Ranking((), (), {})


def test_ranking_compares_by_documents() -> None:
    as_list = list(DOCUMENTS)
    assert ranking() == as_list
    assert as_list == ranking()
    assert ranking() == tuple(DOCUMENTS)
    assert ranking(elapsed_time=1) == ranking(elapsed_time=2)
    assert ranking() != DOCUMENTS[::-1]
    assert ranking() != REST
    assert ranking() != "cab"
    assert hash(ranking()) == hash(ranking(elapsed_time=2)) == hash(tuple(DOCUMENTS))


def test_ranking_reports_truncated_documents() -> None:
    assert ranking(truncated=[1, 2]).truncated == (1, 2)
    assert ranking().truncated == ()


def test_ranking_becomes_a_table_in_its_order() -> None:
    table = ranking().to_pandas()
    assert list(table.columns) == ["index", "score", "document"]
    assert table["index"].tolist() == [2, 0, 1]
    assert table["score"].tolist() == [0.9, 0.5, 0.1]
    assert table["document"].tolist() == ["c", "a", "b"]
    assert list(table.index) == [0, 1, 2]
    empty = Ranking((), (), {}).to_pandas()
    assert empty.empty
    assert empty.dtypes.equals(table.dtypes)


def test_table_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install 'genserve\[pandas\]'"):
        ranking().to_pandas()


def test_preview_is_decoded_if_present() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG")
    preview = TaskStatus("x", "running", preview=buffer.getvalue()).preview_image
    assert preview is not None
    assert preview.size == (8, 4)
    assert TaskStatus("x", "running").preview_image is None


def test_task_as_dict_is_json_without_preview() -> None:
    task = TaskStatus("x", "failed", 1, 4, "flux", "flux_0_0", "ServerError: x", 1.0, 2.0, b"\xff")
    assert json.loads(json.dumps(task.as_dict())) == {
        "task_id": "x",
        "state": "failed",
        "step": 1,
        "steps": 4,
        "model": "flux",
        "instance": "flux_0_0",
        "error": "ServerError: x",
        "arrived": 1.0,
        "changed": 2.0,
    }
    assert "preview" not in repr(task)
