"""Malicious files: refused by name at once, without blocking, in one process with little memory."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layout_files import write_rows, write_zip
from test_fuzz import own_clips, packed_store, shard

from unicode_fast import preset
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.data import StoreError, open_data, open_store
from unicode_fast.data.layouts.ave import H5Array
from unicode_fast.data.layouts.avsbench import read_picture
from unicode_fast.data.layouts.clips import npy_positions, read_npy
from unicode_fast.data.layouts.files import read_csv, read_lines
from unicode_fast.data.layouts.zip_pickle import read_zipped_array, unpickle_array, unpickle_counts
from unicode_fast.data.stream import open_stream
from unicode_fast.data.text import _read_vectors, check_bert
from unicode_fast.files.untrusted import (
    BadFile,
    check_size,
    limit,
    open_file,
    parse_json,
    read_bytes,
)
from unicode_fast.report.tables import rows_of, single_runs
from unicode_fast.training.runs import read_seeds, read_summary

# Limits: bytes of all cases together, beside the loaded modules, and processor and wall-clock seconds of each case.
MEMORY, SECONDS, PATIENCE = 200 << 20, 5.0, 60
ZEROS = 1 << 28


def packed_zeros(count: int) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(count >> 20)), packer.flush()])


def zip_of(file: Path, packed: bytes, size: int, method: int = 8) -> None:
    """A zip of one member, with any size in its directory."""
    name = b"a.pkl"
    head = struct.pack("<HHHHHLLLHH", 20, 0, method, 0, 0, 0, len(packed), size, len(name), 0)
    place = struct.pack("<HHHLL", 0, 0, 0, 0, 0)
    local, central = b"PK\3\4" + head + name + packed, b"PK\1\2\x14\0" + head + place + name
    file.write_bytes(local + central + b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 1, 1, len(central), len(local), 0))


def npy_of(file: Path, header: str, body: bytes = b"") -> None:
    file.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + body)


def png_of(file: Path, width: int, height: int) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))

    size = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + end)


def doubled(levels: int) -> bytes:
    """A pickle of nested tuples, each with the next one twice."""
    return b"\x80\x02)q\0" + b"".join(b"h%c\x86q%c" % (0, 0) if n == 0 else b"h\0h\0\x86q\0" for n in range(levels))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
PICKLES = {
    "a place of a memory of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a tuple doubled a hundred times": doubled(100) + b".",
    "a name of a dtype that is doubled": b"\x80\x03cnumpy\ndtype\n" + doubled(100)[2:] + b"\x85R.",
    "a state that is doubled": b"\x80\x03" + ARRAY + b"(K\x01K\x01\x85" + doubled(100)[2:] + b"\x89C\x01atb.",
    "a key that is doubled": b"\x80\x02}" + doubled(100)[2:] + b"Ns.",
    "an integer of 800 digits": b"\x80\x02\x8b" + struct.pack("<L", 400) + b"\x7f" * 400 + b".",
    "nesting": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"abc.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
}


def cases(folder: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """The pattern of each malicious file's error, and its reader."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {}
    for name, data in PICKLES.items():
        found[f"array pickle: {name}"] = "x.pkl", lambda data=data: unpickle_array(data, "x.pkl")
        file = folder / f"{len(found)}.pkl"
        file.write_bytes(data)
        found[f"counts: {name}"] = f"{file.name} must be a pickle of a dict", lambda file=file: unpickle_counts(file)
    zeros = packed_zeros(ZEROS)
    zip_of(folder / "large.zip", zeros, 5 << 30 >> 1)
    zip_of(folder / "lies.zip", zeros, 100)
    zip_of(folder / "lzma.zip", b"\x09\x04\x05\0\x5d\xff\xff\xff\xff" + bytes(100), 100, 14)
    found["a zip of more than the limit"] = (
        "large.zip.*UNICODE_FAST_MAX_UNPACKED",
        lambda: read_zipped_array(folder / "large.zip"),
    )
    found["a zip with a false size"] = (
        "lies.zip.*cannot be unpacked",
        lambda: read_zipped_array(folder / "lies.zip"),
    )
    found["a zip whose method takes memory"] = "lzma.zip.*method 14", lambda: read_zipped_array(folder / "lzma.zip")
    return {**found, **numbers_and_texts(folder), **hdf5_files(folder, zeros), **specs(folder)}


