"""preprocessor.json: it travels from a store to runs, checkpoints and exported models, and is not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from unicode_fast import CheckpointError, checkpoint, export, load
from unicode_fast.data import DamagedStoreError, StoreError, open_data, open_store, verify
from unicode_fast.data.__main__ import main as data
from unicode_fast.data.check import check
from unicode_fast.data.store.write import MANIFEST, PREPROCESSOR, pack
from unicode_fast.data.stream import write_shards
from unicode_fast.files.tensor_files import read_tensors
from unicode_fast.files.untrusted import BadFile
from unicode_fast.media import Preprocessor
from unicode_fast.media.stored import check_plain, checked_preprocessor
from unicode_fast.train import main as train

NAMES = ("audio", "depth")


def described(*names: str) -> dict[str, Any]:
    """A preprocessor of the modalities of `tiny`."""
    return Preprocessor(
        {
            name: {
                "backbone": f"of-{name}",
                "reads": "sound",
                "options": {"bands": 6},
                "kind": tiny.MODALITIES[name].kind,
                "shape": list(tiny.MODALITIES[name].shape),
                "rate": 8000,
                "weights_sha256": None,
            }
            for name in names
        }
    ).as_dict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without a preprocessor."""
    clips = {"train": 40, "val": 12, "test": 12}
    return tiny.write(tmp_path_factory.mktemp("plain") / "store", clips, ",".join(NAMES), positions=3)


@pytest.fixture
def made(plain: Path, tmp_path: Path) -> Path:
    """The same with one."""
    opened = open_store(plain)
    opened.preprocessor = described(*NAMES)
    pack(opened, tmp_path / "made", progress=False)
    return tmp_path / "made"


