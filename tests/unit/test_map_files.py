"""Files of `genserve map`: tasks, ids as file names, and results that survive any end of the process."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from genserve import GeneratedImage, RankedDocument, Ranking, ServerError
from genserve.map_files import FileProblem, MapTask, Results, file_stem, parse_tasks

IMAGE = GeneratedImage(b"pixels", 7, {"steps": 4})
RANKING = Ranking((RankedDocument(1, 0.5, "ä\u2028"), RankedDocument(0, 0.25, "b")), (0.25, 0.5), {"tokens": 9})

HOSTILE_IDS = (
    "../../outside",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a:b",
    "a b",
    "a\0b",
    "a\nb",
    "a\tb",
    "\0",
    ".",
    "..",
    ".hidden",
    "-rf",
    "_b",
    " ",
    "x" * 101,
    "x" * 100_000,
    "x.png/",
    "Ä",
    "A\u0308",
    "\U0001f600",
    "\u2028",
    "\ud800",
    "\udfff",
    "a\ud800",
    '"',
    "\\",
    "\\ud800",
)
PLAIN_IDS = ("a", "A", "7", "a-b_c.d", "a..", "a.png", "a.png.part", "x" * 100)


# Tasks.


def parse(*lines: bytes) -> list[tuple[str, dict[str, Any], str]]:
    return [(task.id, task.arguments, str(task.problem or "")) for task in parse_tasks(lines)]


def test_missing_id_is_the_number_of_the_line() -> None:
    lines = [b"\n", b'{"prompt": "a"}\r\n', b" \t\r\n", b'{"id": "mine", "prompt": "b"}\n', b"", b'{"prompt": "c"}']
    assert parse(*lines) == [
        ("2", {"prompt": "a"}, ""),
        ("mine", {"prompt": "b"}, ""),
        ("6", {"prompt": "c"}, ""),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "\xff"}', "line 2 is not UTF-8"),
        (b'{"prompt": "\xc3', "line 2 is not UTF-8"),
        (b'{"id": "\xed\xa0\x80"}', "line 2 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 2 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "line 2 is not JSON"),
        (b"a red circle", "line 2 is not JSON"),
        (b'{"prompt": "a"', "line 2 is not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "line 2 is not JSON"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "line 2 is not JSON"),
        (b'{"a": ' * 100_000, "line 2 is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "line 2 is not JSON"),
        (b"\0", "line 2 is not JSON"),
        (b'["a"]', "line 2 is not a JSON object"),
        (b'"a"', "line 2 is not a JSON object"),
        (b"null", "line 2 is not a JSON object"),
        (b"NaN", "line 2 is not a JSON object"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_unusable_line_is_a_problem_of_its_own(line: bytes, problem: str) -> None:
    good = b'{"prompt": "a"}\n'
    assert parse(good, line, good) == [("1", {"prompt": "a"}, ""), ("2", {}, problem), ("3", {"prompt": "a"}, "")]


@pytest.mark.parametrize("value", ["null", "7", "1.5", "true", '""', "[]", '{"id": "a"}', "NaN", "[" * 50 + "]" * 50])
def test_id_must_be_a_text(value: str) -> None:
    ((task_id, arguments, problem),) = parse(f'{{"id": {value}, "prompt": "a"}}'.encode())
    assert (task_id, arguments) == ("1", {})
    assert problem.startswith("line 1: id is ")
    assert problem.endswith("; allowed: a text, not empty")


def test_message_about_a_huge_id_is_short() -> None:
    ((_, _, problem),) = parse(json.dumps({"id": ["x" * 1000] * 1000}).encode())
    assert len(problem) < 150


@pytest.mark.parametrize("task_id", ["\ud800", "a\0b", "\U0001f600", "x" * 100_000, "2", " "])
def test_any_text_is_an_id(task_id: str) -> None:
    assert parse(json.dumps({"id": task_id, "seed": 1}).encode()) == [(task_id, {"seed": 1}, "")]


def test_byte_order_mark_is_ignored() -> None:
    assert parse(b'\xef\xbb\xbf{"prompt": "a"}\n') == [("1", {"prompt": "a"}, "")]
    assert parse(b"\xef\xbb\xbf\n", b'{"prompt": "a"}\n') == [("2", {"prompt": "a"}, "")]


def test_equal_ids_are_equal_tasks() -> None:
    """A line's number may be another line's id, too."""
    lines = [b'{"id": "2"}', b"{}", b'{"id": "2", "id": "a"}']
    assert [task_id for task_id, _, _ in parse(*lines)] == ["2", "2", "a"]


def test_lines_are_read_one_at_a_time() -> None:
    read = itertools.count()
    tasks = parse_tasks(f'{{"seed": {next(read)}}}'.encode() for _ in itertools.count())
    assert next(tasks).id == "1"
    assert next(read) == 1


# Ids as file names.


@pytest.mark.parametrize("task_id", PLAIN_IDS)
def test_plain_id_is_the_file_name(task_id: str) -> None:
    assert file_stem(task_id) == task_id


@pytest.mark.parametrize("task_id", HOSTILE_IDS, ids=lambda value: ascii(value[:20]))
def test_image_of_any_id_is_one_file_in_the_folder(task_id: str, tmp_path: Path) -> None:
    images = tmp_path / "a" / "images"
    results = Results(tmp_path / "results", images)
    results.add_image(MapTask(task_id, {}), IMAGE)
    results.close()
    (file,) = images.iterdir()
    assert file.read_bytes() == IMAGE.data
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {file, tmp_path / "results"}
    (result,) = read(tmp_path / "results")
    assert (result["id"], result["file"]) == (task_id, str(file))


def test_different_ids_have_different_files() -> None:
    ids = [*HOSTILE_IDS, *PLAIN_IDS, "ab", "a-b", "\udc80", "a\udc80", "a\\ud800", "x" * 102]
    assert len(set(ids)) == len(ids)
    names = {file_stem(task_id) for task_id in ids}
    assert len(names) == len(ids)
    assert all("/" not in name and len(name) <= 100 and name.isascii() for name in names)


@pytest.mark.parametrize(
    ("image_format", "name"),
    [("png", "a.png"), ("jpeg", "a.jpg"), ("webp", "a.webp"), (None, "a.png"), ("../x", "a.png"), ([], "a.png")],
    ids=str,
)
def test_format_selects_the_suffix(image_format: Any, name: str, tmp_path: Path) -> None:
    results = Results(tmp_path / "results", tmp_path / "images")
    results.add_image(MapTask("a", {} if image_format is None else {"format": image_format}), IMAGE)
    results.close()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [name]


# Results.


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def add_one_of_each(path: Path, *, suffix: str = "") -> bytes:
    """Add an image, a ranking and an error; return the file's bytes."""
    with closing(Results(path, path.with_name("images"))) as results:
        results.add_image(MapTask(f"image{suffix}", {}), IMAGE)
        results.add_ranking(MapTask(f"ranking{suffix}", {}), RANKING)
        results.add_error(MapTask(f"error{suffix}", {}), ServerError("broken \ud800"))
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def open_files() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


