"""Configuration, presets, YAML files and flags."""

from pathlib import Path

import pytest
import tiny
import torch
from compare import same

import unicode_fast
from unicode_fast import PRESETS, Config, Modality, preset
from unicode_fast import config as config_module
from unicode_fast.cli import field_help, given_fields, make_parser, read_yaml, resolve, with_underscores
from unicode_fast.config import FIELDS, RANGES, RENAMED_FIELDS, SECTIONS, modality_names
from unicode_fast.errors import UsageError
from unicode_fast.presets import from_saved


class TestFields:
    def test_names_are_unique_and_documented(self) -> None:
        assert len(FIELDS) == sum(len(kind.__dataclass_fields__) for kind in SECTIONS.values())
        assert set(field_help()) == set(FIELDS)

    def test_every_range_is_of_a_field(self) -> None:
        assert set(RANGES) <= set(FIELDS)

    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("size", ["small", "paper"])
    def test_presets_are_whole(self, name: str, size: str) -> None:
        config = preset(name, size)
        assert set(config.flat()) == {"preset", "size", *FIELDS}
        assert config.replace(**{k: v for k, v in config.flat().items() if k in FIELDS}) == config

    def test_sizes_of_the_paper(self) -> None:
        config = preset("official", "paper")
        assert (config.model.codewords, config.model.width, config.train.batch_size) == (400, 256, 80)
        assert (config.train.epochs, config.train.learning_rate, config.train.clip_norm) == (6, 4e-4, 0.5)