def numbers_and_texts(folder: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    def header(dtype: str, shape: str) -> str:
        return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"

    npy_of(folder / "huge.npy", header("<f8", "(1000000000000, 4)"))
    npy_of(folder / "empty.npy", header("|V0", "(1000000000000, 4)"))
    npy_of(folder / "no-columns.npy", header("<f8", "(1000000000000, 0)"))
    npy_of(folder / "letters.npy", header("<U1", "(2,)"), b"\xff" * 8)
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    png_of(folder / "large.png", 60_000, 60_000)
    jpeg = io.BytesIO()
    pytest.importorskip("PIL.Image").new("RGB", (3000, 3000)).save(jpeg, "JPEG", progressive=True)
    # Repetitions of the last scan of a black picture.
    first, _, scan = jpeg.getvalue().removesuffix(b"\xff\xd9").rpartition(b"\xff\xda")
    (folder / "scans.jpg").write_bytes(first + 30_000 * (b"\xff\xda" + scan[:13]) + b"\xff\xd9")
    (folder / "rows.csv").write_text("id\n" + "a\n" * (1 << 22))
    (folder / "long.csv").write_text("id\n" + "a" * 200_000)
    (folder / "open.csv").write_text('id,split\n"a,train\nb,train\n')
    (folder / "nul.csv").write_bytes(b"id,split\na\0,train\n")
    (folder / "lines.txt").write_text("a\n" * (1 << 21))
    (folder / "lists.json").write_text("[" + "[]," * (1 << 21) + "0]")
    (folder / "deep.json").write_text("[" * 100_000)

    def csv(name: str) -> Callable[[], Any]:
        return lambda: read_csv(folder / name, ["id"])

    def ids() -> Any:
        root = own_clips(folder / "wide")
        write_rows(
            root / "clips.csv", ["id", "split"], [[f"{n:06d}", "train"] for n in range(100_000)] + [["a" * 9999, "x"]]
        )
        return open_data(f"clips:{root}")

    return {
        "npy larger than the file": ("huge.npy.*0 bytes of values", lambda: read_npy(folder / "huge.npy")),
        "npy of values without bytes": ("empty.npy.*plain values", lambda: read_npy(folder / "empty.npy")),
        "npy of text that is none": ("letters.npy.*got 0xffffffff", lambda: read_npy(folder / "letters.npy")),
        "npy of objects": ("objects.npy.*plain values", lambda: read_npy(folder / "objects.npy")),
        "picture": ("large.png.*UNICODE_FAST_MAX_PICTURE", lambda: read_picture(folder / "large.png", mask=False)),
        "JPEG of many scans": (
            "scans.jpg.*scans of 9000000 pixels",
            lambda: read_picture(folder / "scans.jpg", mask=True),
        ),
        "CSV of many rows": ("rows.csv must hold fewer rows.*UNICODE_FAST_MAX_TEXT", csv("rows.csv")),
        "CSV with a long field": ("long.csv.*field larger than", csv("long.csv")),
        "CSV with an open quote": ("open.csv.*a quote is not closed", csv("open.csv")),
        "CSV with a NUL": ("nul.csv.*NUL at byte 10", csv("nul.csv")),
        "CSV with one long name": ("clips.csv must have short texts.*9999", ids),
        "list of many lines": ("lines.txt.*UNICODE_FAST_MAX_TEXT", lambda: read_lines(folder / "lines.txt")),
        "JSON of many lists": ("values of at most", lambda: parse_json(read_bytes(folder / "lists.json"))),
        "JSON that is deep": ("values of at most|no JSON", lambda: parse_json(read_bytes(folder / "deep.json"))),
    }


def hdf5_files(folder: Path, zeros: bytes) -> dict[str, tuple[str, Callable[[], Any]]]:
    import h5py

    secret = folder / "secret.h5"
    with h5py.File(secret, "w") as opened:
        opened["x"] = np.arange(10.0)
    np.arange(10.0).tofile(folder / "secret.raw")

    def other_file(opened: Any) -> None:
        opened.create_dataset("x", (10,), "f8", external=[(str(folder / "secret.raw"), 0, 80)])

    def virtual(opened: Any) -> None:
        layout = h5py.VirtualLayout((10,), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "x", (10,))
        opened.create_virtual_dataset("x", layout)

    def chunk(opened: Any) -> None:
        data = opened.create_dataset("x", (10,), "f8", chunks=(10,), compression="gzip")
        head = b"\x78\x01" + zeros + struct.pack(">L", zlib.adler32(b""))
        data.id.write_direct_chunk((0,), head, 0)

    def lzf(opened: Any, data: bytes) -> None:
        opened.create_dataset("x", (10,), "f8", chunks=(10,), compression="lzf").id.write_direct_chunk((0,), data, 0)

    def away(opened: Any) -> None:
        opened["y"], opened["x"] = h5py.ExternalLink(str(secret), "/"), h5py.SoftLink("/y/x")

    def written(opened: Any, shape: tuple[int, ...], dtype: str, **options: Any) -> None:
        """With a value in the first chunk only."""
        opened.create_dataset("x", shape, dtype, **options)[(0,) * len(shape)] = 1

    made: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "external storage": ("must be in the file, got external storage", other_file),
        "virtual": ("must be in the file, got a virtual dataset", virtual),
        "external link": ("link to another file", lambda o: o.__setitem__("x", h5py.ExternalLink(str(secret), "x"))),
        "soft link to an external one": ("link to another file", away),
        "soft link to itself": ("through at most 100 names", lambda o: o.__setitem__("x", h5py.SoftLink("/x"))),
        "szip": ("its filters must be", lambda o: o.create_dataset("x", (10,), "f8", compression="szip")),
        "no values": ("it has 0 bytes for shape", lambda o: o.create_dataset("x", (10,), "f8")),
        "no chunks": ("it has 0 bytes for shape", lambda o: o.create_dataset("x", (10,), "f8", chunks=(2,))),
        "filter": ("its filters must be", lambda o: o.create_dataset("x", (10,), "i8", scaleoffset=4)),
        "chunk": ("does not unpack to its 80 bytes", chunk),
        "chunk of LZF": ("does not unpack to its 80 bytes", lambda o: lzf(o, b"\0a" + b"\xe0\xff\0" * 100_000)),
        "chunk of LZF cut short": ("does not unpack to its 80 bytes|out of range", lambda o: lzf(o, b"\x1fabc")),
        "chunks": ("chunks", lambda o: written(o, (1 << 20, 1 << 3), "u1", chunks=(1, 1))),
        "chunks at once": (
            "chunks per read, got 10000",
            lambda o: written(o, (1, 10_000), "u1", chunks=(1, 1)),
        ),
        "large chunk": (
            "its chunks must have at most",
            lambda o: written(o, (1,), "f8", maxshape=(None,), chunks=(1 << 25,), compression="gzip"),
        ),
        "large": ("UNICODE_FAST_MAX_UNPACKED", lambda o: written(o, (1 << 19, 1 << 12), "u1", chunks=True)),
    }
    found = {}
    for name, (message, make) in made.items():
        file = folder / f"{name}.h5"
        with h5py.File(file, "w") as opened:
            make(opened)
        found[f"HDF5: {name}"] = f"{name}.h5.*{message}", lambda file=file: H5Array(file, "x").whole()
    return found


