"""The training loop: it learns, repeats bit for bit, resumes exactly after a kill, stops on a non-finite loss."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
import yaml
from compare import assert_close, same
from tolerances import EXACT, SHARED_BATCH

from unicode_fast import Modality, backend, checkpoint, load, preset
from unicode_fast.data.opening import absolute
from unicode_fast.evaluate import main as evaluate
from unicode_fast.report import plots
from unicode_fast.tasks import Evaluator, Row
from unicode_fast.tasks.probe import ProbeRule
from unicode_fast.train import main, total_steps
from unicode_fast.training import acceleration, runs
from unicode_fast.training.metrics_logger import MetricsLogger, NonFiniteLoss
from unicode_fast.training.trainer import Trainer, learning_rate

pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")

FLAGS = {
    **tiny.SIZES,
    "steps": 24,
    "batch_size": 10,
    "validations": 2,
    "checkpoint_seconds": 0.0,
    "learning_rate": 3e-3,
}


SHOWN = (("audio", "vector", (64,)), ("video", "grid", (7, 7, 8)), ("text", "words", (32,)))


def flags(store: Path, out: Path, **fields: object) -> list[str]:
    values = {**FLAGS, "data": store, "out": out, **fields}
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory, no_pictures: Callable) -> Path:
    """A run with its pictures."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.FigureCanvasAgg, "print_figure", no_pictures)
        assert main(flags(store, out)) == 0
    return out


