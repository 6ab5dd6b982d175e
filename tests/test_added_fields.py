"""Files of older versions, which lack the fields that were added since: read with the values that mean "as before"."""

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from compare import assert_close
from tolerances import CONTINUED_RUN

from unicode_fast import CheckpointError, Config, ablate, checkpoint, load, preset
from unicode_fast import config as config_module
from unicode_fast.cli import resolve, resolve_saved
from unicode_fast.config import ADDED_FIELDS, FIELDS, check_value, completed, renamed
from unicode_fast.data import StoreError, open_data, open_store, write_store
from unicode_fast.evaluate import main as evaluate
from unicode_fast.report import tables as report
from unicode_fast.train import main as train
from unicode_fast.training.runs import resume_folder

# A store, a finished and an interrupted run over it, and an export; tests/data/README.md says how they were made.
ARCHIVE = Path(__file__).parent / "data" / "6207b0c.zip"
# Fields that some tests take for added ones; the values are not those of the presets.
ADDED = {"cpc_steps": 2, "club_floor": False, "loader_workers": 3}


def unpacked(folder: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def write_yaml(path: Path, values: Mapping[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    return str(path)


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(config_module, "ADDED_FIELDS", {**ADDED_FIELDS, **ADDED})
    return ADDED


class TestTable:
    def test_holds_fields_and_values_that_they_can_have(self) -> None:
        assert ADDED_FIELDS.keys() <= FIELDS.keys()
        assert {name: check_value(name, value) for name, value in ADDED_FIELDS.items()} == ADDED_FIELDS

    def test_released_rules_are_as_before(self) -> None:
        values = preset("official").flat()
        rules = [name for name in ADDED_FIELDS if FIELDS[name] in ("model", "method")]
        assert {name: values[name] for name in rules} == {name: ADDED_FIELDS[name] for name in rules}

    def test_every_field_of_it_may_be_missing(self, tmp_path: Path) -> None:
        config = tiny.config()
        saved = checkpoint.config_to_dict(config, tiny.MODALITIES)
        for name, value in ADDED_FIELDS.items():
            fields = without(saved["fields"], name)
            before, _ = checkpoint.config_from_dict({**saved, "fields": fields})
            assert before == config.replace_all(**{name: value})
            assert resolve_saved(write_yaml(tmp_path / "config.yaml", fields)) == before

    def test_all_that_was_added_since_an_older_version_is_in_it(self, tmp_path: Path) -> None:
        written = yaml.safe_load((unpacked(tmp_path) / "finished" / "config.yaml").read_text())
        assert {"preset", "size", *FIELDS} - set(renamed(written)) == set(ADDED_FIELDS)


class TestCompleted:
    def test_missing_fields_are_as_before_and_others_as_saved(self, added: dict[str, Any]) -> None:
        values = Config().flat()
        assert completed(values) == values
        assert completed(without(values, *added)) == {**values, **added}
        assert completed({**without(values, *added), "cpc_steps": 5})["cpc_steps"] == 5

    @pytest.mark.parametrize(
        ("changes", "removed", "message"),
        [
            ({"widht": 3}, (), "fields of this version only, got widht$"),
            ({}, ("width", "seed", "loader_workers"), "every field except those of ADDED_FIELDS, lacks width, seed$"),
            ({}, ("preset",), "lacks preset$"),
        ],
    )
    def test_others_are_refused_by_name(
        self, added: dict[str, Any], changes: dict[str, Any], removed: tuple[str, ...], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            completed({**without(Config().flat(), *removed), **changes})


# Changed and removed fields of a configuration, and the error.
FAULTS = [
    ({"widht": 3}, (), "(configuration fields|fields of this version) only, got widht$"),
    ({}, ("width",), "lacks width$"),
    ({"ema_update": "both"}, (), "ema_update must be one of joint, sequential, got 'both'$"),
]


class TestCheckpoints:
    """`ADDED` taken for fields that were added after the checkpoint had been written."""

    def test_model(self, added: dict[str, Any], tmp_path: Path) -> None:
        owner, path = tiny.model(**added), tmp_path / "model.pt"
        checkpoint.save(path, owner)
        content = checkpoint.read(path)
        content["config"]["fields"] = without(content["config"]["fields"], *added)
        torch.save(content, path)
        back = load(path)
        assert back.config == owner.config
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in owner.state_dict().items())

    @pytest.mark.parametrize(
        ("changes", "removed", "message"),
        [*FAULTS, ({"preset": "best"}, (), "preset must be one of official, paper, recommended, got 'best'$")],
    )
    def test_what_is_no_configuration_is_refused_with_the_file(
        self, tmp_path: Path, changes: dict[str, Any], removed: tuple[str, ...], message: str
    ) -> None:
        run = tmp_path / "run"
        path = checkpoint.step_path(run, 4)
        checkpoint.save(path, tiny.model())
        content = checkpoint.read(path)
        content["config"]["fields"] = {**without(content["config"]["fields"], *removed), **changes}
        torch.save(content, path)
        for place in (path, run):
            with pytest.raises(CheckpointError, match=f"^checkpoint {path} is of another version.*: .*{message}"):
                load(place, "last")

    def test_a_run_goes_on_as_before_only(self, added: dict[str, Any]) -> None:
        config = tiny.config(**added)
        saved = checkpoint.config_to_dict(config, tiny.MODALITIES)
        saved["fields"] = without(saved["fields"], *added)
        content = {"step": 3, "config": saved}

        def changed(**fields: object) -> dict[str, Any]:
            return checkpoint.changed_fields(content, config.replace_all(**fields), tiny.MODALITIES)

        assert changed() == {}
        assert changed(loader_workers=1) == {"loader_workers": 3}
        with pytest.raises(CheckpointError, match=r"configuration, got cpc_steps \d+ instead of \d+$"):
            changed(cpc_steps=1)
        del saved["fields"]["width"]
        with pytest.raises(CheckpointError, match=r"^checkpoint of step 3 .*: .* lacks width$"):
            changed()


class TestFiles:
    """`ADDED` taken for fields that were added after the YAML file had been written."""

    def test_a_run_of_an_older_version_is_as_before(self, added: dict[str, Any], tmp_path: Path) -> None:
        config = preset("paper").replace(width=32)
        file = write_yaml(tmp_path / "config.yaml", without(config.flat(), *added))
        assert resolve(file, {}) == resolve_saved(file) == config.replace_all(**added)
        assert resume_folder(str(tmp_path), {"loader_workers": 1})[1] == config.replace(**added | {"loader_workers": 1})
        assert report.run_config(tmp_path) == config.replace(**added)

    def test_flags_are_read_after_it(self, added: dict[str, Any], tmp_path: Path) -> None:
        config = preset("paper").replace(width=32)
        file = write_yaml(tmp_path / "config.yaml", without(config.flat(), *added))
        found = resolve(file, {"cpc_steps": 4, "width": 16, "preset": "recommended", "epochs": 3})
        expected = {**added, "cpc_steps": 4, "width": 16, "preset": "recommended", "epochs": 3, "steps": 0}
        assert found == config.replace_all(**expected)
        for flags, message in (
            ({"preset": "best"}, "^preset must be one of"),
            ({"width": "x"}, "^width must be int"),
            (
                {"code_matching_weight": 0.0, "code_matching_temperature": 3.0},
                "^code_matching_temperature is not read where code_matching_weight is 0.0",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                resolve(file, flags)

    def test_a_users_file_takes_the_presets_values(self, added: dict[str, Any], tmp_path: Path) -> None:
        file = write_yaml(tmp_path / "mine.yaml", {"preset": "paper", "width": 32})
        assert resolve(file, {}) == preset("paper").replace(width=32)
        file = write_yaml(tmp_path / "mine.yaml", without(preset("paper").flat(), *added, "width"))
        assert resolve(file, {}) == preset("paper")

    def test_a_preset_may_have_changed_where_a_field_is_not_read(self, added: dict[str, Any], tmp_path: Path) -> None:
        config = preset("recommended").replace_all(code_matching_weight=0.0, code_matching_temperature=3.0, **added)
        file = write_yaml(tmp_path / "config.yaml", without(config.flat(), *added))
        assert resolve(file, {}) == resolve_saved(file) == config
        assert resolve_saved(write_yaml(tmp_path / "config.yaml", config.flat())) == config

    @pytest.mark.parametrize(("changes", "removed", "message"), FAULTS)
    def test_what_is_no_configuration_is_refused_with_the_file(
        self, tmp_path: Path, changes: dict[str, Any], removed: tuple[str, ...], message: str
    ) -> None:
        file = write_yaml(tmp_path / "config.yaml", {**without(Config().flat(), *removed), **changes})
        for read in (lambda: resume_folder(str(tmp_path), {}), lambda: report.run_config(tmp_path)):
            with pytest.raises(ValueError, match=f"config '{file}' .*{message}"):
                read()

    def test_an_ablation_goes_on_as_before_only(self, added: dict[str, Any], tmp_path: Path) -> None:
        config = tiny.config(**added)
        for fields, same in (({}, True), ({"loader_workers": 1}, True), ({"cpc_steps": 1}, False)):
            found = [ablate.Variant("figure3", "12", config.replace_all(**fields), "one")]
            write_yaml(tmp_path / "one" / "seed-0" / "config.yaml", without(config.flat(), *added))
            if same:
                assert len(ablate.units(tmp_path, found, [0])) == 1
            else:
                with pytest.raises(ValueError, match="was trained with another"):
                    ablate.units(tmp_path, found, [0])


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 6207b0c wrote, its interrupted run gone on with to the end."""
    folder = unpacked(tmp_path_factory.mktemp("6207b0c"))
    shutil.copytree(folder / "interrupted", folder / "resumed")
    with pytest.MonkeyPatch.context() as patch:
        # The runs name their store by a path within the folder.
        patch.chdir(folder)
        assert train(["--resume=resumed", "--checkpoint_seconds=500"]) == 0
    return folder


class TestOlderVersion:
    """Files that 6207b0c wrote."""

    @pytest.fixture(autouse=True)
    def inside(self, older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(older)

    @pytest.mark.parametrize("place", ["finished", "finished/checkpoints/best.pt", "model.safetensors"])
    def test_model(self, place: str) -> None:
        model = load(place)
        written = yaml.safe_load(Path("finished/config.yaml").read_text())
        assert model.config.flat() == {**ADDED_FIELDS, **renamed(written)}
        assert model.config == resolve_saved("finished/config.yaml")
        features = tiny.batch(model)
        assert set(model(features).index) == set(model.names) == {"audio", "video", "text"}

    def test_store(self, tmp_path: Path) -> None:
        store = open_data("store")
        digest = checkpoint.read(Path("interrupted/checkpoints/step-00000004.pt"))["progress"]["data"]
        assert store.digest() == digest and store.classes == ["zero", "one", "two"]
        assert store.modalities == {name: tiny.MODALITIES[name] for name in ("audio", "video", "text")}
        splits = {name: dict(store.split(name).arrays) for name in store.splits}
        keys = ["audio", "audio.label", "class", "text", "video", "video.label"]
        assert {name: (len(arrays["class"]), sorted(arrays)) for name, arrays in splits.items()} == {
            "train": (12, keys), "val": (6, keys), "test": (9, keys)
        }  # fmt: skip
        # Made anew, as a built-in data set that was lost, it is what the run was trained on.
        write_store(tmp_path / "again", store.name, store.modalities, store.classes, splits)
        again = open_store(tmp_path / "again")
        assert again.digest() != digest and again.has_digest(digest)
        for name, arrays in splits.items():
            for key, array in arrays.items():
                written = np.load(f"store/{name}-{key}.npy")
                np.testing.assert_array_equal(array, written)
                np.testing.assert_array_equal(again.split(name).arrays[key], written)
        splits["val"]["audio"] = splits["val"]["audio"] + 1
        write_store(tmp_path / "other", store.name, store.modalities, store.classes, splits)
        assert not open_store(tmp_path / "other").has_digest(digest)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda split: split.pop("clips"), "an entry is missing or malformed: KeyError"),
            (lambda split: split.update(clips=7), "clips of split 'val' must be the length of its arrays, got 7"),
            (lambda split: split["arrays"].update(text=[]), "an entry is missing or malformed: TypeError"),
            (lambda split: split["arrays"]["text"].update(file="../text.npy"), "must be a plain file name"),
            (lambda split: split["arrays"]["text"].update(sha256=""), "val-text.npy.*checksum differs"),
        ],
    )
    def test_a_store_that_is_damaged(self, tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
        shutil.copytree("store", tmp_path / "store")
        manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
        change(manifest["splits"]["val"])
        (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StoreError, match=message):
            open_store(tmp_path / "store")

    def test_the_interrupted_run_ends_as_the_finished_one(self) -> None:
        model, whole = load("resumed", "last"), load("model.safetensors").state_dict()
        assert model.config == load("finished").config.replace(checkpoint_seconds=500.0)
        assert model.state_dict().keys() == whole.keys()
        for name, value in model.state_dict().items():
            assert_close(value, whole[name], CONTINUED_RUN, name)
        summary = json.loads(Path("resumed/summary.json").read_text())
        assert summary["steps"] == 8
        assert [(change["step"], change["field"]) for change in summary["changes"]] == [(4, "checkpoint_seconds")]
        assert set(yaml.safe_load(Path("resumed/config.yaml").read_text())) == {"preset", "size", *FIELDS}

    @pytest.mark.parametrize(
        ("fields", "unread"),
        [
            ({"modalities": "audio,video", "word_width": preset("recommended").model.word_width}, "word_target=lstm"),
            ({"commitment_weight": 0.0}, "commitment_own=3"),
        ],
    )
    def test_its_configuration_trains_anew(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], unread: str
    ) -> None:
        """Its file may hold values of fields that others switch off, unlike the preset of today; a flag may not."""
        written = yaml.safe_load(Path("finished/config.yaml").read_text())
        file = write_yaml(tmp_path / "config.yaml", {**written, **fields})
        flags = [f"--config={file}", "--steps=1", "--validations=0", "--probe_tasks=none"]
        assert train([*flags, f"--out={tmp_path / 'run'}"]) == 0
        assert "is of an older version; added fields: feature_norm none, " in capsys.readouterr().err
        found = resolve_saved(str(tmp_path / "run" / "config.yaml")).flat()
        assert {name: found[name] for name in ADDED_FIELDS} == ADDED_FIELDS
        with pytest.raises(ValueError, match=f"^{unread.split('=')[0]} is not read where"):
            train([*flags, f"--{unread}", f"--out={tmp_path / 'other'}"])

    def test_a_task_is_evaluated(self) -> None:
        assert evaluate(["finished", "--task=classification", "--from=audio", "--to=video", "--device=cpu"]) == 0
        [file] = Path("finished/evaluations").iterdir()
        row = json.loads(file.read_text())["row"]
        assert (row["task"], row["from"], row["to"]) == ("classification", "audio", "video") and 0 <= row["score"] <= 1

    def test_report(self, tmp_path: Path) -> None:
        """The run that this version ended has the older one's configuration, and so its line."""
        assert report.main(["finished", f"--out={tmp_path / 'report'}"]) == 0
        lines = [report.collect([Path(run)]) for run in ("finished", "resumed")]
        assert lines[0][0].label == lines[1][0].label
        assert (tmp_path / "report" / "report.md").stat().st_size > 100

    def test_ablation(self, tmp_path: Path) -> None:
        (tmp_path / "one" / "seed-0").mkdir(parents=True)
        for name in ("config.yaml", "summary.json"):
            shutil.copy(Path("finished") / name, tmp_path / "one" / "seed-0")
        found = [ablate.Variant("figure3", "8", resolve_saved("finished/config.yaml"), "one")]
        [unit] = ablate.units(tmp_path, found, [0])
        assert unit.finished
