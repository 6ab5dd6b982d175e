"""Checkpoints: atomic, safe to read, refused by name when damaged."""

import errno
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from unicode_fast import CheckpointError, UniCode, checkpoint, export, load, to_cmg
from unicode_fast.compat.cmg import ARCHITECTURE
from unicode_fast.data import ClipSet
from unicode_fast.evaluate import main as evaluate
from unicode_fast.methods import UniCodeMethod
from unicode_fast.modules.wrapped import unwrapped
from unicode_fast.tasks import encode_split
from unicode_fast.training.acceleration import accelerate


def run_with(path: Path, steps: tuple[int, ...] = (10, 20)) -> Path:
    owner = tiny.model()
    parts = {"progress": {"data": ""}, "rng": torch.get_rng_state(), "optimizer": {"state": {}}}
    for step in steps:
        extra = {"step": step, **parts, "club_optimizer": {"state": {}}}
        checkpoint.save(checkpoint.step_path(path, step), owner, extra)
    return path


def test_a_home_folder_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"run folder {tmp_path}/run does not exist"):
        load("~/run")


def test_round_trip(tmp_path: Path) -> None:
    owner = tiny.model("paper", names="video,text")
    checkpoint.save(tmp_path / "model.pt", owner)
    back = load(tmp_path / "model.pt")
    assert back.config == owner.config
    assert back.modalities == owner.modalities
    assert not back.training
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in owner.state_dict().items())


def test_export(tmp_path: Path) -> None:
    owner, path = tiny.model("official", names="audio,text"), tmp_path / "model.safetensors"
    export(owner, path)
    back = load(path)
    assert (back.config, back.modalities, back.training) == (owner.config, owner.modalities, False)
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in owner.state_dict().items())
    for bad in (path, tmp_path / "model.pt"):
        with pytest.raises(ValueError, match="must be a new file that ends with .safetensors"):
            export(owner, bad)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        load(path)


def data_parallel(owner: UniCode) -> nn.Module:
    return nn.DataParallel(owner)


def compiled_twice(owner: UniCode) -> nn.Module:
    return nn.DataParallel(torch.compile(owner, backend="eager"))  # type: ignore[arg-type]


def compiled_parts(owner: UniCode) -> nn.Module:
    owner.encoders["audio"] = torch.compile(owner.encoders["audio"], backend="eager")  # type: ignore[assignment]
    owner.decoders.compile(backend="eager")
    return owner


def accelerated(owner: UniCode) -> nn.Module:
    accelerate(nn.DataParallel(owner), owner.config.train)  # type: ignore[arg-type]
    return owner


def averaged(owner: UniCode) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(owner)


@pytest.mark.parametrize("wrap", [data_parallel, compiled_twice, compiled_parts, accelerated, averaged])
def test_a_wrapped_model_is_written_as_itself(tmp_path: Path, wrap: Callable[[UniCode], UniCode]) -> None:
    owner = tiny.model("official", names="audio,text", **ARCHITECTURE, compile=wrap is accelerated)
    expected, written = owner.state_dict(), to_cmg(owner)
    features = tiny.batch(owner)["audio"]
    codes = owner.encode("audio", features)
    holder = wrap(owner)
    export(holder, tmp_path / "model.safetensors")
    checkpoint.save(tmp_path / "model.pt", holder)
    for name in ("model.safetensors", "model.pt"):
        back = load(tmp_path / name)
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in expected.items())
        assert torch.equal(back.encode("audio", features).index, codes.index)
    for key, entries in to_cmg(holder).items():
        for entry, value in entries.items() if isinstance(entries, dict) else ():
            assert torch.equal(value, written[key][entry]), (key, entry)
    assert UniCodeMethod(holder).model is unwrapped(holder)
    clips = ClipSet({"audio": features.numpy()}, {"audio": owner.modalities["audio"]}, [], np.arange(6))
    assert torch.equal(encode_split(holder, clips, "audio").index, codes.index)


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    def exchange(owner: UniCode) -> None:
        owner.decoders["text"] = nn.DataParallel(owner.decoders["text"])

    def grow(owner: UniCode) -> None:
        owner.encoders["audio"].specific[0] = nn.Linear(6, 9, dtype=torch.float64)  # type: ignore[index]

    def add(owner: UniCode) -> None:
        owner.register_buffer("mine", torch.zeros(3))

    for change, message in (
        (exchange, r"decoders.text.[a-z.]*weight must be a tensor of shape \(.*, got none$"),
        (grow, r"encoders.audio.specific.0.weight must be a tensor of shape \(8, 6\), got Tensor \(9, 6\)"),
        (add, r"mine must be absent, got Tensor \(3,\)"),
    ):
        owner = tiny.model("official", names="audio,text")
        change(owner)
        for write in (
            lambda model: export(model, tmp_path / "model.safetensors"),
            lambda model: checkpoint.save(tmp_path / "model.pt", model),
            to_cmg,
        ):
            with pytest.raises(ValueError, match=f"model must have its original .*: {message}"):
                write(owner)
            with pytest.raises(TypeError, match="model must be a UniCode, got Linear"):
                write(nn.Linear(2, 2))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("codebook.codebook", float("nan")),
        ("cpc.predictors.audio.0.bias", float("inf")),
        ("norms.video.variance", float("-inf")),
    ],
)
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, entry: str, value: float) -> None:
    owner = tiny.model()
    owner.state_dict()[entry].view(-1)[-1] = value
    inspected = tmp_path / "run" / checkpoint.FOLDER / "nonfinite-step-00000007.pt"
    checkpoint.save(inspected, owner)
    checkpoint.save(checkpoint.step_path(tmp_path / "run", 3), owner)
    export(owner, tmp_path / "model.safetensors")
    message = f"must hold finite numbers, got NaN or Inf in {entry}"
    with pytest.raises(CheckpointError, match=f"model.safetensors {message}$"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"step-00000003.pt {message}$"):
        load(tmp_path / "run", "last")
    with pytest.raises(CheckpointError, match=rf"nonfinite-step-00000007.pt {message}; a run saved it for inspection"):
        load(inspected)


