"""Bad input at the library's borders: each has one clear error and leaves what was there before.

The table lists what a user can get wrong with a model, a batch, a store or a run. Operators have theirs in
test_bad_input_ops.py, configuration in test_config.py, stores and caches in test_store.py and test_talking_digits.py,
checkpoints in test_checkpoint.py, files of the released code in test_compat_cmg.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from unicode_fast import Modality, UniCode, checkpoint, load
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.errors import message_of
from unicode_fast.evaluate import main as evaluate
from unicode_fast.train import main as train

NAN, INF = float("nan"), float("inf")


def features(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tiny.batch(tiny.model()), **changed}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in features().items() if key != name}


def with_value(value: float) -> torch.Tensor:
    audio = torch.zeros(3, 5, 6)
    audio[1, 2, 3] = value
    return audio


ONES = torch.ones(6, 5, dtype=torch.bool)
MASK = dict.fromkeys(("audio", "video", "text"), ONES)
HOLE = torch.tensor([[True, False, True, True, True]] * 3)

MODEL = [
    (
        "a modality missing from the batch",
        lambda m: m(without("video")),
        ValueError,
        "must hold the modalities audio, video, text, got audio, text",
    ),
    (
        "an unknown modality in the batch",
        lambda m: m(features(smell=torch.zeros(6, 5, 2))),
        ValueError,
        "got audio, video, text, smell",
    ),
    (
        "a wrong width",
        lambda m: m(features(audio=torch.zeros(6, 5, 7))),
        ValueError,
        r"'audio' must have shape \(B, T, 6\), got \(6, 5, 7\)",
    ),
    (
        "a missing dimension",
        lambda m: m(features(video=torch.zeros(6, 5, 100))),
        ValueError,
        r"'video' must have shape \(B, T, 5, 5, 4\)",
    ),
    (
        "a wrong dtype",
        lambda m: m(features(audio=torch.zeros(6, 5, 6).double())),
        TypeError,
        "'audio' must be torch.float32 as the model is, got torch.float64",
    ),
    (
        "an array in place of a tensor",
        lambda m: m(features(audio=torch.zeros(6, 5, 6).numpy())),
        TypeError,
        "must be a Tensor, got ndarray",
    ),
    (
        "another device",
        lambda m: m(features(audio=torch.zeros(6, 5, 6, device="meta"))),
        ValueError,
        "must be on cpu as the model is, got meta",
    ),
    ("an empty batch", lambda m: m(features(audio=torch.zeros(0, 5, 6))), ValueError, "B and T of at least 1"),
    ("no steps", lambda m: m(features(audio=torch.zeros(6, 0, 6))), ValueError, "B and T of at least 1"),
    (
        "different clips",
        lambda m: m(features(audio=torch.zeros(5, 5, 6))),
        ValueError,
        "same clips in every modality.*'audio': 5",
    ),
    (
        "a mask that is not bool",
        lambda m: m(features(), {**MASK, "audio": torch.ones(6, 5)}),
        TypeError,
        "mask of 'audio' must be bool",
    ),
    (
        "a mask of another shape",
        lambda m: m(features(), {**MASK, "audio": ONES[:, :4]}),
        ValueError,
        r"mask of 'audio' must have shape \(6, 5\)",
    ),
    (
        "features that are no mapping",
        lambda m: m(torch.zeros(6, 5, 6)),
        TypeError,
        "features must be a mapping from modalities to tensors, got Tensor",
    ),
    (
        "encode: a mask as a list",
        lambda m: m.encode("audio", torch.zeros(3, 5, 6), [True]),
        TypeError,
        "bool, got list",
    ),
    ("a mask missing", lambda m: m(features(), {"audio": ONES}), ValueError, "mask must hold the modalities"),
    (
        "encode: an unknown modality",
        lambda m: m.encode("smell", torch.zeros(3, 5, 6)),
        ValueError,
        "must be one of audio, video, text, got 'smell'",
    ),
    (
        "encode: NaN",
        lambda m: m.encode("audio", with_value(NAN)),
        ValueError,
        "'audio' must be finite, got NaN or Inf in clip 1",
    ),
    (
        "encode: Inf",
        lambda m: m.encode("audio", with_value(INF)),
        ValueError,
        "'audio' must be finite, got NaN or Inf in clip 1",
    ),
    (
        "encode: a wrong shape",
        lambda m: m.encode("audio", torch.zeros(3, 6)),
        ValueError,
        r"must have shape \(B, T, 6\), got \(3, 6\)",
    ),
    (
        "encode: a mask with a hole",
        lambda m: m.encode("audio", torch.zeros(3, 5, 6), HOLE),
        ValueError,
        "valid positions first",
    ),
    (
        "encode: a clip without a step",
        lambda m: m.encode("audio", torch.zeros(3, 5, 6), ~ONES[:3]),
        ValueError,
        "at least one position of each clip",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in MODEL], ids=[case[0] for case in MODEL])
def test_model(call: Callable, error: type[Exception], message: str) -> None:
    owner = tiny.model().eval()
    before = {key: value.clone() for key, value in owner.state_dict().items()}
    with pytest.raises(error, match=message):
        call(owner)
    assert all(torch.equal(before[key], value) for key, value in owner.state_dict().items())


def test_value_check_can_be_switched_off() -> None:
    """A row with NaN then has code 0; the other rows are as without it."""
    owner = tiny.model().eval()
    encoded = owner.encode("audio", with_value(NAN), check_values=False)
    assert torch.equal(encoded.index[1], torch.zeros(5, dtype=torch.int64))
    assert torch.equal(encoded.index[0], owner.encode("audio", torch.zeros(1, 5, 6)).index[0])


def test_a_name_that_cannot_be_a_module() -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores .*, got 'left.eye'"):
        UniCode({"left.eye": Modality("vector", (3,)), "right": Modality("vector", (3,))}, tiny.config())


def test_a_model_of_something_else() -> None:
    modalities = {"left": Modality("vector", (3,)), "right": Modality("vector", (3,))}
    with pytest.raises(TypeError, match="config must be a Config, such as preset gives, got NoneType"):
        UniCode(modalities, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="modalities must be a mapping from names to Modality, got list"):
        UniCode(list(modalities), tiny.config())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="letters, digits and underscores .*, got 1"):
        UniCode({1: modalities["left"], "right": modalities["right"]}, tiny.config())  # type: ignore[dict-item]


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"width must be a multiple of temporal_heads \(3\), got 16"):
        tiny.model(temporal_heads=3)


RUNS = [
    (["--modalities=audio"], ValueError, "two or more different modalities"),
    (["--modalities=audio,smell"], ValueError, "smell"),
    (["--device=tpu"], ValueError, "device must be auto, cpu or cuda, got 'tpu'"),
    (["--probe_tasks=singing"], ValueError, "probe_tasks must be among classification, .*, got 'singing'"),
    (
        ["--train_split=nope", "--batch_size=10"],
        ValueError,
        "train_split must be one of train, val, test of .*, got 'nope'",
    ),
    (["--batch_size=1000"], ValueError, "1000"),
    (["--width=0"], ValueError, "width"),
    (["--easy=true"], ValueError, "easy needs built-in data, got data"),
    (["--steps=3", "--epochs=2"], ValueError, "epochs is not read where steps is 3, not 0, got epochs 2"),
    (["--grid_semantic_width=9", "--grid_pooling=sum"], ValueError, "grid_semantic_width is not read where grid_poo"),
    (["--reset_noise=0.5"], ValueError, "reset_noise is not read where reset_source is 'feature', got reset_noise"),
    (["--ema_own_weight=0.5", "--ema_partner=none"], ValueError, "ema_own_weight is not read where ema_partner is"),
    (
        ["--squeeze_width=4", "--modalities=audio,text", "--batch_size=10"],
        ValueError,
        "no modality is of kind grid, got squeeze_width 4",
    ),
    (["--cpc_steps=40", "--batch_size=10"], ValueError, "cpc_steps 40 needs clips of at least 41 positions"),
    (["--data=nowhere"], OSError, "^data must be one of talking-digits, .*webdataset:FOLDER, got 'nowhere'$"),
    (["--seeds=0"], ValueError, "seeds must be at least 1"),
    (["--resume_step=3"], ValueError, "needs --resume"),
]


@pytest.mark.parametrize(("words", "error", "message"), RUNS, ids=[case[0][0] for case in RUNS])
def test_train(
    words: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = [] if words[0].startswith(("--data", "--resume")) else [f"--data={tiny.write(tmp_path / 'store')}"]
    with pytest.raises(error, match=message):
        train([*store, *words])
    assert not (tmp_path / "runs").exists()


def test_data_without_a_split_or_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny.write(tmp_path / "short", {"train": 60, "test": 24})
    with pytest.raises(ValueError, match="splits train, val, test, .*short has train, test"):
        train([f"--data={path}", "--batch_size=10"])
    assert not (tmp_path / "runs").exists()


def test_evaluate(tmp_path: Path) -> None:
    checkpoint.save(checkpoint.step_path(tmp_path, 1), tiny.model())
    for words, message in (
        (["--to=video"], "--from must name the modality .* trained on, one of audio, video, text, got none"),
        (["--from=audio", "--to=smell"], "--to must name the modality .* tested on, one of .*, text, got 'smell'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate([str(tmp_path), *words])


def test_a_message_has_no_number_of_an_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as caught:
        open(missing)
    assert message_of(caught.value) == f"No such file or directory, got {missing!r}"
    assert message_of(ValueError("as it is")) == "as it is"


def test_load_of_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="noise.pt is truncated or damaged"):
        load(tmp_path / "noise.pt")
