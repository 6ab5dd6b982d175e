"""Checkpoints of CMG: what is read, kept, refused and written back, from Python and from the command line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official_oracle as oracle
import pytest
import torch
from compare import assert_close
from official_checkpoint import MODALITIES, TIED, checkpoint, features, map_arrays, shapes
from official_tolerances import OFFICIAL

import unicode_fast
from unicode_fast import Modality, UniCode, preset
from unicode_fast.compat import CmgFileError, convert, from_cmg, to_cmg
from unicode_fast.compat.cmg_names import used_entries

# Keys of the release's own follow-up.
MINIMAL = ("Encoder_parameters", "Text_ar_lstm_parameters", "epoch", "total_step")


def tensors(variant: str = "AVT", **options: Any) -> dict[str, Any]:
    return map_arrays(checkpoint(variant, 11, widths=TIED, **options), torch.from_numpy)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """The same keys in the same order, values and dtypes, all the way down."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same_bits(actual[key], value)
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


class TestReading:
    @pytest.mark.parametrize("variant", MODALITIES)
    def test_sizes_and_modalities(self, variant: str) -> None:
        model = from_cmg(tensors(variant))
        shape_of = {"audio": Modality("vector", (TIED.audio,)), "video": Modality("grid", (7, 7, TIED.video))}
        shape_of["text"] = Modality("words", (TIED.words,))
        assert model.modalities == {name: shape_of[name] for name in MODALITIES[variant]}
        assert model.names == MODALITIES[variant]
        assert model.config.preset == "official"
        assert model.dtype == torch.float64
        assert not model.training

    def test_released_sizes(self) -> None:
        """A full-size file gives the preset at the paper's size, the sizes of absent modalities included."""
        model = from_cmg(map_arrays(checkpoint("AT", optimizers=False), torch.from_numpy))
        expected = preset("official", "paper").replace(modalities="audio,text")
        assert model.config == expected
        encoder = sum(p.numel() for name, p in model.encoders.named_parameters() if ".words." not in name)
        templates = 2 * sum(p.numel() for p in model.encoders["audio"].temporal.layers[0].parameters())
        assert encoder + templates == 4_936_192

    @pytest.mark.parametrize("variant", MODALITIES)
    def test_a_file_holds_every_value_of_its_model(self, variant: str) -> None:
        model = from_cmg(tensors(variant))
        taken = [name for entries in used_entries(model.modalities).values() for name in entries.values()]
        assert sorted(taken) == sorted(set(model.state_dict()) - {"codebook.step"})
        assert model.codebook.step == 0

    def test_source_and_global_generator_stay_as_they_are(self) -> None:
        source, state = tensors("AT"), torch.get_rng_state()
        model = from_cmg(source)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert_same_bits(source, tensors("AT"))

    def test_minimal_keys(self) -> None:
        source, inputs = tensors(), features("AVT", 2, 10, widths=TIED)
        minimal = {key: source[key] for key in MINIMAL}
        with pytest.warns(UserWarning, match="CPC_parameters, Audio_mi_net_parameters.*random values"):
            model = from_cmg(minimal)
        saved = checkpoint("AVT", 11, widths=TIED)
        for name, value in inputs.items():
            encoded, expected = model.encode(name, torch.from_numpy(value)), oracle.encode(saved, name, value)
            assert np.array_equal(encoded.index.numpy(), expected["index"])
            assert_close(encoded.vector, expected["code"], OFFICIAL, name)
        assert_same_bits(to_cmg(model), minimal)

    def test_without_text_lstm_the_text_sequence_is_the_input(self) -> None:
        source = tensors("AT")
        del source["Text_ar_lstm_parameters"]
        message = rf"no Text_ar_lstm_parameters: text features must be that LSTM's output, \(B, T, {TIED.text}\)"
        with pytest.warns(UserWarning, match=message):
            model = from_cmg(source)
        assert model.modalities["text"] == Modality("vector", (TIED.text,))
        with pytest.raises(ValueError, match=f"must have shape .*{TIED.text}"):
            model.encode("text", torch.zeros(1, 2, TIED.words, dtype=torch.float64))
        assert_same_bits(to_cmg(model), source)

    def test_float32(self) -> None:
        source = tensors("AV")
        model = from_cmg(source, torch.float32)
        assert model.dtype == torch.float32
        assert model.codebook.codebook.dtype == torch.float32
        back = to_cmg(model)
        original = source["Encoder_parameters"]["Audio_encoder.audio_linear.weight"]
        written = back["Encoder_parameters"]["Audio_encoder.audio_linear.weight"]
        assert torch.equal(written, original.float().double())

    def test_float32_file(self) -> None:
        source = map_arrays(checkpoint("AV", 11, widths=TIED), lambda value: torch.from_numpy(value.astype(np.float32)))
        model = from_cmg(source)
        assert model.config.train.dtype == "float32"
        assert_same_bits(to_cmg(model), source)

    def test_other_dtypes_are_refused(self) -> None:
        with pytest.raises(TypeError, match="dtype must be torch.float64 or torch.float32, got torch.float16"):
            from_cmg(tensors("AT"), torch.float16)