def specs(folder: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """No files: commands, pipes, devices, and folders with links to other places."""
    found = {}
    for scheme in (
        "pipe:touch ran",
        "gs://bucket",
        "s3://bucket",
        "ftp://host/x",
        "file:///etc",
        "hf:x",
        "ais:x",
        "scp:x",
    ):
        pattern = f"followed by a folder, http:// or https://, got '{scheme.partition(':')[0]}:'"
        found[scheme] = pattern, lambda scheme=scheme: open_data(f"webdataset:{scheme}")
    root, bert = shard(folder / "tar").file.parent, folder / "bert"
    index = json.loads((root / "shards.json").read_text())
    for number, name in enumerate(("../x.tar", "pipe:touch ran.tar", "http://host/x.tar", "/etc/x.tar")):
        other = folder / f"index-{number}"
        other.mkdir()
        (other / "shards.json").write_text(json.dumps({**index, "shards": {"train": {name: 1}}}))
        found[f"shard {name}"] = "shards.json.*plain names", lambda other=other: open_stream(str(other))
    kinds = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE, "sparse": b"S"}
    for kind, code in {**kinds, "long name": b"x"}.items():
        member = tarfile.TarInfo("000000000.sound.npy")
        member.type, member.linkname, member.size = code, "/etc/passwd", (1 << 32) if code == b"x" else 0
        data = member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
        # Each replaces a valid file.
        other = folder / f"tar-{kind}"
        other.mkdir()
        (other / "shards.json").write_text((root / "shards.json").read_text())
        (other / "train-000000.tar").write_bytes(data)
        pattern = "UNICODE_FAST_MAX_TEXT" if kind == "long name" else "which is no plain file"
        found[f"tar with a {kind}"] = (
            f"train-000000.tar.*{pattern}",
            lambda other=other: open_stream(str(other)).split("train"),
        )
    small = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 9}
    for name, content in {
        "auto_map": {**small, "auto_map": {"AutoModel": "code.Model"}},
        "vocab_file": {**small, "vocab_file": "/etc/passwd"},
        "transformers_weights": {**small, "transformers_weights": "../x.safetensors"},
        "model_type": {**small, "model_type": "rag"},
        "tokenizer_class": {**small, "tokenizer_class": "TransfoXLTokenizer"},
        "weight_map": {**small, "weight_map": {"a": "../../x.safetensors"}},
        "num_hidden_layers": {**small, "num_hidden_layers": 10**9},
    }.items():
        other = folder / f"bert-{name}"
        other.mkdir()
        (other / "config.json").write_text(json.dumps(content))
        found[f"BERT: {name}"] = f"{name}.*config.json|config.json.*{name}", lambda other=other: check_bert(other)
    bert.mkdir()
    return {**found, **pipes(folder, bert), **run_files(folder)}