def test_arguments_are_named(tmp_path: Path) -> None:
    for call, error, message in (
        (lambda: load(None), TypeError, "run must be a path, got NoneType"),
        (lambda: load(tmp_path, device="xpuz"), ValueError, "device must be cpu or cuda, got 'xpuz'"),
        (lambda: export(tiny.model(), None), TypeError, "path must be a path, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_find(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    assert checkpoint.find(run, "last") == checkpoint.step_path(run, 20)
    assert checkpoint.find(run, 10) == checkpoint.step_path(run, 10)
    for which, message in (
        (15, "no checkpoint of step 15; steps saved: 10, 20"),
        ("best", "no best checkpoint, .*take last"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.find(run, which)
    with pytest.warns(UserWarning, match="has no best checkpoint; loading its last, step-00000020.pt"):
        load(run)
    checkpoint.save(run / checkpoint.FOLDER / checkpoint.BEST, tiny.model(), {"step": 10})
    assert checkpoint.find(run, None) == checkpoint.find(run, "best")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(run)
    with pytest.raises(CheckpointError, match="must be 'best', 'last' or a step, got 'worst'"):
        checkpoint.find(run, "worst")
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_is_refused_by_name_and_the_one_before_offered(tmp_path: Path, keep: float) -> None:
    run = run_with(tmp_path)
    path = checkpoint.step_path(run, 20)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(CheckpointError, match=r"step-00000020.pt is truncated or damaged.*--resume-step 10"):
        checkpoint.read_for_resume(run, None)
    assert checkpoint.read_for_resume(run, 10)["step"] == 10


def test_instead_of_a_damaged_checkpoint_the_whole_ones_are_offered(tmp_path: Path) -> None:
    run = run_with(tmp_path, (10, 20, 30))
    for step in (10, 30):
        checkpoint.step_path(run, step).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"30.pt is trunc.*; undamaged are 20: .*--checkpoint 20, .*=20$"):
        load(run)
    checkpoint.save(run / checkpoint.FOLDER / checkpoint.BEST, tiny.model(), {"step": 20})
    with pytest.raises(CheckpointError, match="undamaged are best, 20: take one with --checkpoint best, .*='best'$"):
        evaluate([str(run), "--checkpoint=last", "--from=audio", "--to=video"])
    for path in (run / checkpoint.FOLDER).iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="best.pt is truncated .*; the run has no undamaged checkpoint"):
        load(run)


def test_an_entry_that_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    path = checkpoint.step_path(run, 20)
    content = checkpoint.read(path)

    def resume(**changes: object) -> None:
        torch.save({name: value for name, value in {**content, **changes}.items() if value is not None}, path)
        checkpoint.read_for_resume(run, None)

    resume()
    for changes in ({"rng": None}, {"progress": None}, {"model": None}):
        with pytest.raises(CheckpointError, match=f"20.pt is damaged: it lacks {next(iter(changes))}; resume"):
            resume(**changes)
    with pytest.raises(CheckpointError, match="step-00000020.pt is damaged: its step is 3"):
        resume(step=3)
    for model in ({**content["model"], "codebook.codebook": torch.zeros(3)}, {}):
        torch.save({**content, "model": model}, path)
        with pytest.raises(
            CheckpointError, match=r"step-00000020.pt does not fit its configuration: .*(codebook|got 0)"
        ):
            load(run, "last")


def test_damaged_inside_is_refused(tmp_path: Path) -> None:
    """A flipped byte among the numbers of a tensor."""
    run = run_with(tmp_path, (10,))
    path = checkpoint.step_path(run, 10)
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint.read(path)["model"]["codebook.codebook"].numpy().tobytes())] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        checkpoint.read(path)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {tmp_path}/exploded",))

    with (tmp_path / "bomb.pt").open("wb") as file:
        pickle.dump(Bomb(), file)
    torch.save(Bomb(), tmp_path / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(CheckpointError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="must be of format 1"):
        load(tmp_path / "other.pt")


def test_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    checkpoint.save(path, tiny.model(seed=1))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*model.pt"):
        checkpoint.save(path, tiny.model(seed=2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        checkpoint.save(tmp_path / "file" / "model.pt", tiny.model())