BAD = [
    ({"widht": 3}, ValueError, "no field 'widht'"),
    ({"width": 0}, ValueError, "width must be a whole number of at least 1, got 0"),
    ({"seed": 2**63}, ValueError, "seed must be a whole number from 0 to 9223372036854775807, got 9223372036854775808"),
    ({"width": 2.5}, TypeError, "width must be int, got float"),
    ({"width": True}, TypeError, "width must be int, got bool"),
    ({"codewords": 1}, ValueError, "codewords must be a whole number of at least 2, got 1"),
    ({"ema_decay": 1.5}, ValueError, "ema_decay"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate"),
    ({"ema_update": "both"}, ValueError, "ema_update must be one of joint, sequential, got 'both'"),
    ({"easy": 1}, TypeError, "easy must be true or false"),
]


class TestBadValues:
    @pytest.mark.parametrize(("values", "error", "message"), BAD)
    def test_replace(self, values: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Config().replace(**values)

    def test_preset_and_size(self) -> None:
        with pytest.raises(ValueError, match="preset must be one of official, paper, recommended, got 'best'"):
            preset("best")
        with pytest.raises(ValueError, match="size must be one of small, paper, got 'huge'"):
            preset("paper", "huge")

    @pytest.mark.parametrize("names", ["audio", "", "audio,audio"])
    def test_modalities(self, names: str) -> None:
        with pytest.raises(ValueError, match="two or more different modalities"):
            modality_names(names)

    @pytest.mark.parametrize(
        ("kind", "shape"),
        [("vectors", (3,)), ("vector", (3, 4)), ("grid", (4, 7, 3)), ("words", (0,)), ("grid", (7, 7))],
    )
    def test_modality(self, kind: str, shape: tuple) -> None:
        with pytest.raises(ValueError, match="kind|shape|grid"):
            Modality(kind, shape)

    @pytest.mark.parametrize("field", ["temporal_layers", "cpc_layers"])
    def test_layers_that_would_be_built_without_end(self, field: str) -> None:
        with pytest.raises(ValueError, match=f"{field} must be a whole number from 1 to 1000, got 1000000"):
            Config().replace(**{field: 1_000_000})

    @pytest.mark.parametrize("shape", [(3.5,), ("a",), 3, None])
    def test_a_shape_of_something_else(self, shape: object) -> None:
        with pytest.raises(TypeError, match="shape must (be a tuple of sizes|hold whole numbers), got"):
            Modality("vector", shape)  # type: ignore[arg-type]


class TestFiles:
    def test_yaml_then_flags(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("preset: paper\nwidth: 64\nsteps: 10\n")
        config = resolve(str(file), {"steps": 20})
        assert (config.preset, config.model.width, config.train.steps) == ("paper", 64, 20)
        assert config.method.ema_partner == "attended"

    def test_resolved_configuration_reads_back(self, tmp_path: Path) -> None:
        import yaml

        config = preset("official").replace(width=32)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config.flat()))
        assert resolve(str(file), {}) == config

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("widht: 3", "fields only, got widht"),
            ("- 1", "mapping"),
            ("a: 1\nb: [2\nc", "readable YAML file, got '.*bad.yaml': while .* line 2, expected .* line 3$"),
            ("a: 1\nb: c: 2", "YAML file, got '.*bad.yaml': mapping values are not allowed here in line 2$"),
            ("a: 1\n\nb: \0", "YAML file, got '.*bad.yaml': special characters are not allowed in line 3$"),
            ("a: 1\nb: \udcff", "YAML file, got '.*bad.yaml': invalid start byte in line 2$"),
            ("width: x", "bad.yaml' has an invalid value: width must be int"),
            ("width: 3\nsize: small\nwidth: 4", "width occurs twice, in line 1 and in line 3$"),
            ("a: &x [1]\nb: *x", "an anchor, an alias or a tag in line 1$"),
            ("width: !!int 3", "an anchor, an alias or a tag in line 1$"),
            ("size: small\n<<: {width: 3}", "a key is not text, << in line 2$"),
            ("? [a]\n: 3", "a key is not text"),
            ("[" * 60000, "it is nested in line 1$"),
            ("{a: " * 15000, "it is nested in line 1$"),
            ("a: " + "x" * (1 << 16), "at most 65536 bytes, '.*bad.yaml' has more"),
            ("width: 010", "010 is not a whole number in decimal digits in line 1$"),
            ("steps: 1:30", "1:30 is not a whole number in decimal digits in line 1$"),
            ("width: 0x10", "0x10 is not a whole number in decimal digits"),
            ("width: 1_0", "1_0 is not a whole number in decimal digits"),
            ("width: " + "9" * 5000, "9 is not a whole number in decimal digits in line 1$"),
            ("learning_rate: 1:30.5", "1:30.5 is not a number in decimal digits"),
            ("learning_rate: 1e999", "learning_rate must be a finite number of at least 1e-12, got inf"),
            ("learning_rate: .nan", "learning_rate must be a finite number of at least 1e-12, got nan"),
            ("learning_rate: 2020-13-45", "readable YAML file, got '.*bad.yaml': month must be in 1..12"),
            ("width: 2020-01-01", "width must be int, got date"),
            ("width: {a: 1}", "width must be int, got dict"),
            ("preset: " + "x" * 9000, "preset must be one of"),
            ("".join(f"k{n}: 1\n" for n in range(500)), "fields only, got k0, k1, .* and [0-9]+ more$"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "bad.yaml"
        file.write_text(text, errors="surrogateescape")
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            resolve(str(file), {})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 300

    def test_numbers_that_a_file_may_hold(self, tmp_path: Path) -> None:
        file = tmp_path / "good.yaml"
        file.write_text("width: +64\nseed: 0\nlearning_rate: 1e-3\nclip_norm: .5\nema_decay: 1\ncpc_weight: 1.5e+0\n")
        found = resolve(str(file), {}).flat()
        truth = {"width": 64, "seed": 0, "learning_rate": 1e-3, "clip_norm": 0.5, "ema_decay": 1.0, "cpc_weight": 1.5}
        assert {name: found[name] for name in truth} == truth
        file.write_text("modalities: [audio, video]\n")
        assert resolve(str(file), {}).data.modalities == "audio,video"

    def test_missing_file(self) -> None:
        with pytest.raises(ValueError, match="readable YAML file, got 'nowhere.yaml'"):
            read_yaml("nowhere.yaml")

    def test_epochs_without_steps_count_epochs(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("epochs: 3\n")
        assert (resolve(str(file), {}).train.steps, resolve(str(file), {}).train.epochs) == (0, 3)


# A value that differs from the preset's, for each field that another field can switch off.
OTHER = {
    "grid_semantic_width": 9, "ema_epsilon": 0.5, "ema_own_weight": 0.25, "reset_noise": 0.5,
    "reset_active_within": 7, "reset_unless": "all", "reset_source": "codeword", "reset_ema": False,
    "commitment_own": 5.0, "commitment_partner": 3.0, "commitment_norm": "sum", "commitment_partners": "all",
    "club_floor": False, "presence_weight": 0.5, "grounding_weight": 0.5, "assignment_weight": 3.0,
    "club_reduction": "sum", "club_input": "quantised", "club_weight": 7.0, "club_inner_steps": 3,
    "club_learning_rate": 0.5, "cpc_self_weight": 0.7, "cpc_softmax_over": "predictions", "cpc_scale": "sqrt_width",
    "cpc_temperature": 2.0, "cpc_earliest": 1, "code_matching_pairing": "official",
    "code_matching_directions": "rows", "code_matching_temperature": 3.0,
    "grid_hidden_width": 5, "grid_specific_width": 7, "grid_club_width": 3,
    "grid_pooling": "sum", "squeeze_width": 3, "residual_skip": "relu", "vector_specific_width": 9, "word_width": 10,
    "word_target": "lstm", "precision": "bfloat16", "loader_workers": 5, "channels_last": True,
    "turn_mask": 0.5, "jigsaw_permutations": 5, "jigsaw_hidden": 7,
}  # fmt: skip
# The method that reads a switch, where Uni-Code does not.
METHOD_OF = {"turn_decoder": "turn", "jigsaw_parts": "micu"}
SWITCHED = [
    (switch, value, name) for switch, values, names in config_module._SWITCHES for value in values for name in names
]


def trained(names: str, **fields: object) -> dict[str, torch.Tensor]:
    """A tiny model after three steps."""
    trainer = tiny.trainer(names=names, **{"reset_after": 1, **fields})
    for seed in range(3):
        trainer.train_step(tiny.batch(trainer.model, seed=seed), None, 1e-3)
    return trainer.model.state_dict()


class TestUnreadFields:
    """A field that is not read changes no bit of a trained model; a change of it is an error."""

    @pytest.mark.parametrize(("switch", "value", "name"), SWITCHED)
    def test_switched_off(self, switch: str, value: object, name: str) -> None:
        method = METHOD_OF.get(switch, "uni-code")
        with pytest.raises(ValueError, match=f"{name} is not read where {switch} is {value!r}.*, got {name}"):
            preset("recommended", method=method).replace(**{switch: value, name: OTHER[name]})
        fields = {"names": "audio,video,text", "method": method, switch: value}
        assert same(trained(**fields), trained(**fields, **{name: OTHER[name]}))

    @pytest.mark.parametrize(
        ("names", "kinds", "unread"),
        [
            ("audio,depth", ["vector", "vector"], ["grid", "words"]),
            ("video,audio", ["grid", "vector"], ["words"]),
            ("audio,text", ["vector", "words"], ["grid", "assignment"]),
        ],
    )
    def test_kinds(self, names: str, kinds: list, unread: list) -> None:
        found = set(Config().unread_fields(kinds)) - set(Config().unread_fields())
        expected = {"grid": config_module._KIND_FIELDS[0][1], "words": config_module._KIND_FIELDS[2][1]}
        expected["assignment"] = ("assignment_weight",)
        assert found == {name for kind in unread for name in expected[kind]} - set(Config().unread_fields())
        changed = {name: OTHER[name] for name in found}
        assert same(trained(names), trained(names, **changed))

    def test_two_grids(self) -> None:
        assert "vector_specific_width" in Config().unread_fields({"grid"})

    def test_a_whole_set_may_hold_them(self) -> None:
        config = preset("official")
        assert config.model.grid_semantic_width == Config().model.grid_semantic_width
        assert config.replace_all(grid_semantic_width=9).model.grid_semantic_width == 9


class TestFlags:
    def test_every_field_has_a_flag(self) -> None:
        parser = make_parser("train", "x")
        arguments = parser.parse_args(["--width", "32", "--easy", "true", "--ema_update", "sequential"])
        assert given_fields(arguments) == {"width": 32, "easy": True, "ema_update": "sequential"}
        text = parser.format_help()
        assert all(f"--{name}" in text for name in FIELDS)

    @pytest.mark.parametrize(
        ("flags", "meant"),
        [(["--widht", "3"], ", is --width meant?"), (["--nothing-like-it"], ""), (["extra"], "")],
    )
    def test_bad_flags_are_named(self, flags: list[str], meant: str) -> None:
        with pytest.raises(UsageError) as caught:
            make_parser("train", "x").parse_args(flags)
        assert str(caught.value).startswith(f"unrecognized arguments: {' '.join(flags)}{meant}; ")
        assert "--help" in str(caught.value)

    def test_dashes_and_underscores_are_the_same(self) -> None:
        words = ["--batch-size", "4", "--ema-update=joint", "a-b", "--out=x-y"]
        assert with_underscores(words) == ["--batch_size", "4", "--ema_update=joint", "a-b", "--out=x-y"]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--steps", "1.5"], "steps must be int, got str '1.5'"),
            (["--ema_update", "both"], "ema_update must be one of joint, sequential, got 'both'"),
            (["--learning_rate", "nan"], "learning_rate must be a finite number"),
            (["--easy", "1"], "easy must be true or false"),
        ],
    )
    def test_bad_values_have_one_line(self, flags: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            resolve(None, given_fields(make_parser("train", "x").parse_args(flags)))
        assert "\n" not in str(caught.value)

    def test_epochs_take_the_place_of_steps(self) -> None:
        config = resolve(None, {"epochs": 3})
        assert (config.train.steps, config.train.epochs) == (0, 3)

    def test_yaml_lists_and_exponents(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("modalities: [audio, text]\nlearning_rate: 1e-3\n")
        config = resolve(str(file), {})
        assert (config.data.modalities, config.train.learning_rate) == ("audio,text", 1e-3)


class TestRenamedFields:
    """Former names of fields, in flags, files, Python and saved configurations."""

    OLD = {"revive_after": 7, "cmcm_weight": 0.25, "feed": "direct"}

    def check(self, config: Config) -> None:
        assert [config.flat()[n] for n in ("reset_after", "code_matching_weight", "loader")] == [7, 0.25, "direct"]

    def test_in_python_and_saved(self) -> None:
        self.check(preset("recommended").replace(**self.OLD))
        present = {new: old for old, new in RENAMED_FIELDS.items()}
        saved = preset("paper").replace(reset_after=7, code_matching_weight=0.25, loader="direct").flat()
        self.check(from_saved({present.get(name, name): value for name, value in saved.items()}))

    def test_in_flags_and_files(self, tmp_path: Path) -> None:
        flags = [f"--{name}={value}" for name, value in self.OLD.items()]
        self.check(resolve(None, given_fields(make_parser("train", "").parse_args(flags))))
        (tmp_path / "old.yaml").write_text("revive_after: 7\ncmcm_weight: 0.25\nfeed: direct\n")
        self.check(resolve(str(tmp_path / "old.yaml"), {}))

    def test_both_names(self, tmp_path: Path) -> None:
        message = "revive_after must not be given together with reset_after, its new name, got both"
        with pytest.raises(ValueError, match=f"^{message}$"):
            preset("recommended").replace(revive_after=7, reset_after=7)
        with pytest.raises(ValueError, match=f"^{message}$"):
            given_fields(make_parser("train", "").parse_args(["--revive_after=7", "--reset_after=7"]))
        (tmp_path / "both.yaml").write_text("reset_after: 7\nrevive_after: 7\n")
        with pytest.raises(ValueError, match=f"both.yaml': {message}$"):
            resolve(str(tmp_path / "both.yaml"), {})

    def test_the_rule_of_the_update(self) -> None:
        assert unicode_fast.UpdateRule(revive_after=7, decay=0.5) == unicode_fast.EmaConfig(reset_after=7, decay=0.5)