def pipes(folder: Path, bert: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """A pipe without a writer, and an endless device, instead of each file."""
    found: dict[str, tuple[str, Callable[[], Any]]] = {}
    own, store, shards = own_clips(folder / "p"), packed_store(folder / "s"), shard(folder / "t").file.parent
    for kind, make in (("pipe", os.mkfifo), ("device", lambda file: os.symlink("/dev/zero", file))):
        fake = folder / kind
        make(fake)
        for name, read in {
            "npy": read_npy, "csv": lambda file: read_csv(file, ["id"]), "list": read_lines, "zip": read_zipped_array,
            "counts": unpickle_counts, "vectors": _read_vectors, "HDF5": lambda file: H5Array(file, "x"),
            "picture": lambda file: read_picture(file, mask=True), "seeds": read_seeds,
            "file": open_file,
        }.items():  # fmt: skip
            found[f"{name} from a {kind}"] = "no plain file", lambda read=read, fake=fake: read(fake)

        def positions(fake: Path = fake) -> None:
            assert npy_positions([fake]).tolist() == [0]
            raise StoreError("0 steps")

        found[f"steps from a {kind}"] = "0 steps", positions
        for name, file, read in (
            ("store", store / "train-sound.npy", lambda: open_store(store, verify=False)),
            ("manifest", store / "manifest.json", lambda: open_store(store)),
            ("shard", shards / "train-000000.tar", lambda: open_stream(str(shards)).split("train")),
            ("index", shards / "shards.json", lambda: open_stream(str(shards))),
            (
                "clip",
                own / "sound" / "a.npy",
                lambda: np.asarray(open_data(f"clips:{own}").split("train").features["sound"]),
            ),
            ("BERT", bert / "vocab.txt", lambda: check_bert(bert)),
        ):

            def replaced(file: Path = file, fake: Path = fake, read: Callable[[], Any] = read) -> None:
                kept = file.read_bytes() if file.exists() else b""
                file.unlink(missing_ok=True)
                file.symlink_to(fake)
                try:
                    read()
                finally:
                    file.unlink()
                    file.write_bytes(kept)

            found[f"{name} from a {kind}"] = "no plain file", replaced
    return found


def run_files(folder: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """JSON of other types in a run folder."""
    row = {"task": "retrieval", "from": "a", "to": "b", "score": 0.5, "same_modality": 0.5, "chance": 0.1}
    found: dict[str, tuple[str, Callable[[], Any]]] = {}
    for number, content in enumerate(
        ([], {"rows": 3}, {"rows": [3]}, {"rows": [{**row, "score": "x"}]}, {"rows": [{**row, "metrics": 3}]},
         {"rows": [{**row, "task": []}]}, {"rows": [{**row, "interval": "ab"}]}, {"rows": [], "seconds": []})
    ):  # fmt: skip
        run = folder / f"run-{number}"
        (run / "evaluations").mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"seconds": 1.0, **content} if content else content))
        found[f"summary {content}"] = "summary.json is damaged", lambda run=run: read_summary(run)
    run = folder / "run"
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(json.dumps(preset("paper").flat()))
    (run / "summary.json").write_text(json.dumps({"rows": [row]}))
    (run / "evaluations" / "one.json").write_text(json.dumps({"row": row, "flags": 3}))
    found["evaluation"] = "one.json is damaged", lambda: rows_of(run)
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "config.yaml").write_text("preset: paper\n")
    (seeds / "seeds.json").write_text('{"0": "../../etc"}')
    found["seeds"] = "seeds.json is damaged: seeds must be a list of whole numbers", lambda: single_runs([str(seeds)])
    return found