ENTRY = "audio_self_att.affine_matrix.weight"
TEMPLATE = "audio_self_att.encoder_layer.norm1.weight"


def renamed(source: dict[str, Any]) -> None:
    source["Encoder_parameters"]["audio_self_attention"] = source["Encoder_parameters"].pop(ENTRY)


def put(key: str, entry: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda source: source[key].__setitem__(entry, value)


def drop(key: str, entry: str | None = None) -> Callable[[dict[str, Any]], None]:
    return lambda source: source.pop(key) if entry is None else source[key].pop(entry)


BAD = {
    "no encoder": (drop("Encoder_parameters"), "must hold the key 'Encoder_parameters', got CPC_parameters"),
    "unknown key": (lambda source: source.update(scheduler={}), "got scheduler too"),
    "renamed": (renamed, f"'{ENTRY}' is missing in Encoder_parameters; 'audio_self_attention' is surplus"),
    "no codebook": (drop("Encoder_parameters", "Cross_quantizer.embedding"), "must hold 'Cross_quantizer.embedding'"),
    "wrong shape": (
        put("Encoder_parameters", ENTRY, torch.zeros(16, 5).double()),
        rf"'{ENTRY}' in Encoder_parameters must have shape \(16, 6\), got \(16, 5\)",
    ),
    "transposed codebook": (put("Encoder_parameters", "Cross_quantizer.embedding", torch.zeros(3).double()), "2 dim"),
    "no template": (drop("Encoder_parameters", TEMPLATE), f"'{TEMPLATE}' is missing"),
    "wrong template": (
        put("Encoder_parameters", TEMPLATE, torch.zeros(9).double()),
        rf"'{TEMPLATE}'.*\(16,\), got \(9,\)",
    ),
    "wrong attention": (
        put("Encoder_parameters", "video_semantic_encoder.affine_video_self.bias", torch.zeros(4).double()),
        r"affine_video_self.bias' in Encoder_parameters must have shape \(5,\), got \(4,\)",
    ),
    "wrong idle net": (put("Text_mi_net_parameters", "p_mu.2.bias", torch.zeros(3).double()), r"p_mu.2.bias' in Text"),
    "surplus in idle net": (put("Text_ar_lstm_parameters", "x", torch.zeros(3).double()), "'x' is surplus in Text_ar"),
    "no decoder entry": (drop("Decoder_parameters", "Audio_decoder.audio_rec.bias"), "audio_rec.bias' is missing"),
    "no classifier": (drop("Decoder_parameters", "video_semantic_decoder.linear.bias"), "linear.bias' is missing"),
    "dtype": (put("Encoder_parameters", ENTRY, torch.zeros(16, 6)), "must be torch.float64 like the codebook"),
    "NaN": (
        put("Encoder_parameters", "Cross_quantizer.embedding", torch.full((19, 8), float("nan")).double()),
        "'Cross_quantizer.embedding' in Encoder_parameters must hold finite numbers, got NaN or Inf",
    ),
    "no tensor": (put("CPC_parameters", "audio_predictors.0.bias", [0.0]), "must be a tensor, got list"),
    "no dictionary": (lambda source: source.update(CPC_parameters=3), "CPC_parameters must be a dictionary of tensors"),
    "half a count": (
        put("Encoder_parameters", "Cross_quantizer.unactivated_count", torch.full((19,), 0.5).double()),
        "must hold whole numbers",
    ),
    "audio alone": (
        lambda source: [
            source["Encoder_parameters"].pop(name)
            for name in list(source["Encoder_parameters"])
            if name.lower().startswith("video")
        ],
        "must hold the encoders of audio, video; .*got audio$",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize("name", BAD)
    def test_message_names_the_entry(self, name: str) -> None:
        spoil, message = BAD[name]
        source = tensors("AV")
        spoil(source)
        with pytest.raises(CmgFileError, match=message):
            from_cmg(source)

    def test_a_file_that_fits_is_tested_for_changed_bits(self, tmp_path: Path) -> None:
        path = tmp_path / "changed.pt"
        torch.save(tensors("AT"), path)
        data = bytearray(path.read_bytes())
        data[data.index(tensors("AT")["Encoder_parameters"]["Cross_quantizer.embedding"].numpy().tobytes()) + 3] ^= 1
        path.write_bytes(data)
        with pytest.raises(CmgFileError, match="changed.pt must be a checkpoint of CMG; .*checksum"):
            from_cmg(path)

    @pytest.mark.parametrize(
        "rest",
        [[], {"other": 1}, {"Encoder_parameters": 3}, {"Encoder_parameters": {"x": "float32"}},
         {"CPC_parameters": {"audio_predictors.0.weight": "load"}}],
    )  # fmt: skip
    def test_file_entries_in_our_checkpoint_are_checked(self, rest: Any) -> None:
        model = from_cmg(tensors("AT"))
        model.cmg_rest = rest
        with pytest.raises(CmgFileError, match="what the model keeps of"):
            to_cmg(model)

    def test_long_lists_are_cut(self) -> None:
        source = tensors("AV")
        source["CPC_parameters"] = {f"x{n}": torch.zeros(1).double() for n in range(20)}
        with pytest.raises(CmgFileError, match="and 38 more$"):
            from_cmg(source)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"source must be a checkpoint of CMG, there is no file: .*none\.pt"
        ):
            from_cmg(tmp_path / "none.pt")
        with pytest.raises(CmgFileError, match=f"{re.escape(str(tmp_path))} must be .*no plain file"):
            from_cmg(tmp_path)
        with pytest.raises(TypeError, match="source must be a path, got NoneType"):
            from_cmg(None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("keep", [0, 100, 0.5])
    def test_truncated_file(self, tmp_path: Path, keep: float) -> None:
        path = tmp_path / "cut.pt"
        torch.save(tensors("AT"), path)
        content = path.read_bytes()
        path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
        with pytest.raises(CmgFileError, match="cut.pt.*truncated, damaged"):
            from_cmg(path)

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "was-run"),)

        torch.save({**tensors("AT"), "epoch": Harmful()}, tmp_path / "harmful.pt")
        with pytest.raises(CmgFileError, match="more than tensors and plain values"):
            from_cmg(str(tmp_path / "harmful.pt"))
        assert not (tmp_path / "was-run").exists()

    def test_something_else_in_a_file(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(CmgFileError, match="must hold a dictionary, got list"):
            from_cmg(tmp_path / "list.pt")


class TestWritingBack:
    @pytest.mark.parametrize("variant", MODALITIES)
    def test_same_bits(self, variant: str, tmp_path: Path) -> None:
        source = tensors(variant)
        assert_same_bits(to_cmg(from_cmg(source)), source)
        torch.save(source, tmp_path / "file.pt")
        assert_same_bits(to_cmg(from_cmg(tmp_path / "file.pt")), source)

    def test_trained_values_are_written(self) -> None:
        model = from_cmg(tensors("AT"))
        with torch.no_grad():
            model.encoders["audio"].specific[0].weight.fill_(2)
            model.codebook.idle[1].fill_(7)
            model.codebook.idle[0].fill_(9)
        written = to_cmg(model)["Encoder_parameters"]
        assert (written["Audio_encoder.audio_linear.weight"] == 2).all()
        assert (written["Cross_quantizer.unactivated_count"] == 7).all()

    @pytest.mark.parametrize("variant", MODALITIES)
    def test_model_of_our_own(self, variant: str) -> None:
        """The file has all entries of its networks, and gives the same model."""
        config = from_cmg(tensors(variant)).config
        kinds = from_cmg(tensors(variant)).modalities
        model = UniCode(kinds, config.replace(seed=5)).eval()
        written = to_cmg(model, epoch=3)
        expected = shapes(variant, TIED)
        for key in written.keys() & expected.keys():
            assert set(written[key]) == set(expected[key])
        assert written["epoch"] == 3
        again = from_cmg(written)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name

    def test_other_architectures_are_refused(self) -> None:
        kinds = {"audio": Modality("vector", (4,)), "text": Modality("words", (6,))}
        with pytest.raises(ValueError, match="must have grid_pooling = 'sum', as .*, got 'flatten'"):
            to_cmg(UniCode(kinds, preset("recommended")))
        with pytest.raises(ValueError, match=r"in this order, got text, audio"):
            to_cmg(UniCode(dict(reversed(kinds.items())), preset("official")))
        with pytest.raises(ValueError, match="modality 'audio' must be vector"):
            to_cmg(UniCode({**kinds, "audio": Modality("words", (4,))}, preset("official")))


class TestCommand:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        torch.save(tensors(), tmp_path / "DCID-model-2.pt")
        return tmp_path / "DCID-model-2.pt"

    def test_there_and_back(self, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run, back = tmp_path / "new" / "run", tmp_path / "back.pt"
        assert convert.main(["--from-cmg", str(file), str(run)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(run)
        model, inputs = unicode_fast.load(run), torch.from_numpy(features("AVT", 2, 10, widths=TIED)["video"])
        assert torch.equal(model.encode("video", inputs).index, from_cmg(file).encode("video", inputs).index)
        assert convert.main(["--to-cmg", str(run), str(back)]) == 0
        assert_same_bits(torch.load(back, weights_only=True), tensors())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["DCID-model-2.pt", "back.pt", "new"]
        assert [path.name for path in run.parent.iterdir()] == ["run"]

    def test_notes_and_dtype(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"Encoder_parameters": tensors("AT")["Encoder_parameters"]}, tmp_path / "file.pt")
        convert.main(["--from-cmg", str(tmp_path / "file.pt"), str(tmp_path / "run"), "--dtype", "float32"])
        assert "note: the file has no Text_ar_lstm_parameters" in capsys.readouterr().out
        assert unicode_fast.load(tmp_path / "run").dtype == torch.float32

    def test_nothing_is_overwritten(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        with pytest.raises(ValueError, match="OUT must be a new path, got .*there, which exists"):
            convert.main(["--from-cmg", str(file), str(tmp_path / "there")])
        with pytest.raises(ValueError, match="OUT must be a new path"):
            convert.main(["--to-cmg", str(tmp_path / "run"), str(file)])
        assert_same_bits(torch.load(file, weights_only=True), tensors())

    def test_a_bad_file_leaves_nothing_behind(self, tmp_path: Path) -> None:
        (tmp_path / "bad.pt").write_bytes(b"PK")
        with pytest.raises(CmgFileError):
            convert.main(["--from-cmg", str(tmp_path / "bad.pt"), str(tmp_path / "run")])
        assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]

    def test_bad_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="checkpoint must be best, last or a step, got 'first'"):
            convert.main(["--to-cmg", "run", str(tmp_path / "out"), "--checkpoint", "first"])
        for way, kind in (("--to-cmg", "a run folder or a checkpoint file"), ("--from-cmg", "a file of the released")):
            with pytest.raises(ValueError, match=f"{way[2:]} must be {kind}.*, got 'nosuch'"):
                convert.main([way, "nosuch", str(tmp_path / "out")])
