"""Run folders: one process works in each, nothing that was saved is lost, and data may be moved."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kill_campaign
import pytest
import tiny
import torch
import yaml

from unicode_fast import checkpoint, errors, preset, train
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.evaluate import main as evaluate
from unicode_fast.files.locks import InUse, alone
from unicode_fast.files.writing import remove
from unicode_fast.train import main
from unicode_fast.training import checks, runs
from unicode_fast.training.metrics_logger import MetricsLogger, read_metrics
from unicode_fast.training.run_log import RunLog

STEPS = 6


pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "store"
    return tiny.write(folder, {"train": 20, "val": 8, "test": 8}, "audio,depth", positions=3)


def flags(store: Path, out: Path, **fields: object) -> list[str]:
    values = {**kill_campaign.FLAGS, "steps": STEPS, "validations": 2, "probe_tasks": "none", "checkpoint_seconds": 0.0}
    values |= {"data": store, "out": out, **fields}
    return [f"--{name}={value}" for name, value in values.items() if name not in kill_campaign.UNREAD]


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; beside it copies of all checkpoints that it has had."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "copies").mkdir()
    real = checkpoint.save

    def save(path: Path, *others: Any) -> None:
        real(path, *others)
        shutil.copy(path, out.parent / "copies")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        assert main(flags(store, out)) == 0
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def before_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Has something happen when a step is about to begin."""
    real = train.open_loader

    def open_loader(*arguments: Any, **options: Any) -> Any:
        loader = real(*arguments, **options)
        batch = loader.batch

        def read(step: int) -> Any:
            if step + 1 == number:
                act()
            return batch(step)

        monkeypatch.setattr(loader, "batch", read)
        return loader

    monkeypatch.setattr(train, "open_loader", open_loader)