def main(folder: Path) -> None:
    """Run all cases with little memory, and print the failures."""
    import resource

    def late(number: int, frame: Any) -> None:
        raise AssertionError("it takes too long")

    made = cases(folder)
    os.chdir(folder)
    signal.signal(signal.SIGALRM, late)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
    for name, (message, read) in made.items():
        signal.alarm(PATIENCE)
        began = time.process_time()
        try:
            read()
        except (StoreError, CheckpointError, BadFile, ValueError) as error:
            if not re.search(message, str(error)):
                print(f"{name}: {type(error).__name__}: {error}")  # noqa: T201
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}")  # noqa: T201
        else:
            print(f"{name}: it was read")  # noqa: T201
        signal.alarm(0)
        if time.process_time() - began > SECONDS:
            print(f"{name}: {time.process_time() - began:.1f} s")  # noqa: T201
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if grown > MEMORY:
        print(f"memory has grown by {grown} bytes")  # noqa: T201
    if (folder / "ran").exists():
        print("a command was run")  # noqa: T201
    print(f"{len(made)} files")  # noqa: T201


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and named pipes are those of Linux")
def test_hostile_files_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    pytest.importorskip("webdataset")
    pytest.importorskip("PIL.Image")
    command = [sys.executable, __file__, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parent)
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.fullmatch(r"[0-9]{3} files\n", found.stdout), found.stdout[-3000:]


def test_limits_are_named_and_set_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICODE_FAST_MAX_UNPACKED", "1000")
    with pytest.raises(BadFile, match="1001 bytes of at most 1000; UNICODE_FAST_MAX_UNPACKED sets another limit"):
        check_size(1001)
    check_size(1000)
    write_zip(tmp_path / "clip.zip", np.zeros(500))
    with pytest.raises(StoreError, match="clip.zip .*of at most 1000; UNICODE_FAST_MAX_UNPACKED"):
        read_zipped_array(tmp_path / "clip.zip")
    for wrong in ("0", "-1", "1e9", "many"):
        monkeypatch.setenv("UNICODE_FAST_MAX_TEXT", wrong)
        with pytest.raises(BadFile, match=f"UNICODE_FAST_MAX_TEXT must be a positive number of bytes, got '{wrong}'"):
            limit("UNICODE_FAST_MAX_TEXT")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