def reopened(path: Path, **options: Any) -> Results:
    """Return results that were opened and closed."""
    results = Results(path, path.with_name("images"), **options)
    results.close()
    return results


def test_lines_have_the_documented_form(path: Path) -> None:
    add_one_of_each(path)
    assert read(path) == [
        {
            "id": "image",
            "ok": True,
            "file": str(path.with_name("images") / "image.png"),
            "seed": 7,
            "info": {"steps": 4},
        },
        {
            "id": "ranking",
            "ok": True,
            "ranking": [
                {"index": 1, "score": 0.5, "document": "ä\u2028"},
                {"index": 0, "score": 0.25, "document": "b"},
            ],
            "info": {"tokens": 9},
        },
        {"id": "error", "ok": False, "error": {"class": "ServerError", "message": "broken \ud800"}},
    ]
    assert "ä".encode() in path.read_bytes(), "texts stay readable"


def test_results_are_continued(path: Path) -> None:
    before = add_one_of_each(path)
    results = reopened(path)
    assert results.ids == {"image", "ranking", "error"}
    assert results.failed == {"error"}
    assert path.read_bytes() == before
    assert add_one_of_each(path, suffix="2").startswith(before)
    assert len(read(path)) == 6


def test_every_id_is_found_again(path: Path) -> None:
    results = Results(path, path.with_name("images"))
    for task_id in (*HOSTILE_IDS, *PLAIN_IDS):
        results.add_error(MapTask(task_id, {}), ServerError(task_id))
    results.close()
    assert reopened(path).ids == {*HOSTILE_IDS, *PLAIN_IDS}
    path.read_bytes().decode()  # raises if it is not UTF-8


