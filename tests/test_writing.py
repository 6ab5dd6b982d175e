"""Files and folders appear complete or not at all; leftovers of a killed process are removed; errors take one line."""

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
from test_locks import forked, status_of

from unicode_fast.files import writing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_an_older_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.json"
    writing.write_json(path, {"ü": 1})
    with pytest.raises(RuntimeError), writing.atomic_file(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert json.loads(path.read_bytes()) == {"ü": 1} and path.stat().st_mode & 0o777 == 0o644
    with writing.atomic_file(path, "w") as file:
        file.write("a\r\nü\n")
    assert path.read_bytes() == "a\r\nü\n".encode() and names(path.parent) == ["numbers.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    path = tmp_path / "numbers.json"
    writing.write_json(path, 1)

    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="nothing that was there before is lost") as caught:
        writing.write_json(path, 2)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert path.read_text() == "1\n" and names(tmp_path) == ["numbers.json"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="File too large") as caught:
            writing.write_text(tmp_path / "long", "x" * 100_000)
        assert caught.value.filename == str(tmp_path / "long")

    assert status_of(forked(write)) == 0 and names(tmp_path) == []


def test_errors_of_an_open_file_are_given_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device; nothing that was saved is lost") as caught:
        with writing.naming(tmp_path / "metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "metrics.jsonl"))
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path / 'other'}'$"), writing.naming(tmp_path):
        (tmp_path / "other").read_bytes()


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path) -> None:
    def file() -> None:
        with writing.atomic_file(tmp_path / "bars.png"):
            os.kill(os.getpid(), signal.SIGKILL)

    def folder() -> None:
        with writing.atomic_folder(tmp_path / "store") as inside:
            (inside / "one").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert [status_of(forked(act)) for act in (file, folder)] == [-signal.SIGKILL] * 2
    others = [".hidden", ".lock", "kept.png", ".kept.png", ".step-00000001.pt"]
    older = [".step-00000020.pt.k3_9abcd", ".summary.json.abcdefgh"]
    for name in (*others, *older):
        (tmp_path / name).touch()
    assert len(names(tmp_path)) == 9
    writing.remove_unfinished(tmp_path, "store")
    assert len(names(tmp_path)) == 8
    writing.remove_unfinished(tmp_path)
    assert names(tmp_path) == sorted(others)
    writing.remove_unfinished(tmp_path / "nowhere")


def test_a_folder_appears_whole_and_never_takes_anothers_place(tmp_path: Path) -> None:
    with writing.atomic_folder(tmp_path / "run") as inside:
        (inside / "ours").touch()
        assert names(tmp_path) != ["run"]
    assert names(tmp_path) == ["run"]
    with pytest.raises(FileExistsError, match="another process made it first"), writing.atomic_folder(tmp_path / "run"):
        pass
    with pytest.raises(KeyboardInterrupt), writing.atomic_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["ours"]
