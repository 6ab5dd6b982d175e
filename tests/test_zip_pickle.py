"""Zips of pickled arrays: arrays of every kind are read, and any other object is refused."""

import builtins
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from layout_files import write_zip

from unicode_fast.data.layouts.zip_pickle import (
    PickleError,
    read_zipped_array,
    unpickle_array,
    unpickle_counts,
)
from unicode_fast.data.store.checks import StoreError

RAN: list[str] = []


def record_run(what: str) -> str:
    RAN.append(what)
    return what


class Calls:
    """Pickles as a call, the form of any attack."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["float64", "float32", ">f4", "int64", "bool", "U5"])
def test_arrays_are_read(tmp_path: Path, protocol: int, dtype: str) -> None:
    array = np.arange(24).reshape(4, 6).astype(dtype)
    for number, kind in enumerate((array, np.asfortranarray(array), array[::2, 1:])):
        write_zip(tmp_path / f"{number}.zip", kind, protocol=protocol)
        found = read_zipped_array(tmp_path / f"{number}.zip")
        assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, kind)


def test_arrays_written_by_old_numpy_and_python() -> None:
    """Python 2 wrote str for bytes, Python 3 with protocol 2 a call of a codec; NumPy 1 had another module name."""
    array = np.arange(6.0).reshape(2, 3)
    data = pickle.dumps(array, 2)
    assert b"_codecs" in data and b"numpy._core.multiarray" in data
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(unpickle_array(old, "old"), array)


ATTACKS = {
    "posix.system": Calls(os.system, "touch ran"),
    "builtins.eval": Calls(builtins.eval, "open('ran', 'w')"),
    "builtins.exec": Calls(builtins.exec, "open('ran', 'w')"),
    "test_zip_pickle.record_run": Calls(record_run, "attack"),
    "builtins.getattr": Calls(getattr, np.ndarray, "tofile"),
    "numpy.load": Calls(np.load, "ran"),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_does_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    attack = ATTACKS[name]
    for number, content in enumerate((attack, [np.zeros(3), attack], {"features": (attack,)})):
        file = tmp_path / "audio" / f"{number}.zip"
        write_zip(file, content, protocol=protocol)
        with pytest.raises(
            PickleError, match=rf"{number}.zip \(features.pkl\).*names \S*{name.split('.')[1]}"
        ) as caught:
            read_zipped_array(file)
        assert "was not run" in str(caught.value)
    assert os.listdir(tmp_path) == ["audio"] and RAN == []


def test_the_attacks_work_where_nothing_is_restricted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(ATTACKS["posix.system"]))
    assert (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(ATTACKS["test_zip_pickle.record_run"]))
    assert RAN.pop() == "attack"


def test_what_a_pickle_may_name_cannot_be_changed() -> None:
    """BUILD sets attributes of the object before it; here of the replacements of two functions."""
    for name in (b"_codecs\nencode", b"numpy.core.numeric\n_frombuffer", b"numpy\ndtype", b"numpy\nndarray"):
        for state in (b"}S'__call__'\nI1\ns", b"N}S'__doc__'\nS'changed'\ns\x86"):
            with pytest.raises(PickleError, match="cannot be read|one NumPy array of numbers, got"):
                unpickle_array(b"\x80\x02c" + name + b"\n" + state + b"b.", "attack")
    assert np.ndarray.__doc__ != "changed" and np.dtype("f8").byteorder == "="


class Built(Calls):
    """Pickles as a call and the state of its result."""

    def __init__(self, function: object, arguments: tuple[object, ...], state: object) -> None:
        self.call = (function, arguments, state)


def of_dtype(dtype: object, shape: tuple[object, ...] = (1,), data: object = b"A" * 8) -> Built:
    """An array with any dtype, shape and bytes."""
    return Built(np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))


# A dtype with a Python object in its fields but not in its flags: NumPy would read the bytes as an address.
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
FORGED = {
    "fields": of_dtype(Built(np.dtype, ("V8", False, True), FIELDS)),
    "fields of a number": of_dtype(Built(np.dtype, ("f8", False, True), FIELDS)),
    "a dtype of an array": of_dtype(Calls(np.dtype, of_dtype(Built(np.dtype, ("V8", False, True), FIELDS)))),
    "a dtype of an array alone": Calls(np.dtype, of_dtype(Built(np.dtype, ("V8", False, True), FIELDS))),
    "the class called": Calls(np.ndarray, (1,), np.dtype("f8"), b"A" * 8),
    "few bytes": of_dtype(np.dtype("f8"), (1000,)),
    "a negative shape": of_dtype(np.dtype("f8"), (-1, -1)),
    "a shape of text": of_dtype(np.dtype("f8"), ("1",)),
    "no bytes": of_dtype(np.dtype("f8"), (1,), [1.0]),
    "a dtype that is none": of_dtype("f8"),
    "structured": np.zeros(10, [("a", "f8")]),
    "void": np.zeros(3, "V8"),
    "complex": np.zeros(3, complex),
}


@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_forged_arrays_never_reach_numpy(tmp_path: Path, case: str, protocol: int) -> None:
    write_zip(tmp_path / "clip.zip", FORGED[case], protocol=protocol)
    with pytest.raises(PickleError, match=r"clip.zip \(features.pkl\) must be a pickle of one NumPy array"):
        read_zipped_array(tmp_path / "clip.zip")


@pytest.mark.parametrize("content", [[1.0], 3.0, "text", np.array([None, "x"], object), None, np.float64(2)])
def test_other_objects_are_refused(tmp_path: Path, content: object) -> None:
    write_zip(tmp_path / "clip.zip", content)
    with pytest.raises(PickleError, match="clip.zip.*must be a pickle of one NumPy array"):
        read_zipped_array(tmp_path / "clip.zip")


def test_zips_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "clip.zip"
    with pytest.raises(FileNotFoundError):
        read_zipped_array(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no features")
    with pytest.raises(StoreError, match="clip.zip must hold exactly one .pkl member, got none"):
        read_zipped_array(file)
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("a.pkl", "b.pkl.old"):
            archive.writestr(name, pickle.dumps(np.zeros(3)))
    with pytest.raises(StoreError, match="exactly one .pkl member, got a.pkl, b.pkl.old"):
        read_zipped_array(file)
    file.write_bytes(b"no zip")
    with pytest.raises(StoreError, match="clip.zip must be a whole zip file"):
        read_zipped_array(file)
    write_zip(file, np.random.default_rng(0).normal(size=(10, 128)))
    data = bytearray(file.read_bytes())
    data[2000] ^= 255
    file.write_bytes(data)
    with pytest.raises(StoreError, match="clip.zip must be a whole zip file"):
        read_zipped_array(file)
    write_zip(file, np.zeros(3))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.pkl", pickle.dumps(np.zeros(300))[:400])
    with pytest.raises(PickleError, match=r"clip.zip \(a.pkl\).*cannot be read"):
        read_zipped_array(file)


def test_counts(tmp_path: Path) -> None:
    file = tmp_path / "cnt.pkl"
    file.write_bytes(pickle.dumps({2003: 0, 29108: 1}))
    assert unpickle_counts(file) == {2003: 0, 29108: 1}
    for content in ([1], {1: "one"}, {"one": 1}, {1: True}, Calls(record_run, "counts"), {1: np.int64(2)}):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(PickleError, match="cnt.pkl must be a pickle of a dict of integers"):
            unpickle_counts(file)
    assert RAN == []