@pytest.mark.parametrize(("task_id", "first"), [("a", False), ('"\\" ä \ud800', True)], ids=["after-others", "alone"])
@pytest.mark.parametrize("kind", ["image", "ranking", "error"])
def test_half_line_is_removed_wherever_it_ends(kind: str, task_id: str, first: bool, path: Path) -> None:
    before = b"" if first else add_one_of_each(path)
    task = MapTask(task_id, {})

    def add() -> bytes:
        results = Results(path, path.with_name("images"))
        ids = results.ids
        match kind:
            case "image":
                results.add_image(task, IMAGE)
            case "ranking":
                results.add_ranking(task, RANKING)
            case _:
                results.add_error(task, ServerError("x"))
        results.close()
        assert ids == (set() if first else {"image", "ranking", "error"})
        return path.read_bytes()

    whole = add()
    assert whole.startswith(before)
    for end in range(len(before), len(whole)):
        path.write_bytes(whole[:end])
        reopened(path)
        assert path.read_bytes() == before
        path.write_bytes(whole[:end])
        assert add() == whole


GOOD = b'{"id": "a", "ok": true, "file": "a.png"}\n'
FOREIGN = {
    "text": b"hello\n",
    "text-without-end": b"hello",
    "binary": b"\x89PNG\r\n\x1a\n\0\0",
    "binary-without-end": b"\x93NUMPY\x01\0",
    "zeros": b"\0" * 64,
    "blank-line": b"\n",
    "space": b" ",
    "tasks": b'{"id": "a", "prompt": "x"}\n',
    "one-task-without-end": b'{"id": "a", "prompt": "x"}',
    "task-without-id": b'{"prompt": "x"}',
    "list": b"[]\n",
    "no-id": b'{"ok": true}\n',
    "no-ok": b'{"id": "a"}\n',
    "no-ok-without-end": b'{"id": "a"}',
    "number-as-id": b'{"id": 1, "ok": true}\n',
    "number-as-ok": b'{"id": "a", "ok": 1}\n',
    "null-as-ok": b'{"id": "a", "ok": null, "file": "x"}',
    "almost-ok": b'{"id": "a", "ok": tru}',
    "compact-without-end": b'{"id":"a","ok":true',
    "deep": b"[" * 100_000 + b"\n",
    "not-utf-8": b'{"id": "\xff", "ok": true}\n',
    "text-after-results": GOOD + b"hello\n",
    "text-after-results-without-end": GOOD + b"hello",
    "text-before-results": b"hello\n" + GOOD,
}


