"""The shared cache folder: planted files of others are replaced or refused by name, and links are not followed."""

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_store import CLASSES, MODALITIES, arrays

from unicode_fast import errors
from unicode_fast.__main__ import main as commands
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.data import Store, cache, write_store
from unicode_fast.data.text import WordVectors
from unicode_fast.files.locks import alone, exclusive
from unicode_fast.files.paths import cache_folder, expanded, with_homes


def make(folder: Path) -> None:
    clips = arrays(0, 12)
    write_store(folder, "digits", MODALITIES, CLASSES, {"train": {name: clips[name] for name in MODALITIES}})


def opened(root: Path) -> Store:
    """Make a store in a cache folder, in a thread that must end."""
    found: list[Store] = []
    thread = threading.Thread(
        target=lambda: found.append(cache.open_or_make(root / "digits", make, lambda line: None)), daemon=True
    )
    thread.start()
    thread.join(20)
    assert found, "blocked or failed"
    return found[0]


def plant_link(place: Path) -> None:
    place.symlink_to(place.parents[1] / "elsewhere")


def plant_hanging_link(place: Path) -> None:
    place.symlink_to(place.parents[1] / "nowhere")


PLANTS: dict[str, Callable[[Path], object]] = {
    "file": lambda place: place.write_text("planted"),
    "link": plant_link,
    "hanging link": plant_hanging_link,
    "pipe": lambda place: os.mkfifo(place),
    "folder": lambda place: place.mkdir(),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def untouched(root: Path) -> bool:
    elsewhere = root.parent / "elsewhere"
    return [file.name for file in elsewhere.iterdir()] == ["kept"] and (elsewhere / "kept").read_text() == "mine"


@pytest.mark.parametrize("name", ["digits", ".digits.lock", ".digits.unfinished-abc"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_replaced(root: Path, name: str, plant: str) -> None:
    PLANTS[plant](root / name)
    store = opened(root)
    assert len(store.split("train")) == 12 and store.path == root / "digits" and not store.path.is_symlink()
    assert untouched(root) and not (root.parent / "nowhere").exists()
    assert sorted(file.name for file in root.iterdir()) == [".digits.lock", "digits"]
    assert (root / ".digits.lock").is_file() and not (root / ".digits.lock").is_symlink()


def test_a_lock_that_cannot_be_replaced_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ".digits.lock").mkdir()
    (root / ".digits.lock" / "kept").touch()
    with pytest.raises(OSError, match=r"\.digits\.lock"):
        cache.open_or_make(root / "digits", make, lambda line: None)
    assert (root / ".digits.lock" / "kept").exists()
    with socket.socket(socket.AF_UNIX) as taken:
        monkeypatch.chdir(root)
        taken.bind(".other.lock")
        with pytest.raises(OSError, match=r"\.other\.lock"), exclusive(root / ".other.lock", print):
            pass


def test_the_holder_is_not_written_into_a_file_of_another_name(root: Path) -> None:
    os.link(root.parent / "elsewhere" / "kept", root / ".run.lock")
    with alone(root / ".run.lock", "the run"):
        pass
    assert untouched(root)


def given_to_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(place, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)


@pytest.mark.parametrize("whose", ["store", "cache folder"])
def test_a_store_of_another_user_is_refused_where_everybody_can_write(
    root: Path, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(root)
    owned, above = (store.path, root) if whose == "store" else (root, root.parent)
    given_to_another(owned, monkeypatch)
    assert len(opened(root).split("train")) == 12  # only the chosen users can write
    os.chmod(above, 0o777)
    with pytest.raises(PermissionError, match="got another user's; set UNICODE_FAST_CACHE") as caught:
        cache.open_or_make(root / "digits", make, lambda line: None)
    assert caught.value.filename == str(owned)


@pytest.mark.parametrize("plant", ["file", "link", "hanging link", "pipe"])
def test_what_stands_for_the_word_vectors_is_refused(root: Path, plant: str) -> None:
    PLANTS[plant](root / "word-vectors")
    vectors = WordVectors("bert", cache=root)
    vectors._encode = lambda sentence: (np.array([7]), np.ones((1, 4), np.float32))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="must be a folder, not a link or file") as caught:
        vectors.vectors("one")
    assert caught.value.filename == str(root / "word-vectors") and untouched(root)


def test_word_vectors_in_the_place_of_a_pipe(root: Path) -> None:
    vectors = WordVectors("bert", cache=root)
    vectors._encode = lambda sentence: (np.array([7]), np.ones((1, 4), np.float32))  # type: ignore[method-assign]
    (root / "word-vectors").mkdir()
    os.mkfifo(root / "word-vectors" / f"{vectors._key('one')}.npz")
    found: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(vectors.vectors("one")), daemon=True)
    thread.start()
    thread.join(20)
    np.testing.assert_array_equal(found[0], np.ones((1, 4)))
    again = WordVectors("bert", cache=root)
    np.testing.assert_array_equal(again.vectors("one"), found[0])
    assert again.encoded == 0


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in {
        "~/x": "/home/me/x",
        "~": "/home/me",
        "clips:~/sets/x": "clips:/home/me/sets/x",
        "webdataset:~/x": "webdataset:/home/me/x",
        "a/~/x": "a/~/x",
        "bert-base-uncased": "bert-base-uncased",
        "": "",
    }.items():
        assert expanded(text) == expected
    words = ["~/run", "--out=~/x", "--data=ave:~/y", "--data", "ave:~/z", "--lr=1e-3", "--note=a=~b", "it's\n~"]
    assert with_homes(words) == [
        *("/home/me/run", "--out=/home/me/x", "--data=ave:/home/me/y", "--data", "ave:/home/me/z"),
        *("--lr=1e-3", "--note=a=~b", "it's\n~"),
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["--config=~/none.yaml"]),
        ("train", ["--resume", "~/none.yaml"]),
        ("ablate", ["--out=a", "--config=~/none.yaml"]),
        ("evaluate", ["~/none.yaml"]),
        ("report", ["~/none.yaml", "--out=a"]),
        ("convert", ["--from-cmg=~/none.yaml", "a"]),
        ("data", ["check", "clips:~/none.yaml"]),
    ],
)
def test_every_command_expands_home_folders(
    command: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        assert commands([command, *words]) == 2
        message = capsys.readouterr().err
    except (OSError, ValueError, CheckpointError) as error:
        message = errors.message_of(error)
    assert str(tmp_path / "none.yaml") in message


def test_without_a_home_folder_the_message_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("UNICODE_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ValueError, match="set HOME, or UNICODE_FAST_CACHE to a folder"):
        cache_folder()
    with pytest.raises(ValueError, match="known home folder, got '~no-such-user/x'; set HOME"):
        expanded("~no-such-user/x")


@pytest.mark.parametrize(("number", "cure"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max")])
@pytest.mark.parametrize("named", [True, False])
def test_too_many_open_files(number: int, cure: str, named: bool) -> None:
    error = OSError(number, os.strerror(number), *(["a/b"] if named else []))
    assert errors.is_foreseen(error) and cure in errors.message_of(error)
    assert errors.message_of(error).endswith(", got 'a/b'") is named