def dies() -> None:
    raise RuntimeError("killed")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "kind"), [(signal.SIGTERM, errors.Terminated), (signal.SIGINT, KeyboardInterrupt)]
    )
    def test_the_step_is_ended_and_saved(
        self,
        number: int,
        kind: type[BaseException],
        store: Path,
        finished: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            before_step(patch, 5, lambda: os.kill(os.getpid(), number))
            with pytest.raises(KeyboardInterrupt) as caught:
                main(flags(store, out, checkpoint_seconds=1000.0))
        assert caught.type is kind and checkpoint.steps_in(out)[-1] == 5
        assert capsys.readouterr().err.endswith(f"\nstep 5 is saved; to go on: --resume {out}\n")
        if number == signal.SIGTERM:
            assert main([f"--resume={out}"]) == 0
            assert kill_campaign.differences(finished, out) == []

    def test_readers_that_a_signal_to_all_ends_are_no_error(
        self, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lost() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise train.BatchLoaderError("a worker was killed")

        before_step(monkeypatch, 3, lost)
        with pytest.raises(errors.Terminated):
            main(flags(store, tmp_path / "run", checkpoint_seconds=1000.0, validations=0))
        assert checkpoint.steps_in(tmp_path / "run")[-1] == 2


class TestResumeStep:
    def test_then_a_kill_loses_nothing(
        self,
        run: Path,
        finished: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        first, last = checkpoint.steps_in(run)
        words = [f"--resume={run}", f"--resume_step={first}"]
        with monkeypatch.context() as patch:
            before_step(patch, first + 1, dies)
            with pytest.raises(RuntimeError, match="killed"):
                main(words)
        aside = run / "checkpoints" / "aside-1"
        assert f"files of the run after step {first} are moved to {aside}\n" in capsys.readouterr().err
        best = json.loads((finished / "summary.json").read_text())["checkpoint"]["step"]
        kept = {"metrics.jsonl", "summary.json", f"step-{last:08d}.pt", *(["best.pt"] if best > first else [])}
        assert {path.name for path in aside.iterdir()} == kept
        assert checkpoint.steps_in(run) == [first]
        logs = [(folder / "metrics.jsonl").read_bytes() for folder in (run, aside, finished)]
        assert logs[0] + logs[1] == logs[2]
        assert main([f"--resume={run}"]) == 0
        assert kill_campaign.differences(finished, run) == []

    def test_the_newest_are_kept_not_those_of_the_highest_steps(
        self, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copy(finished.parent / "copies" / "step-00000002.pt", run / "checkpoints")
        with monkeypatch.context() as patch:
            before_step(patch, 5, dies)
            with pytest.raises(RuntimeError, match="killed"):
                main([f"--resume={run}", "--resume_step=2"])
        assert checkpoint.steps_in(run) == [3, 4]
        assert main([f"--resume={run}"]) == 0
        assert kill_campaign.differences(finished, run) == []

    def test_of_what_is_not_there(self, run: Path) -> None:
        before = contents(run)
        with pytest.raises(CheckpointError, match="has no checkpoint of step 2; steps saved: 5, 6"):
            main([f"--resume={run}", "--resume_step=2"])
        del before[".lock"]
        assert {name: value for name, value in contents(run).items() if name != ".lock"} == before


class TestMetricsLogger:
    def test_it_is_never_made_longer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "kind": "train"}\n{"st')
        written = MetricsLogger(tmp_path, 1000, 0)
        written.write({"step": 2, "kind": "train"})
        assert written.flush() == path.stat().st_size
        written.close()
        assert path.read_text() == '{"step": 1, "kind": "train"}\n{"st\n{"step": 2, "kind": "train"}\n'
        assert f"note: {path} has lost lines, 33 of 1000 bytes are left" in capsys.readouterr().err

    def test_unreadable_lines_are_left_out_with_a_note(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [
            b'{"step": 1, "kind": "train"}',
            b"\0" * 50 + b'{"step": 2}',
            b"\xff",
            b"[1]",
            b'{"kind": "train"}',
            b"",
        ]
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
        assert read_metrics(tmp_path) == [{"step": 1, "kind": "train"}]
        path = tmp_path / "metrics.jsonl"
        assert capsys.readouterr().err == f"note: 4 unreadable lines of {path} are skipped, the first is line 2\n"

    def test_tensorboard_reads_its_events(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for step, numbers in ((None, (1, 2, 3)), (1, (2,))):
            written = MetricsLogger(tmp_path, 0, step)
            for number in numbers:
                written.write({"step": number, "kind": "train", "losses": {"cpc": number / 2}})
            written.flush()
            written.close()
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/losses/cpc")] == [(1, 0.5), (2, 1.0)]


def test_a_second_process_is_refused(run: Path) -> None:
    (run / "summary.json").unlink()
    before = contents(run)
    with alone(run / ".lock", "other"):
        with pytest.raises(InUse, match=f"run {run} is in use by this process"):
            main([f"--resume={run}", "--loader=prefetch"])
        assert {**contents(run), ".lock": before[".lock"]} == before


def test_runs_of_the_same_second_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = SimpleNamespace(strftime=lambda _: "20260101T000000Z")
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda _: now), timezone=SimpleNamespace(utc=None))
    monkeypatch.setattr(runs, "datetime", clock)
    made = [runs.prepare_folder(None, preset("recommended")) for _ in range(3)]
    assert [path.name.removeprefix("20260101T000000Z-recommended-0") for path in made] == ["", "-1", "-2"]
    assert all((path / "config.yaml").exists() for path in made)


class TestMovedData:
    def test_a_run_goes_on_where_they_are_now(
        self, store: Path, finished: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = Path(shutil.copytree(store, tmp_path / "moved"))
        other = tiny.write(tmp_path / "other", {"train": 20, "val": 8, "test": 8}, "audio,depth", positions=3, seed=1)
        remove(run / "summary.json")
        before = (run / "config.yaml").read_bytes()
        with pytest.raises(CheckpointError, match=f"^data must be what the checkpoint of step 6 .*{other}"):
            main([f"--resume={run}", f"--data={other}"])
        with pytest.raises(ValueError, match="text_model needs data of a layout with sentences"):
            main([f"--resume={run}", "--text_model=bert"])
        assert (run / "config.yaml").read_bytes() == before
        monkeypatch.chdir(tmp_path)
        assert main([f"--resume={run}", "--resume_step=5", "--data=moved"]) == 0
        assert yaml.safe_load((run / "config.yaml").read_text())["data"] == str(moved)
        changes = json.loads((run / "summary.json").read_text())["changes"]
        assert changes == [{"step": 5, "field": "data", "before": str(store), "after": str(moved)}]
        assert kill_campaign.differences(finished, run) == []

    def test_of_a_run_that_has_ended(self, store: Path, run: Path, tmp_path: Path) -> None:
        """Its checkpoints name the place before; the run folder has the new one."""
        gone = tmp_path / "gone"
        for path in (run / "checkpoints").iterdir():
            content = torch.load(path)
            content["config"]["fields"]["data"] = str(gone)
            torch.save(content, path)
        runs.write_config(run, checkpoint.config_from_dict(content["config"])[0])
        words = [str(run), "--from=audio", "--to=depth"]
        with pytest.raises(CheckpointError, match="data of the run are gone, --data sets their new place: .*gone'"):
            evaluate(words)
        before = contents(run)
        assert main([f"--resume={run}", f"--data={store}"]) == 0
        after = contents(run)
        assert {name for name in after if before.get(name) != after[name]} <= {"config.yaml", ".lock"}
        assert evaluate(words) == 0


def test_metrics_of_others_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "a": {}}\n' * 100)
    assert len(read_metrics(tmp_path)) == 100
    monkeypatch.setenv("UNICODE_FAST_MAX_TEXT", "5000")
    assert read_metrics(tmp_path) == []
    monkeypatch.setenv("UNICODE_FAST_MAX_TEXT", "3000")
    assert read_metrics(tmp_path) == []
    first, second = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl is skipped: it holds 400 values of at most 156; UNICODE_FAST_MAX_TEXT=12800" in first
    assert "metrics.jsonl is skipped: it holds 3800 bytes of at most 3000" in second


def test_a_log_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="metrics.jsonl must be a file of JSON lines: it is no plain file"):
        checkpoint.set_aside(tmp_path, 3, 0)
    (tmp_path / "metrics.jsonl").unlink()
    assert checkpoint.set_aside(tmp_path, 3, 0) is None


def test_sizes_that_do_not_fit_leave_no_folder(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width must be a multiple of temporal_heads"):
        main([f"--data={store}", f"--out={tmp_path / 'run'}", "--width=7", "--batch_size=4", "--probe_tasks=none"])
    assert not list(tmp_path.iterdir())


def test_an_ended_run_stays_as_it_is(
    run: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    row = {"task": "classification", "from": "audio", "to": "depth", "score": 0.5, "same_modality": 1.0, "chance": 0.3}
    (run / "summary.json").write_text(json.dumps({**summary, "rows": [row]}))
    monkeypatch.setattr(checks, "open_run_data", lambda _: pytest.fail("data must not be needed"))
    before = contents(run)
    assert main([f"--resume={run}", "--loader=prefetch"]) == 0
    printed = capsys.readouterr()
    assert f"run {run} has finished already\n" in printed.err and "loader did not change" in printed.err
    assert "classification  audio -> depth     50.0 %" in printed.out
    assert printed.out.splitlines()[-1] == f"next: python -m unicode_fast.report {run} --out {run}-report"
    assert contents(run) == before
    (run / "summary.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"summary.json is damaged"):
        main([f"--resume={run}"])


def test_an_ended_run_refuses_what_its_method_refuses(tmp_path: Path) -> None:
    runs.make_folder(tmp_path / "run", preset("recommended", method="codaar"))
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="micro_batches must be 1 with method 'codaar', got 2"):
        main([f"--resume={tmp_path / 'run'}", "--micro_batches=2"])


@pytest.mark.parametrize(("steps", "kept"), [(1, "auto"), (2, "prefetch")])
def test_a_changed_field_is_kept_once_a_step_has_succeeded(
    steps: int, kept: str, run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(finished.parent / "copies" / "step-00000002.pt", run / "checkpoints")
    before_step(monkeypatch, 2 + steps, dies)
    with pytest.raises(RuntimeError, match="killed"):
        main([f"--resume={run}", "--resume_step=2", "--loader=prefetch"])
    assert yaml.safe_load((run / "config.yaml").read_text())["loader"] == kept


def test_the_clock_of_the_bar_stops_before_the_bar(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else it may draw the bar after the error."""
    closed: list[bool] = []

    def tick(log: RunLog) -> None:
        log.closed.wait()
        time.sleep(0.05)
        closed.append(log.bar.disable)

    monkeypatch.setattr(RunLog, "_tick", tick)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before_step(monkeypatch, 6, dies)
    with pytest.raises(RuntimeError, match="killed"):
        main([f"--resume={run}", "--resume_step=5"])
    assert closed == [False]


def test_leftovers_of_killed_processes_are_removed(run: Path, finished: Path) -> None:
    (run / "summary.json").unlink()
    (run / "plots").mkdir(exist_ok=True)
    for name in (
        ".summary.json.unfinished-abc",
        "plots/.losses.png.unfinished-abc",
        "checkpoints/.best.pt.unfinished-abc",
        "checkpoints/.step-00000003.pt.abcd_123",
    ):
        (run / name).touch()
    last = checkpoint.find(run, "last").read_bytes()
    assert main([f"--resume={run}"]) == 0
    assert kill_campaign.differences(finished, run) == []
    assert checkpoint.find(run, "last").read_bytes() == last


def test_a_damaged_log_of_an_older_version_does_not_keep_a_run_from_its_end(
    store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zeros where it was made longer."""
    (run / "summary.json").unlink()
    path = run / "metrics.jsonl"
    path.write_bytes(b"\0" * len(path.read_bytes()))
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**content, "probe_tasks": "classification"}))
    last = checkpoint.find(run, "last")
    saved = torch.load(last)
    saved["config"]["fields"]["probe_tasks"] = "classification"
    torch.save(saved, last)
    assert main([f"--resume={run}"]) == 0
    assert (run / "plots" / "code-usage.png").exists()
    assert f"note: 1 unreadable lines of {path} are skipped" in capsys.readouterr().err


def test_the_start_is_five_lines(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(flags(store, out, steps=1, validations=0)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run {out}"
    assert lines[1].startswith("data Store(") and "train: 20" in lines[1] and "audio (vector 6), depth (v" in lines[1]
    assert lines[2].startswith("method Uni-Code, preset recommended, size small, but ") and "codewords 12" in lines[2]
    assert lines[3] == "training 1 steps of 10 clips on cpu, seed 0"
    assert lines[4] == f"configuration {out / 'config.yaml'}"
    assert lines[5] == f"next: python -m unicode_fast.evaluate {out} --task TASK --from MODALITY --to MODALITY"
    assert len(lines) == 6 and max(map(len, lines)) < 300


@pytest.mark.parametrize("number", [1, 2])
def test_a_small_campaign(number: int, campaign: kill_campaign.Campaign) -> None:
    """Kills at an event, and after a step back; the whole one is `python tests/kill_campaign.py`."""
    campaign.trial(number)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> kill_campaign.Campaign:
    return kill_campaign.Campaign(tmp_path_factory.mktemp("campaign"), steps=4, validations=1, probe_tasks="none")
