"""Checkpoints, exports, CMG files and YAML that are damaged or meant to harm: refused by name, or read as they were."""

import json
import math
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import pytest
import tiny
import torch
import yaml
from official_checkpoint import TIED, map_arrays
from official_checkpoint import checkpoint as cmg_content
from processes import python

from unicode_fast import CheckpointError, UniCode, checkpoint, export, load
from unicode_fast.cli import resolve_saved
from unicode_fast.compat import CmgFileError, from_cmg, to_cmg
from unicode_fast.files import checked_torch
from unicode_fast.files.checked_torch import _OLD, read_torch
from unicode_fast.files.pickle_opcodes import unpickle
from unicode_fast.files.tensor_files import read_tensors, write_tensors
from unicode_fast.files.untrusted import BadFile
from unicode_fast.training.trainer import Trainer

NAMES = ("audio", "text")
HERE = Path(__file__).parent


def saved(run: Path, steps: int = 2) -> tuple[Trainer, Path]:
    """A trainer after some steps, and the checkpoint it would go on from."""
    trainer = tiny.trainer(names="audio,text")
    for seed in range(steps):
        trainer.train_step(tiny.batch(trainer.model, seed=seed), None, 1e-3)
    progress = {"best": None, "seconds": 1.5, "bytes": 0, "data": "digest", "changes": [], "ranks": 1}
    usage = torch.ones(len(NAMES), trainer.model.codewords, dtype=torch.float64)
    path = checkpoint.step_path(run, steps)
    checkpoint.save(path, trainer.model, {**trainer.state(), "progress": progress, "usage": usage})
    return trainer, path


def described(model: UniCode) -> dict[str, Any]:
    return {**checkpoint.config_to_dict(model.config, model.modalities), "model": dict(model.state_dict())}


def resumed(trainer: Trainer, run: Path) -> dict[str, Any]:
    content = checkpoint.read_for_resume(run, None)
    checkpoint.check_model(content, trainer.config, trainer.model.modalities)
    trainer.restore(content)
    state = trainer.state()
    # Their options stay those of the trainer.
    moments = [list(state[name]["state"].values()) for name in ("optimizer", "club_optimizer")]
    return {"model": dict(trainer.model.state_dict()), "moments": moments, "rng": state["rng"], "step": trainer.step}


def loaded_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    _, path = saved(folder)
    return path, lambda: described(load(path))


def resumed_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    trainer, path = saved(folder)
    return path, lambda: resumed(trainer, folder)


def exported_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "model.safetensors"
    export(tiny.model(names="audio,text"), path)
    return path, lambda: described(load(path))


def cmg_file(folder: Path, zipped: bool = True) -> tuple[Path, Callable[[], Any]]:
    path = folder / "DCID-model-5.pt"
    content = map_arrays(cmg_content("AT", 11, widths=TIED), torch.from_numpy)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path, lambda: to_cmg(from_cmg(path))


def old_cmg_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """As torch wrote them before 1.6."""
    return cmg_file(folder, zipped=False)


def yaml_file(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tiny.config().flat()))
    return path, lambda: resolve_saved(str(path)).flat()


FILES: dict[
    str, tuple[Callable[[Path], tuple[Path, Callable[[], Any]]], type[Exception], Callable[[Any, Any], bool]]
] = {
    "load": (loaded_file, CheckpointError, mutants.equal),
    "resume": (resumed_file, CheckpointError, mutants.equal),
    "export": (exported_file, CheckpointError, mutants.equal),
    "CMG": (cmg_file, CmgFileError, mutants.equal),
    # Without a checksum.
    "old CMG": (old_cmg_file, CmgFileError, mutants.alike),
    "YAML": (yaml_file, ValueError, mutants.alike),
}