class TestStore:
    def test_it_is_read_and_packed_again(self, plain: Path, made: Path, tmp_path: Path) -> None:
        assert open_store(plain).preprocessor is None
        assert open_store(made).preprocessor == json.loads((made / PREPROCESSOR).read_text()) == described(*NAMES)
        assert data(["pack", str(made), str(tmp_path / "again")]) == 0
        assert open_store(tmp_path / "again").preprocessor == described(*NAMES)
        assert open_store(tmp_path / "again").digest() == open_store(made).digest() != open_store(plain).digest()
        verify(open_store(made))
        assert check(str(made), progress=False).can_start

    def test_a_stream_keeps_it(self, made: Path, tmp_path: Path) -> None:
        pytest.importorskip("webdataset")
        write_shards(open_store(made), tmp_path / "tars", progress=False)
        assert open_data(f"webdataset:{tmp_path / 'tars'}").preprocessor == described(*NAMES)
        index = tmp_path / "tars" / "shards.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "preprocessor": [1]}))
        with pytest.raises(StoreError, match="its preprocessor must be a dictionary, got list"):
            open_data(f"webdataset:{tmp_path / 'tars'}")

    @pytest.mark.parametrize(
        "change", [Path.unlink, lambda file: file.write_text(file.read_text().replace("8000", "8001"))]
    )
    def test_a_changed_file_is_damage(self, made: Path, change: Callable[[Path], None]) -> None:
        change(made / PREPROCESSOR)
        for act in (lambda: open_store(made), lambda: open_store(made, verify=False)):
            with pytest.raises(DamagedStoreError, match=r"preprocessor.json' must be as written"):
                act()
        report = check(str(made), progress=False)
        assert not report.can_start and [finding.kind for finding in report.findings] == ["damaged"]

    @pytest.mark.parametrize("names", [("audio",), ("audio", "depth", "text"), ("depth", "video")])
    def test_other_modalities_are_damage(self, plain: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
        opened = open_store(plain)
        opened.preprocessor = described(*names)
        pack(opened, tmp_path / "other", progress=False)
        with pytest.raises(DamagedStoreError, match="its preprocessor must be of the modalities audio .*, depth"):
            open_store(tmp_path / "other")

    def test_a_manifest_with_another_entry(self, made: Path) -> None:
        manifest = json.loads((made / MANIFEST).read_text())
        for entry in ([], {"bytes": 1}, {"bytes": "1", "sha256": "a"}, "a"):
            (made / MANIFEST).write_text(json.dumps({**manifest, "preprocessor": entry}))
            with pytest.raises(DamagedStoreError, match="an entry is missing or malformed"):
                open_store(made)


class TestRun:
    FLAGS = (
        *(f"--{name}={value}" for name, value in tiny.SIZES.items() if not name.startswith(("grid", "word", "squ"))),
        *("--modalities=audio,depth", "--batch_size=10", "--device=cpu", "--validations=0", "--probe_tasks=none"),
        "--checkpoint_seconds=0",
    )

    def test_from_store_to_export(self, made: Path, plain: Path, tmp_path: Path) -> None:
        run, expected = tmp_path / "run", described(*NAMES)
        assert train([*self.FLAGS, f"--data={made}", f"--out={run}", "--steps=2"]) == 0
        assert json.loads((run / PREPROCESSOR).read_text()) == expected
        model = load(run, "last")
        assert model.preprocessor == expected
        export(model, tmp_path / "model.safetensors")
        assert read_tensors(tmp_path / "model.safetensors")[0]["preprocessor"] == expected
        assert load(tmp_path / "model.safetensors").preprocessor == expected
        # A resumed run compares it with that of its data.
        newest = checkpoint.step_path(run, 2)
        content = torch.load(newest, weights_only=True)
        for changed, message in (
            (None, "preprocessor of the data must be that of the checkpoint of step 2"),
            (described("audio", "depth", "text"), "preprocessor of the data must be that"),
            ({"format": 1}, "its preprocessor is invalid"),
            ([1], "its preprocessor must be a dictionary, got list"),
            (described("audio"), "must be of the modalities audio"),
        ):
            rest = {key: value for key, value in content.items() if key != "preprocessor"}
            torch.save(rest if changed is None else {**rest, "preprocessor": changed}, newest)
            with pytest.raises(CheckpointError, match=message):
                train([f"--resume={run}", "--resume_step=2"])
        torch.save(content, newest)
        (run / PREPROCESSOR).unlink()
        assert train([f"--resume={run}", "--resume_step=2"]) == 0
        assert (run / PREPROCESSOR).exists()

    def test_without_one(self, plain: Path, tmp_path: Path) -> None:
        assert train([*self.FLAGS, f"--data={plain}", f"--out={tmp_path / 'run'}", "--steps=1"]) == 0
        assert not (tmp_path / "run" / PREPROCESSOR).exists()
        model = load(tmp_path / "run", "last")
        assert model.preprocessor is None and "preprocessor" not in checkpoint.read_of_run(tmp_path / "run", "last")
        export(model, tmp_path / "model.safetensors")
        assert "preprocessor" not in read_tensors(tmp_path / "model.safetensors")[0]
        assert load(tmp_path / "model.safetensors").preprocessor is None

    def test_a_model_of_some_modalities_of_a_store(self, tmp_path: Path) -> None:
        model = tiny.model(names="audio,depth")
        model.preprocessor = described("audio", "depth", "text")
        export(model, tmp_path / "model.safetensors")
        assert load(tmp_path / "model.safetensors").preprocessor == described("audio", "depth", "text")


def circle() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["again"] = found
    return found


def doubled() -> dict[str, Any]:
    found: Any = "x"
    for _ in range(60):
        found = [found, found]
    return {"a": found}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (circle(), "must have at most 65536 values"),
        (doubled(), "must have at most 65536 values"),
        ({"a": "x" * (1 << 17)}, "must have at most 65536 values"),
        ({"a": torch.zeros(2)}, "must hold plain values, got tensor"),
        ({"a": float("nan")}, "must hold plain values, got nan"),
        ({1: "a"}, "keys of its preprocessor must be text"),
        ("a", "must be a dictionary, got str"),
        ({}, "its preprocessor is invalid"),
        ({**described("audio"), "modalities": {"audio": {**described("audio")["modalities"]["audio"], "shape": ["a"]}}},
         "its preprocessor is invalid"),
    ],
)  # fmt: skip
def test_hostile_entries(content: Any, message: str) -> None:
    with pytest.raises(BadFile, match=message):
        checked_preprocessor(content, {"audio": tiny.MODALITIES["audio"]}, exactly=True)


def test_plain_values_pass() -> None:
    check_plain({"a": [1, 2.5, None, True, {"b": "c"}]})