@pytest.mark.parametrize("retry_failed", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_refused_and_unchanged(name: str, retry_failed: bool, path: Path) -> None:
    path.write_bytes(FOREIGN[name])
    number = 2 if "after" in name else 1
    open_before = open_files()
    with pytest.raises(FileProblem, match=rf"results.jsonl, line {number}, is not a result of `genserve map`; choose"):
        Results(path, path.with_name("images"), retry_failed=retry_failed)
    assert path.read_bytes() == FOREIGN[name]
    assert list(path.parent.iterdir()) == [path]
    assert open_files() == open_before
    path.write_bytes(GOOD)
    assert reopened(path).ids == {"a"}, "the lock is gone"


def test_file_in_use_is_refused(path: Path) -> None:
    first = Results(path, path.with_name("images"))
    first.add_error(MapTask("a", {}), ServerError("x"))
    before = path.read_bytes()
    for retry_failed in (False, True):
        with pytest.raises(FileProblem, match=r"^.*results.jsonl is in use by another `genserve map`$"):
            Results(path, path.with_name("images"), retry_failed=retry_failed)
        assert path.read_bytes() == before
    first.add_error(MapTask("b", {}), ServerError("x"))
    first.close()
    assert reopened(path).ids == {"a", "b"}


def test_file_that_was_replaced_before_it_was_locked_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may replace the file, as with --retry-failed, between the two."""
    add_one_of_each(path)
    lock, calls = fcntl.flock, itertools.count()

    def replace_first(file: int, how: int) -> None:
        if next(calls) == 0:
            new = path.with_name("new")
            new.write_bytes(GOOD)
            new.replace(path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    results = Results(path, path.with_name("images"))
    assert results.ids == {"a"}
    results.add_error(MapTask("b", {}), ServerError("x"))
    results.close()
    assert [result["id"] for result in read(path)] == ["a", "b"]


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_no_parent(path: Path) -> None:
    path.parent.rmdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_folder, r"cannot write .*/results.jsonl: Is a directory"),
        (make_pipe, r".*/results.jsonl is not a regular file"),
        (make_no_parent, r"cannot write .*/results.jsonl: No such file or directory"),
        (make_loop, r"cannot write .*/results.jsonl: Too many levels of symbolic links"),
    ],
)
def test_unusable_path_is_one_message(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.jsonl"
    path.parent.mkdir()
    make(path)
    with pytest.raises(FileProblem, match=f"^{message}$"):
        Results(path, tmp_path / "images")


AS_NOBODY = """
import os, pathlib, sys
from genserve import GeneratedImage, ServerError
from genserve.map_files import FileProblem, MapTask, Results
if os.getuid() == 0:
    os.setuid(65534)
try:
    results = Results(pathlib.Path("closed/results.jsonl"), pathlib.Path("images"))
except FileProblem as problem:
    print(problem)
results = Results(pathlib.Path("open/results.jsonl"), pathlib.Path("closed/images"))
try:
    results.add_image(MapTask("a", {}), GeneratedImage(b"x", 1, {}))
except FileProblem as problem:
    print(problem)
"""


def test_read_only_places_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "results.jsonl").write_bytes(GOOD)
    for place, mode in (("closed/results.jsonl", 0o444), ("closed", 0o555), ("open", 0o777), (".", 0o755)):
        (tmp_path / place).chmod(mode)
    ran = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    (tmp_path / "closed").chmod(0o755)
    assert ran.stdout.splitlines() == [
        "cannot write closed/results.jsonl: Permission denied",
        "cannot write closed/images/a.png: Permission denied",
    ], ran.stderr
    assert (tmp_path / "closed" / "results.jsonl").read_bytes() == GOOD
    assert (tmp_path / "open" / "results.jsonl").read_bytes() == b""


# Images and lines.


def test_image_is_there_before_its_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    written = 0

    def check(file: int, data: bytes) -> int:
        nonlocal written
        result = json.loads(data)
        assert Path(result["file"]).read_bytes() == IMAGE.data
        written += 1
        return write(file, data)

    results = Results(path, path.with_name("images"))
    monkeypatch.setattr(os, "write", check)
    for task_id in ("a", "b/c"):
        results.add_image(MapTask(task_id, {}), IMAGE)
    monkeypatch.undo()
    results.close()
    assert written == 2


def test_image_is_replaced_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier image of the same task stays whole until the new one is."""
    results = Results(path, path.with_name("images"))
    results.add_image(MapTask("a", {}), GeneratedImage(b"old", 1, {}))
    monkeypatch.setattr(Path, "replace", failing(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(FileProblem, match=r"cannot write .*images/a.png: Input/output error"):
        results.add_image(MapTask("a", {}), IMAGE)
    monkeypatch.undo()
    assert (path.with_name("images") / "a.png").read_bytes() == b"old"
    assert len(read(path)) == 1
    results.add_image(MapTask("a", {}), IMAGE)
    results.close()
    assert (path.with_name("images") / "a.png").read_bytes() == IMAGE.data


def failing(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_file_in_place_of_the_folder_is_one_message(path: Path) -> None:
    path.with_name("images").write_bytes(b"mine")
    results = Results(path, path.with_name("images"))
    with pytest.raises(FileProblem, match=r"^cannot write .*/images/a.png: "):
        results.add_image(MapTask("a", {}), IMAGE)
    results.close()
    assert path.with_name("images").read_bytes() == b"mine"
    assert path.read_bytes() == b""


# Full disks.


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_short_writes_are_continued(size: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = add_one_of_each(path)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:size]))
    path.unlink()
    assert add_one_of_each(path) == whole


def test_full_disk_is_one_message_and_the_file_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = add_one_of_each(path)
    line = len(add_one_of_each(path, suffix="2")) - len(whole)
    write = os.write
    for room in range(0, line, 5):
        path.write_bytes(whole)
        left = room

        def full(file: int, data: bytes) -> int:
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = write(file, data[:left])
            left -= written
            return written

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(FileProblem, match=r"^cannot write .*results.jsonl: No space left on device$"):
            add_one_of_each(path, suffix="2")
        monkeypatch.undo()
        assert path.read_bytes().startswith(whole)
        results = reopened(path)
        assert {"image", "ranking", "error"} <= results.ids
        assert {result["id"] for result in read(path)} == results.ids


LIMITED = """
import pathlib, resource, sys
from genserve import GeneratedImage, ServerError
from genserve.map_files import FileProblem, MapTask, Results
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
results = Results(pathlib.Path("results.jsonl"), pathlib.Path("images"))
try:
    results.add_image(MapTask("large", {}), GeneratedImage(bytes(5000), 1, {}))
except FileProblem as problem:
    print(problem)
try:
    for number in range(1000):
        results.add_error(MapTask(str(number), {}), ServerError("x"))
except FileProblem as problem:
    print(problem)
print(number)
"""


def test_limit_on_file_sizes(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    *problems, number = ran.stdout.splitlines()
    assert problems == ["cannot write images/large.png: File too large", "cannot write results.jsonl: File too large"]
    path = tmp_path / "results.jsonl"
    assert path.stat().st_size == 4096, "the last line is half"
    assert not (tmp_path / "images" / "large.png").exists()
    assert reopened(path).ids == set(map(str, range(int(number))))
    assert [result["id"] for result in read(path)] == list(map(str, range(int(number))))


# Failed tasks again.


@pytest.fixture
def mixed(path: Path) -> Path:
    """Results of which every second failed, with a half line at the end."""
    results = Results(path, path.with_name("images"))
    for number in range(6):
        task = MapTask(str(number), {})
        if number % 2:
            results.add_error(task, ServerError("x"))
        else:
            results.add_ranking(task, RANKING)
    results.close()
    with path.open("ab") as file:
        file.write(b'{"id": "half", "ok": tr')
    return path


def test_retry_failed_removes_only_failed_results(mixed: Path) -> None:
    kept = [line for line in mixed.read_bytes().splitlines(keepends=True) if b'"ok": true' in line]
    mixed.chmod(0o640)
    results = Results(mixed, mixed.with_name("images"), retry_failed=True)
    assert results.ids == {"0", "2", "4"}
    assert results.failed == set()
    assert mixed.read_bytes() == b"".join(kept)
    results.add_ranking(MapTask("1", {}), RANKING)
    results.close()
    assert [result["id"] for result in read(mixed)] == ["0", "2", "4", "1"]
    assert list(mixed.parent.iterdir()) == [mixed]
    assert mixed.stat().st_mode & 0o777 == 0o640


def test_retry_failed_without_failed_results_changes_nothing(path: Path) -> None:
    path.write_bytes(GOOD)
    before = path.stat().st_ino
    assert reopened(path, retry_failed=True).ids == {"a"}
    assert (path.read_bytes(), path.stat().st_ino) == (GOOD, before)


def test_retry_failed_may_remove_everything(path: Path) -> None:
    results = Results(path, path.with_name("images"))
    results.add_error(MapTask("a", {}), ServerError("x"))
    results.close()
    assert reopened(path, retry_failed=True).ids == set()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_retry_failed_replaces_the_file_at_once(moment: str, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mixed.read_bytes()
    stop = failing(KeyboardInterrupt())
    monkeypatch.setattr(*((os, "write", stop) if moment == "write" else (Path, "replace", stop)))
    with pytest.raises(KeyboardInterrupt):
        Results(mixed, mixed.with_name("images"), retry_failed=True)
    monkeypatch.undo()
    assert mixed.read_bytes() == before
    with (mixed.parent / "results.jsonl.part").open("ab") as left:  # What is left of an attempt does no harm.
        left.write(b"x" * 10_000)
    assert reopened(mixed, retry_failed=True).ids == {"0", "2", "4"}
    assert [result["id"] for result in read(mixed)] == ["0", "2", "4"]
    assert list(mixed.parent.iterdir()) == [mixed]


def test_retry_failed_holds_the_lock_all_the_time(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace
    tried = 0

    def attempts() -> Iterator[None]:
        nonlocal tried
        with pytest.raises(FileProblem, match="is in use"):
            Results(mixed, mixed.with_name("images"))
        tried += 1
        yield

    def watched(self: Path, target: Path) -> Path:
        list(attempts())
        replaced = replace(self, target)
        list(attempts())
        return replaced

    monkeypatch.setattr(Path, "replace", watched)
    results = Results(mixed, mixed.with_name("images"), retry_failed=True)
    list(attempts())
    results.close()
    assert tried == 3


def test_retry_failed_keeps_a_link(mixed: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(mixed)
    assert reopened(link, retry_failed=True).ids == {"0", "2", "4"}
    assert link.is_symlink()
    assert [result["id"] for result in read(mixed)] == ["0", "2", "4"]