@pytest.mark.parametrize("seconds", mutants.SECONDS)
@pytest.mark.parametrize("name", FILES)
def test_mutants(name: str, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, error, may_be = FILES[name]
    path, read = make(tmp_path)
    found = mutants.fuzz(path, read, error, seconds=seconds, may_be=may_be)
    with capsys.disabled():
        print(f"\n{name}: {found}")  # noqa: T201


# Replacements of an entry of a checkpoint.
OTHERS: tuple[Any, ...] = (
    None, True, -1, 0, 3, 1 << 62, 1.5, float("nan"), float("inf"), "", "audio", "float64", [], [1], (), {}, {"a": 1},
    torch.tensor(1), torch.ones(2), torch.ones(0), torch.ones(3, 3), torch.full((16, 16), 7), torch.tensor(math.inf),
)  # fmt: skip


def with_one_other_part(content: Any, draw: random.Random) -> Any:
    """A copy with an entry, at any depth, replaced, removed or added."""
    if not isinstance(content, dict) or not content or draw.random() < 0.1:
        return draw.choice(OTHERS)
    changed, name = dict(content), draw.choice(list(content))
    how = draw.random()
    if how < 0.1:
        del changed[name]
    elif how < 0.15:
        changed[draw.choice(("a", 7, f"{name}x"))] = changed[name]
    elif isinstance(changed[name], torch.Tensor) and how < 0.6:
        tensor = changed[name]
        changed[name] = draw.choice(
            (tensor.double(), tensor.flatten(), tensor[None], tensor.flatten()[:1], tensor.long())
        )
    else:
        changed[name] = with_one_other_part(changed[name], draw)
    return changed


@pytest.mark.parametrize("seconds", mutants.SECONDS)
@pytest.mark.parametrize("name", ["load", "resume", "CMG"])
@pytest.mark.filterwarnings("ignore:the file has no")
def test_other_entries(name: str, seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Files that are whole, and say something else."""
    make, error, _ = FILES[name]
    path, read = make(tmp_path)
    content, draw, refused, taken = read_torch(path), random.Random(0), 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.save(with_one_other_part(content, draw), path)
        try:
            read()
            taken += 1
        except error as found:
            refused += 1
            assert path.name in str(found) and len(str(found).replace(str(tmp_path), "")) < 300, found
    with capsys.disabled():
        print(f"\n{name}: {path.name}: {refused + taken} with other parts, {refused} refused, {taken} taken")  # noqa: T201


# Faults in the state of one parameter, and the message.
BAD_STATE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (lambda one: one.update(exp_avg=one["exp_avg"][:1]), "exp_avg of state 0 of .*optimizer must be"),
    "dtype": (lambda one: one.update(exp_avg_sq=one["exp_avg_sq"].double()), "exp_avg_sq of .*got .* float64"),
    "strides": (lambda one: one.update(exp_avg=one["exp_avg"].T.contiguous().T), "must have the strides"),
    "step": (lambda one: one.update(step=torch.tensor(float("nan"))), "step of state 0 .* whole number, got nan"),
    "steps": (lambda one: one.update(step=torch.ones(2)), "step of state 0 .* one number"),
    "whole step": (lambda one: one.update(step=torch.tensor(3)), "step of state 0 .* one number, got .* int64"),
    "no tensor": (lambda one: one.update(exp_avg=3), "exp_avg of .*got int"),
    "one missing": (lambda one: one.pop("exp_avg"), "must hold step, exp_avg, exp_avg_sq"),
    "one more": (lambda one: one.update(max_exp_avg_sq=one["exp_avg"]), "must hold step, exp_avg, exp_avg_sq"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", BAD_STATE)
def test_optimiser_states_are_those_of_their_parameters(name: str, whole: tuple[Trainer, Path]) -> None:
    spoil, message = BAD_STATE[name]
    trainer, path = whole
    for optimizer in ("optimizer", "club_optimizer"):
        content = checkpoint.read_for_resume(path.parent.parent, None)
        spoil(content[optimizer]["state"][0])
        with pytest.raises(CheckpointError, match=message) as caught:
            trainer.restore(content)
        assert path.name in str(caught.value) and optimizer in str(caught.value)
        assert len(str(caught.value).replace(str(path.parent), "")) < 300


# Entries of a checkpoint of another kind, and the message.
BAD_PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "step": ({"step": "2"}, "its step is '2'"),
    "progress": ({"progress": []}, "progress must be a dictionary"),
    "seconds": ({"progress": {"data": "digest", "seconds": float("nan")}}, "seconds of progress .* got nan"),
    "bytes": ({"progress": {"data": "digest", "bytes": -1}}, "bytes of progress .* got -1"),
    "ranks": ({"progress": {"data": "digest", "ranks": "two"}}, "ranks of progress .* got 'two'"),
    "best": ({"progress": {"data": "digest", "best": {"step": 1}}}, "best of progress must be"),
    "changes": ({"progress": {"data": "digest", "changes": [1]}}, "changes of progress must be"),
    "usage": ({"usage": torch.ones(2, 5)}, r"usage must be \(2, 12\) float64.* got \(2, 5\) float32"),
    "rng": ({"rng": torch.zeros(7, dtype=torch.uint8)}, "rng must be the state of a generator"),
    "rng of floats": ({"rng": torch.zeros(5056)}, "rng must be the bytes"),
    "optimizer": ({"optimizer": 3}, "optimizer must be a dictionary with state, got 3"),
    "index": ({"optimizer": {"state": {999: {}}}}, "optimizer must have states of .* parameters, got one of 999"),
    "model": ({"model": [1]}, "model must be a dictionary of tensors, got list"),
    "entry": ({"model": {"codebook": 1}}, "entry 'codebook' of its model must be a tensor, got int"),
    "config": ({"config": 1}, "config must be a dictionary with fields, modalities, got 1"),
    "fields": ({"config": {"fields": {"width": [1]}, "modalities": {}}}, "fields of its config must be text"),
    "modalities": ({"config": {"fields": {}, "modalities": [1]}}, "modalities of its config must be a dictionary"),
    "modality": ({"config": {"fields": {}, "modalities": {"audio": {"kind": 1, "shape": [3]}}}}, "'audio' must have"),
    "shape": ({"config": {"fields": {}, "modalities": {"audio": {"kind": "vector", "shape": [1.5]}}}}, "whole numbers"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_entries_of_other_kinds_are_refused_by_name(name: str, whole: tuple[Trainer, Path]) -> None:
    changes, message = BAD_PARTS[name]
    trainer, path = whole
    data = path.read_bytes()
    try:
        torch.save({**read_torch(path), **changes}, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            resumed(trainer, path.parent.parent)
    finally:
        path.write_bytes(data)
    assert path.name in str(caught.value) and len(str(caught.value).replace(str(path.parent), "")) < 300


class TestSizesThatAFileOnlySays:
    """Built without memory, compared with what the file holds, then allocated."""

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"codewords": 300_000_000},
                r"codebook.codebook must be \(300000000, 16\) float32, got \(12, 16\) float32",
            ),
            ({"width": 1_000_000_000}, "does not fit its configuration"),
            ({"temporal_layers": 900}, "layers need more than 1804 tensors"),
            ({"cpc_layers": 900}, "layers need more than"),
            ({"temporal_heads": 7}, "the model cannot be built"),
            ({"dtype": "float64"}, "must be .* float64, got .* float32"),
        ],
    )
    def test_fields(self, fields: dict[str, Any], message: str, whole: tuple[Trainer, Path], tmp_path: Path) -> None:
        trainer, path = whole
        content = read_torch(path)
        content["config"]["fields"].update(fields)
        other = checkpoint.step_path(tmp_path, 2)
        other.parent.mkdir(parents=True)
        torch.save(content, other)
        file = tmp_path / "other.safetensors"
        write_tensors(file, content["model"], {"format": 1, "config": content["config"]})
        for given in (other, file):
            with pytest.raises(CheckpointError, match=message) as caught:
                load(given)
            assert given.name in str(caught.value)
        # A run folder with such a config.yaml, and the same in its checkpoint.
        with pytest.raises(CheckpointError, match=message):
            checkpoint.check_model(content, trainer.config.replace_all(**fields), trainer.model.modalities)

    def test_loading_draws_nothing_and_gives_the_same_bits(self, whole: tuple[Trainer, Path]) -> None:
        trainer, path = whole
        before = torch.get_rng_state()
        model = load(path)
        assert torch.equal(torch.get_rng_state(), before)
        assert mutants.equal(dict(model.state_dict()), dict(read_torch(path)["model"]))
        assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
        with torch.no_grad():
            model.train()(tiny.batch(model))
        assert trainer.model.device.type == "cpu"


class TestExports:
    def test_changed_content_is_refused(self, tmp_path: Path) -> None:
        path, _ = exported_file(tmp_path)
        data = bytearray(path.read_bytes())
        for place in (len(data) - 5, data.index(b"codewords") + 14):
            changed = bytearray(data)
            changed[place] ^= 1
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match="model.safetensors .*its checksum differs"):
                load(path)

    def test_a_checksum_under_a_damaged_name_is_not_passed_over(self, tmp_path: Path) -> None:
        path, _ = exported_file(tmp_path)
        path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
        with pytest.raises(CheckpointError, match="model.safetensors .*only the metadata"):
            load(path)

    def test_a_file_without_a_checksum_is_read(self, tmp_path: Path) -> None:
        path, read = exported_file(tmp_path)
        expected = read()
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        del header["__metadata__"]["sha256"]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        assert mutants.equal(read(), expected)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b'{"a": 1, "a": 2}', "a duplicate key"),
            (b"[" * 100000, "no JSON"),
            (b"[]", "no JSON object"),
            (b"{}", "its header has no 'unicode_fast'"),
            (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "tensor 'a' must have .* got 8"),
            (b'{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "integers"),
            (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "must begin at the end"),
            (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "its tensors must end at byte"),
            (b'{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}', "must have the bytes of its dtype"),
        ],
    )
    def test_headers(self, text: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(BadFile, match=message):
            read_tensors(path)


class TestTorchFiles:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.ones(1).expand(1000), r"must lie in its storage of 1 values, got shape \(1000,\)"),
            (torch.ones(3).to_sparse(), "_rebuild_sparse_tensor, which was not run"),
            (torch.ones(3, device="meta"), "_rebuild_meta_tensor_no_storage, which was not run"),
            (torch.ones(2, dtype=torch.cfloat), "ComplexFloatStorage, which was not run"),
            ({1, 2}, "set, which was not run"),
            ({(1, 2): 3}, "key of type tuple"),
            (1 << 80, "more than 64 bits"),
        ],
    )
    def test_what_no_checkpoint_holds(self, value: Any, message: str, tmp_path: Path) -> None:
        torch.save({"value": value}, tmp_path / "file.pt")
        with pytest.raises(BadFile, match=message):
            read_torch(tmp_path / "file.pt")

    def test_files_of_before_torch_1_6(self, tmp_path: Path) -> None:
        """Pickles one after another, then the numbers of each storage."""
        path, shared = tmp_path / "old.pt", torch.arange(6.0)
        value = {"step": 3, "name": "a", "all": shared, "part": shared[2:5], "long": torch.arange(4)}
        torch.save(value, path, _use_new_zipfile_serialization=False)
        assert mutants.equal(read_torch(path), value)
        data = path.read_bytes()
        count = (6).to_bytes(8, "little")
        for changed, message in (
            (data[:-1], "must have the .* bytes of its storages"),
            (data + b"x", "must have the .* bytes of its storages"),
            (data.replace(count, (7).to_bytes(8, "little")), "storage '.*' must be 6 of torch.float32"),
            (data.replace(b"K\x06", b"J\0\0\0\x40", 1), "storage '.*' must be 6 of torch.float32 in all places"),
            (data.replace(b"FloatStorage", b"FloatStoragX"), "FloatStorag.*, which was not run"),
            (data.replace(b"K\x06N", b"K\x06K\1"), "persistent id must be that of a whole storage"),
            (data[:40], "damaged pickle|cut short"),
        ):
            assert changed != data
            path.write_bytes(changed)
            with pytest.raises(BadFile, match=message):
                read_torch(path)
        for pickled, message in (
            (b"(S'a'\nR.", "must have protocol 2"),
            (b"\x80\x02cos\nsystem\n.", "os.system.*not run"),
        ):
            path.write_bytes(_OLD + pickled + data[len(_OLD) :])
            with pytest.raises(BadFile, match=message):
                read_torch(path)

    def test_files_of_before_torch_1_6_are_never_tried_as_tars(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The work takes minutes if a header claims a large array."""
        torch.save({"value": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        monkeypatch.setattr("tarfile.open", lambda *_, **__: pytest.fail("tried"))
        assert read_torch(tmp_path / "old.pt")["value"].tolist() == [1, 1, 1]

    def test_names_that_unpicklers_read_in_two_ways(self) -> None:
        identity = ("storage", checked_torch._StorageType(torch.float32), "\u00e9", "cpu", 1)
        with pytest.raises(BadFile, match="a storage must have an ASCII key"):
            checked_torch._Tensors(100).named(identity)

    def test_what_many_calls_are_given(self) -> None:
        """Each check reads all of it."""
        first, more = b"cm\nf\n(" + 1000 * b"N" + b"tq\0R", 1000 * b"cm\nf\nh\0R"
        with pytest.raises(BadFile, match="expands to more than 16 times its size"):
            unpickle(b"\x80\x02](" + first + more + b"e.", {("m", "f"): lambda *_: object()})
        assert len(unpickle(b"\x80\x02](" + 1001 * b"cm\nf\n)R" + b"e.", {("m", "f"): lambda *_: object()})) == 1001

    def test_a_member_that_is_said_to_be_a_folder(self, tmp_path: Path) -> None:
        """torch reads nothing of it, and gives memory as it is."""
        path, member = tmp_path / "file.pt", b"file/data/0"
        torch.save({"value": torch.ones(3)}, path)
        head, name, end = path.read_bytes().rpartition(member)
        path.write_bytes(head[:-8] + b"\x10" + head[-7:] + name + end)
        with pytest.raises(BadFile, match="member 'data/0' is marked as a folder"):
            read_torch(path)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_zips_that_torch_does_not_write(self, tmp_path: Path) -> None:
        path = tmp_path / "file.pt"
        torch.save({"value": torch.ones(3)}, path)
        data = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        for change, compression, message in (
            ([], zipfile.ZIP_DEFLATED, "must be neither compressed"),
            (members[-1:], zipfile.ZIP_STORED, "occurs twice"),
            ([("file/DATA.PKL", b"")], zipfile.ZIP_STORED, "occurs twice"),
            ([("other/data", b"")], zipfile.ZIP_STORED, "one folder"),
            ([("file/a\\b", b"")], zipfile.ZIP_STORED, "must have a name of torch.save's form"),
            ([("file/data/0/", b"")], zipfile.ZIP_STORED, "must have a name of torch.save's form"),
            ([("file/data/\u00e9", b"")], zipfile.ZIP_STORED, "must have a name of torch.save's form"),
            ([("/etc/x", b"")], zipfile.ZIP_STORED, "must have a name of torch.save's form"),
        ):
            with zipfile.ZipFile(path, "w", compression) as archive:
                for name, content in (*members, *change):
                    archive.writestr(name, content)
            with pytest.raises(BadFile, match=message):
                read_torch(path)
        for changed in (b"x" + data, data + b"x", data[:-1] + b"\1" + b"x"):
            path.write_bytes(changed)
            with pytest.raises(BadFile, match="no file of torch.save|not at its end"):
                read_torch(path)


HOSTILE = """
import os, resource, signal, struct, sys, time, zipfile
from pathlib import Path
import torch, tiny
import test_fuzz_checkpoint as fuzz
from unicode_fast import CheckpointError, checkpoint, load
from unicode_fast.files.checked_torch import _OLD
from unicode_fast.cli import read_yaml
from unicode_fast.compat import CmgFileError, from_cmg
from unicode_fast.files.tensor_files import write_tensors

folder = Path(sys.argv[1])
trainer, good = fuzz.saved(folder)
fuzz.described(load(good))
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmSize")) * 1024
# Twice the content, all of which is below a megabyte here, and 200 MB.
resource.setrlimit(resource.RLIMIT_AS, (used + 202 * 1000**2, resource.RLIM_INFINITY))
signal.alarm(60)

def refused(path, reader=load, error=CheckpointError):
    began = time.monotonic()
    try:
        reader(path)
    except error as found:
        assert path.name in str(found) and len(str(found).replace(str(folder), "")) < 300, found
        print(f"{time.monotonic() - began:.2f} {path.name} {str(found).replace(str(folder), '')}")
    else:
        raise AssertionError(f"{path} was taken")

readers = {"a.pt": (load, CheckpointError), "a.safetensors": (load, CheckpointError)}
readers |= {"a.cmg": (from_cmg, CmgFileError), "a.yaml": (lambda path: read_yaml(str(path)), ValueError)}
for name, how in readers.items():
    os.mkfifo(folder / f"pipe-{name}")
    refused(folder / f"pipe-{name}", *how)
    (folder / f"zero-{name}").symlink_to("/dev/zero")
    refused(folder / f"zero-{name}", *how)
    (folder / f"large-{name}").touch()
    os.truncate(folder / f"large-{name}", 1 << 40)
    refused(folder / f"large-{name}", *how)
for number, data in enumerate(fuzz.BOMBS):
    for name in ("a.pt", "a.cmg") if len(data) < 1000 else ("a.pt",):
        path = folder / f"bomb-{number}-{name}"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\\n")
            archive.writestr("archive/data/0", b"1234")
        refused(path, *readers[name])
    path = folder / f"bomb-{number}-old.pt"
    path.write_bytes(_OLD + b"\\x80\\x02N." + data + b"\\x80\\x02].")
    refused(path)
for layers in ({"codewords": 3 * 10**8}, {"temporal_layers": 10**6}, {"width": 10**9}):
    content = checkpoint.read(good)
    content["config"]["fields"].update(layers)
    torch.save(content, folder / "sizes.pt")
    refused(folder / "sizes.pt")
    facts = {"format": 1, "config": content["config"]}
    write_tensors(folder / "sizes.safetensors", content["model"], facts)
    refused(folder / "sizes.safetensors")
# A directory of a hundred thousand members, which would take far more memory than their names.
entry = b"PK\\1\\2" + bytes(24) + b"\\1" + bytes(17) + b"x"
end = struct.pack("<4s4H2LH", b"PK\\5\\6", 0, 0, 65535, 65535, 100000 * len(entry), 4, 0)
(folder / "many.pt").write_bytes(b"PK\\3\\4" + 100000 * entry + end)
refused(folder / "many.pt")
print("all refused")
"""


def _tensor(sizes: bytes, strides: bytes) -> bytes:
    """A pickle of a tensor of one number."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + sizes
        + strides
        + b"\x89ccollections\nOrderedDict\n)RtR."
    )


# Pickles that take time or memory from whoever follows them.
BOMBS = (
    b"\x80\x02Nr\xff\xff\xff\x7f.",
    b"\x80\x02)" + b"\x85" * 500000 + b".",
    b"\x80\x02})" + b"\x85" * 500000 + b"Ns.",
    b"\x80\x02]q\0" + b"h\0h\0\x86q\0" * 100 + b".",
    b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(50000))
    + b"u.",
    b"\x80\x02(" + b"]" * 300000 + b"l.",
    b"\x80\x02" + b"N" * 600000 + b".",
    b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.",
    b"\x80\x02ctorch\nTensor\nJ\0\0\0\x40J\0\0\0\x40\x86R.",
    _tensor(b"J\0\0\0\x40\x85", b"K\0\x85"),
    _tensor(b"J\0\0\0\x40\x85", b"K\1\x85"),
    _tensor(b"K\1\x85", b"J\0\0\0\x40\x85"),
    _tensor(b"(" + 100 * b"K\1" + b"t", b"(" + 100 * b"K\1" + b"t"),
)


def test_nothing_blocks_runs_long_or_takes_memory(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(HERE), *sys.path])
    made = python("-c", HOSTILE, tmp_path, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    assert made.returncode == 0 and made.stdout.endswith("all refused\n"), made.stdout[-2000:] + made.stderr[-2000:]