def final_model(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(checkpoint.find(run, "last"))["model"]


class TestRunFolder:
    def test_summary(self, finished: Path) -> None:
        summary = json.loads((finished / "summary.json").read_text())
        assert {"rows", "seconds", "seed", "versions", "git_commit", "checkpoint"} <= summary.keys()
        assert summary["checkpoint"]["used"] == "best"
        directions = {(row["task"], row["from"], row["to"]) for row in summary["rows"]}
        assert len([key for key in directions if key[0] == "classification"]) == 6
        assert {key[1:] for key in directions if key[0] == "localisation"} == {("audio", "video"), ("video", "audio")}
        for row in summary["rows"]:
            assert {"task", "from", "to", "score", "same_modality", "chance"} <= row.keys()
            assert 0 <= row["score"] <= 1

    def test_files(self, finished: Path) -> None:
        names = {path.name for path in finished.iterdir()}
        assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "plots"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        pictures = list((finished / "plots").glob("*.png"))
        assert len(pictures) >= 4
        assert all(path.stat().st_size > 1000 for path in pictures)
        assert yaml.safe_load((finished / "config.yaml").read_text())["batch_size"] == 10

    def test_metrics(self, finished: Path) -> None:
        lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
        train = [line for line in lines if line["kind"] == "train"]
        validation = [line for line in lines if line["kind"] == "validation"]
        assert [line["step"] for line in train] == [20, 24]
        assert [line["step"] for line in validation] == [12, 24]
        assert train[0]["learning_rate"] == FLAGS["learning_rate"]
        assert set(train[0]["codes_in_use"]) == {"audio", "video", "text"}
        best = json.loads((finished / "summary.json").read_text())["checkpoint"]
        assert best["accuracy"] == max(line["mean"] for line in validation)

    def test_load_needs_no_data(self, finished: Path) -> None:
        for which in ("best", "last", 24):
            owner = load(finished, which)
            assert not owner.training
            encoded = owner.encode("text", torch.randn(2, 5, 8))
            assert encoded.index.shape == (2, 5)

    def test_data_are_found_from_any_folder(self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(store.parent)
        assert main(flags(Path(store.name), tmp_path / "run", steps=1, validations=0, probe_tasks="none")) == 0
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == str(store)
        whole = absolute(f"clips:{store.name}"), absolute(f"webdataset:{store.name}")
        assert whole == (f"clips:{store}", f"webdataset:{store}")
        assert [absolute(spec) for spec in ("talking-digits", "no/where")] == ["talking-digits", "no/where"]

    def test_never_overwritten(self, store: Path, finished: Path) -> None:
        before = (finished / "summary.json").read_bytes()
        with pytest.raises(ValueError, match="out must be a folder that does not exist yet"):
            main(flags(store, finished))
        assert (finished / "summary.json").read_bytes() == before

    def test_it_appears_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever interrupts the making of a run folder, a folder without its configuration is never left."""

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(runs, "write_json", stop)
        with pytest.raises(KeyboardInterrupt):
            runs.prepare_folder(str(tmp_path / "run"), preset("recommended"), [0, 1])
        assert list(tmp_path.iterdir()) == []


class TestLearning:
    def test_it_learns(
        self, store: Path, tmp_path: Path, short_probes: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three classes, chance 1/3: well above it in every direction."""
        monkeypatch.setattr(ProbeRule, "passes", short_probes)
        assert main(flags(store, tmp_path / "run", steps=150, probe_tasks="classification")) == 0
        rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
        assert min(row["score"] for row in rows) > 0.6, rows

    def test_one_batch_is_overfitted(self) -> None:
        trainer = tiny.trainer(names="audio,video", learning_rate=3e-3)
        features = tiny.batch(trainer.model)
        losses = [sum(trainer.train_step(features, None, 3e-3).terms.values()).item() for _ in range(150)]
        assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.slow
@pytest.mark.skipif(backend.EXTENSION.module is None, reason="the C++ extension is not there")
@pytest.mark.parametrize("with_contrast", [False, True])
def test_backends_agree_over_the_first_steps(monkeypatch: pytest.MonkeyPatch, with_contrast: bool) -> None:
    """Twenty steps of the default model: equal codes, losses equal to rounding.

    Backends of Cross-CPC add in another order, and Adam scales rounding up. So a few codes may differ with them.
    """
    modalities = {name: Modality(kind, shape) for name, kind, shape in SHOWN}
    config = preset("recommended").replace(dropout=0.0, reset_after=5, dtype="float64")
    every = backend.IMPLEMENTATIONS
    references: dict[str, tuple[backend.Backend, ...]] = dict.fromkeys(every, ("reference",))
    if not with_contrast:
        references["cross_info_nce"] = every["cross_info_nce"]
    runs = []
    for implementations in (every, references):
        monkeypatch.setattr(backend, "IMPLEMENTATIONS", implementations)
        trainer = Trainer(config, modalities, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        results = []
        for _ in range(20):
            features = {
                name: torch.randn(20, 10, *kind.shape, generator=generator).double()
                for name, kind in modalities.items()
            }
            with torch.no_grad():
                codes = trainer.model.eval()(features).index
            result = trainer.train_step(features, None, 1e-3)
            results.append((codes, {name: term.item() for name, term in result.terms.items()}))
        runs.append(results)
    for (codes, terms), (other_codes, other_terms) in zip(*runs, strict=True):
        number = sum(index.numel() for index in codes.values())
        different = sum(int((codes[name] != other_codes[name]).sum()) for name in codes)
        assert different <= (number // 100 if with_contrast else 0)
        assert terms == pytest.approx(other_terms, rel=1e-3 if with_contrast else 1e-4, abs=1e-6)


class TestDeterminism:
    def test_another_seed_gives_another_model(self, store: Path, finished: Path, tmp_path: Path) -> None:
        main(flags(store, tmp_path / "other", probe_tasks="classification", seed=1))
        assert not same(final_model(finished), final_model(tmp_path / "other"))

    # test_runs.py has a campaign of such kills in one process.
    @pytest.mark.slow
    def test_resume_after_kill_gives_the_same_bits(self, store: Path, finished: Path, tmp_path: Path) -> None:
        out = tmp_path / "killed"
        command = [sys.executable, "-m", "unicode_fast.train"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        for number in (0, 1):
            what = flags(store, out) if number == 0 else [f"--resume={out}"]
            errors = tmp_path / f"errors-{number}.txt"
            with errors.open("w") as stream:
                child = subprocess.Popen([*command, *what], env=environment, stdout=subprocess.DEVNULL, stderr=stream)
            expected, deadline = 4 + 8 * number, time.monotonic() + 120
            while time.monotonic() < deadline and child.poll() is None:
                if (steps := checkpoint.steps_in(out)) and steps[-1] >= expected:
                    break
                time.sleep(0.005)
            assert child.poll() is None, errors.read_text()
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert not (out / "summary.json").exists(), "the run ended before it was killed"
        assert main([f"--resume={out}"]) == 0
        assert same(final_model(finished), final_model(out))
        assert (out / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
        ours, theirs = (json.loads((run / "summary.json").read_text())["rows"] for run in (out, finished))
        assert ours == theirs

    @pytest.mark.parametrize("loader", ["prefetch", "resident"])
    def test_every_loader_gives_the_same_bits(self, store: Path, finished: Path, tmp_path: Path, loader: str) -> None:
        main(flags(store, tmp_path / "again", probe_tasks="classification", loader=loader))
        assert same(final_model(finished), final_model(tmp_path / "again"))

    @pytest.mark.slow
    def test_a_run_in_bfloat16_goes_on_with_the_same_bits(self, store: Path, tmp_path: Path) -> None:
        options = {"precision": "bfloat16", "channels_last": "true", "probe_tasks": "classification", "steps": 12}
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        main(flags(store, whole, **options))
        main(flags(store, parted, **options))
        assert main([f"--resume={parted}", f"--resume-step={checkpoint.steps_in(parted)[0]}"]) == 0
        assert same(final_model(whole), final_model(parted))

    def test_a_truncated_checkpoint_is_refused_and_the_one_before_goes_on(
        self, store: Path, finished: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "damaged"
        shutil.copytree(finished, run)
        (run / "summary.json").unlink()
        steps = checkpoint.steps_in(run)
        path = checkpoint.step_path(run, steps[-1])
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(checkpoint.CheckpointError, match=rf"{path.name} is truncated.*--resume-step {steps[-2]}"):
            main([f"--resume={run}"])
        assert main([f"--resume={run}", f"--resume-step={steps[-2]}"]) == 0
        assert same(final_model(finished), final_model(run))

    def test_rows_before_one_that_fails_are_shown(
        self, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        run, real = Path(shutil.copytree(finished, tmp_path / "failed")), Evaluator.row

        def row(evaluator: Evaluator, task: str, *others: str, **options: bool) -> Row:
            if task == "localisation":
                raise RuntimeError("no localisation")
            return real(evaluator, task, *others, **options)

        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "row", row)
            with pytest.raises(RuntimeError, match="no localisation"):
                main([f"--resume={run}"])
        shown = capsys.readouterr().out
        assert "measured before the error:\ntask" in shown and shown.count("\nclassification  ") == 6
        assert main([f"--resume={run}"]) == 0
        assert json.loads((run / "summary.json").read_text())["rows"] == summary["rows"]

    def test_what_has_ended_is_not_begun_anew(self, finished: Path, tmp_path: Path) -> None:
        run = tmp_path / "ended"
        shutil.copytree(finished, run)
        shutil.rmtree(run / checkpoint.FOLDER)
        assert main([f"--resume={run}"]) == 0
        with pytest.raises(checkpoint.CheckpointError, match="run .*ended has no checkpoint of step 24"):
            main([f"--resume={run}", "--resume_step=24"])
        assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()

    def test_resume_takes_no_other_configuration(self, finished: Path, tmp_path: Path) -> None:
        kept = "width 16, precision 'float32', got width 8, precision 'bfloat16'; only these may change: micro_batches"
        with pytest.raises(ValueError, match=f"resume keeps the configuration of the run, {kept}"):
            main([f"--resume={finished}", "--width=8", "--micro_batches=2", "--precision=bfloat16"])
        with pytest.raises(ValueError, match="configuration of the run, method 'uni-code', got method 'cmcm'; only"):
            main([f"--resume={finished}", "--method=cmcm"])
        with pytest.raises(ValueError, match="configuration of the run, got seeds 2; only these"):
            main([f"--resume={finished}", "--seeds=2"])
        for more in ([], ["--steps=5"]):
            with pytest.raises(checkpoint.CheckpointError, match="resume must be a run folder"):
                main([f"--resume={tmp_path}", *more])


def test_a_compilation_is_announced(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(acceleration, "_compile", lambda *arguments: None)
    for value in ("true", "false"):
        out = tmp_path / value
        main(flags(store, out, steps=2, validations=0, probe_tasks="none", compile=value))
        assert ("the first step compiles encoders and decoders" in capsys.readouterr().err) is (value == "true")


class TestChangedExecution:
    """A run continues with other fields that do not change its model, and reports them."""

    OPTIONS: ClassVar = {"dtype": "float64", "dropout": 0.0, "probe_tasks": "none", "steps": 12, "micro_batches": 5}

    def test_the_same_model(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        main(flags(store, whole, **{**self.OPTIONS, "micro_batches": 1}))
        main(flags(store, parted, **self.OPTIONS))
        step = checkpoint.steps_in(parted)[0]
        with pytest.raises(ValueError, match="micro_batches must be at most the 10 clips of a rank, got 11"):
            main([f"--resume={parted}", f"--resume-step={step}", "--micro_batches=11"])
        capsys.readouterr()
        changed = ["--micro-batches=3", "--activation-checkpointing=true", "--loader=prefetch", "--feed_workers=1"]
        assert main([f"--resume={parted}", f"--resume-step={step}", *changed]) == 0
        printed = capsys.readouterr()
        assert f"from step {step} on micro_batches is 3, no longer 5\n" in printed.err
        found, expected = final_model(parted), final_model(whole)
        for name, value in expected.items():
            assert_close(found[name], value, SHARED_BATCH if value.is_floating_point() else EXACT, name)
        assert yaml.safe_load((parted / "config.yaml").read_text())["micro_batches"] == 3
        changes = json.loads((parted / "summary.json").read_text())["changes"]
        assert {"step": step, "field": "micro_batches", "before": 5, "after": 3} in changes and len(changes) == 4
        assert json.loads((whole / "summary.json").read_text())["changes"] == []
        # What has changed stays changed, and is not noted twice.
        assert main([f"--resume={parted}"]) == 0
        assert json.loads((parted / "summary.json").read_text())["changes"] == changes

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_compiled_from_a_step_on(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        main(flags(store, out, **{**self.OPTIONS, "micro_batches": 1}))
        expected, step = final_model(out), checkpoint.steps_in(out)[0]
        assert main([f"--resume={out}", f"--resume-step={step}", "--compile=true"]) == 0
        found = final_model(out)
        for name, value in expected.items():
            assert_close(found[name], value, SHARED_BATCH if value.is_floating_point() else EXACT, name)
        changes = json.loads((out / "summary.json").read_text())["changes"]
        assert changes == [{"step": step, "field": "compile", "before": False, "after": True}]

    def test_seeds(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "seeds"
        main(flags(store, out, steps=4, validations=1, seeds=2, probe_tasks="none"))
        (out / "seed-1" / "summary.json").unlink()
        assert main([f"--resume={out}", "--loader=resident"]) == 0
        loaders = [yaml.safe_load((below / "config.yaml").read_text())["loader"] for below in (out, out / "seed-0")]
        assert loaders == ["resident", "auto"]
        assert yaml.safe_load((out / "seed-1" / "config.yaml").read_text())["loader"] == "resident"
        changes = [json.loads((out / f"seed-{n}" / "summary.json").read_text())["changes"] for n in (0, 1)]
        assert changes == [[], [{"step": 4, "field": "loader", "before": "auto", "after": "resident"}]]
        # A seed that is resumed alone leaves the fields of the others.
        (out / "seed-0" / "summary.json").unlink()
        assert main([f"--resume={out / 'seed-0'}", "--checkpoint_seconds=9"]) == 0
        kept = [yaml.safe_load((below / "config.yaml").read_text()) for below in (out, out / "seed-0")]
        assert [fields["checkpoint_seconds"] for fields in kept] == [0.0, 9.0]

    def test_another_model_is_refused(self, store: Path, finished: Path, tmp_path: Path) -> None:
        """A configuration that was edited by hand."""
        content = checkpoint.read(checkpoint.find(finished, "last"))
        config, modalities = checkpoint.config_from_dict(content["config"])
        assert checkpoint.changed_fields(content, config.replace(loader="direct"), modalities) == {"loader": "auto"}
        with pytest.raises(checkpoint.CheckpointError, match=r"got width \d+ instead of \d+$"):
            checkpoint.changed_fields(content, config.replace(width=8, loader="direct"), modalities)
        with pytest.raises(checkpoint.CheckpointError, match="got other modalities or shapes$"):
            checkpoint.changed_fields(content, config, {**modalities, "audio": Modality("vector", (7,))})

    def test_the_optimiser_keeps_the_options_of_its_device(self) -> None:
        """A checkpoint that was written on a GPU, by a step in a graph."""
        trainers = [tiny.trainer(names="audio,video", dropout=0.0) for _ in range(2)]
        features = tiny.batch(trainers[0].model)
        trainers[0].train_step(features, None, 1e-3)
        content = copy.deepcopy({"model": trainers[0].model.state_dict(), **trainers[0].state()})
        for name in ("optimizer", "club_optimizer"):
            content[name]["param_groups"][0].update(capturable=True, lr=torch.tensor(1.0))
        trainers[1].restore({**content, "cuda_rng": torch.zeros(16, dtype=torch.uint8)})
        for name in ("optimizer", "club_optimizer"):
            ours, theirs = (getattr(trainer, name).param_groups[0] for trainer in reversed(trainers))
            assert (ours["capturable"], type(ours["lr"])) == (False, float)
            assert name == "optimizer" or ours["lr"] == theirs["lr"]
        for trainer in trainers:
            trainer.train_step(features, None, 1e-3)
        assert same(*(trainer.model.state_dict() for trainer in trainers))


class TestSeeds:
    def test_mean_and_spread(self, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        out = tmp_path / "seeds"
        fields = {"steps": 6, "validations": 1, "probe_tasks": "classification", "codewords": 2}
        main([*flags(store, out, seeds=2, **fields), "--format=pdf"])
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        assert lines[0] == f"run {out}" and lines[3].endswith("on cpu, seeds 0, 1")
        assert lines[-1] == f"next: python -m unicode_fast.report {out} --out {out}-report"
        assert "zero-shot: mean ± sample standard deviation over 2 seeds" in shown.out
        summary = json.loads((out / "summary.json").read_text())
        single = [json.loads((out / f"seed-{n}" / "summary.json").read_text())["rows"] for n in (0, 1)]
        for row, one, two in zip(summary["rows"], *single, strict=True):
            assert row["score"] == pytest.approx((one["score"] + two["score"]) / 2)
            assert row["std"] == pytest.approx(np.std([one["score"], two["score"]], ddof=1))
            assert row["seeds"] == 2 and one["interval"][0] <= one["interval"][1] and one["clips"] == 24
        # Two codewords, unevenly used, say less than one bit: in the log, below the table, in every summary.
        collapsed = "the codebook has collapsed for "
        for seed in (0, 1):
            below = out / f"seed-{seed}"
            found = json.loads((below / "summary.json").read_text())["warnings"]
            assert found[0].startswith(collapsed)
            assert all(f"seed {seed}: {text}" in summary["warnings"] for text in found)
            lines = [json.loads(line) for line in (below / "metrics.jsonl").read_text().splitlines()]
            assert any(line["warnings"][0].startswith(collapsed) for line in lines if line["kind"] == "train")
            assert {file.suffix for file in (below / "plots").iterdir()} == {".pdf", ".csv"}
        assert all(f"\nwarning: {text}\n" in shown.out for text in summary["warnings"])
        assert shown.err.count(f"warning: step 6: {collapsed}") >= 2


class TestNonFinite:
    def test_stops_with_term_step_and_batch_after_saving(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import unicode_fast.methods.uni_code as uni_code

        real, calls = uni_code.losses.reconstruction, []

        def broken(*arguments: object) -> torch.Tensor:
            calls.append(1)
            return real(*arguments) * (float("nan") if len(calls) == 3 * 8 else 1)

        monkeypatch.setattr(uni_code.losses, "reconstruction", broken)
        with pytest.raises(
            NonFiniteLoss, match=r"reconstruction.text became nan at step 8, in the batch of clips .*saved as"
        ):
            main(flags(store, tmp_path / "run"))
        saved = list((tmp_path / "run" / "checkpoints").glob("nonfinite-*.pt"))
        assert len(saved) == 1
        assert checkpoint.read(saved[0])["step"] >= 8
        assert min(checkpoint.steps_in(tmp_path / "run")) < 8


def test_data_that_have_changed_are_not_taken_for_those_of_the_run(tmp_path: Path) -> None:
    store, run = tiny.write(tmp_path / "store"), tmp_path / "run"
    assert main(flags(store, run, steps=2, validations=1, probe_tasks="none")) == 0
    words = [str(run), "--from=audio", "--to=video"]
    for checkpoint_name in ("best", "last"):
        assert evaluate([*words, f"--checkpoint={checkpoint_name}"]) == 0
    shutil.rmtree(store)
    tiny.write(store, seed=1)
    for checkpoint_name in ("best", "last"):
        with pytest.raises(ValueError, match="data of the run must be those of its training, .* has changed since"):
            evaluate([*words, f"--checkpoint={checkpoint_name}"])
    assert evaluate([*words, f"--data={store}"]) == 0


class TestSchedule:
    def test_learning_rate(self) -> None:
        config = preset("recommended").replace(learning_rate=1.0, warmup_steps=10, schedule="cosine")
        assert learning_rate(config, 0, 110, 50) == pytest.approx(0.1)
        assert learning_rate(config, 10, 110, 50) == pytest.approx(1.0)
        assert learning_rate(config, 110, 110, 50) == pytest.approx(0.01)
        stairs = preset("official").replace(learning_rate=1.0)
        rates = [learning_rate(stairs, epoch * 50, 9999, 50) for epoch in (0, 9, 10, 20, 30)]
        assert rates == [1, 1, 0.5, 0.25, 0.125]

    def test_epochs(self, store: Path) -> None:
        from unicode_fast.data import Batches, open_store

        batches = Batches(open_store(store).split("train"), 25)
        assert total_steps(preset("paper", "paper"), batches) == 12


def test_without_checkpoints_a_run_restarts(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / checkpoint.FOLDER)
    (run / checkpoint.SUMMARY).unlink()
    assert main([f"--resume={run}"]) == 0
    assert f"note: run {run} has no checkpoint, so it starts again from step 0" in capsys.readouterr().err
    assert same(final_model(run), final_model(finished))


def test_the_logger_keeps_only_the_given_bytes(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\n")
    logger = MetricsLogger(tmp_path, 4, 0)
    logger.write({"step": 1, "kind": "train", "loss": 1.0})
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == 'one\n{"step": 1, "kind": "train", "loss": 1.0}\n'
