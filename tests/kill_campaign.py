"""Runs that are killed, ended, refused or without disk space, and then resumed: `python tests/kill_campaign.py`.

Each trial interrupts a run on a tiny dataset in one of MODES and resumes it until its end. Then it compares the run bit
for bit with a run without interruption. The number of a trial determines its actions. The last line is "100 of 100
equal", or names the trials that differ; `--trials 1 --first N` repeats one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401 - these are imported once, not by each run
import tiny
import torch
import torch._dynamo

from unicode_fast import checkpoint, errors, train
from unicode_fast.checkpoint import METRICS
from unicode_fast.report import plots
from unicode_fast.tasks.probe import ProbeRule

STEPS = 12
FLAGS = {
    **tiny.SIZES,
    "modalities": "audio,depth",
    "steps": STEPS,
    "batch_size": 10,
    "validations": 3,
    "learning_rate": 3e-3,
    "probe_tasks": "classification",
    "device": "cpu",
}
UNREAD = (
    "word_width", "grid_hidden_width", "grid_specific_width", "grid_club_width", "grid_semantic_width", "squeeze_width",
)  # fmt: skip
# Calls that change files.
EVENTS = ("replace", "rename", "unlink", "fsync", "mkdir", "rmdir")
MODES = ("kill", "event", "step", "two", "term", "int", "full")
MOST_RESUMES = 20
Prepare = Callable[[], None]


class Differs(AssertionError):
    """The difference that a trial has found."""


def start(words: list[str], log: Path, prepare: Prepare | None = None) -> int:
    """A process that trains, forked from this one, which has imported all that takes long."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["train", *words]
        lighten()
        if prepare is not None:
            prepare()
        errors.run_main(train.main)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 71
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def lighten() -> None:
    """Probes of few steps and pictures of few bytes, as it is files that trials are about."""
    ProbeRule.passes = lambda *_: 1  # type: ignore[method-assign]
    plots.FigureCanvasAgg.print_figure = lambda _, file, **options: file.write(b"picture")  # type: ignore[assignment]


def wait(process: int) -> int:
    """The exit status of a process, as a shell gives it."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return 128 - status if status < 0 else status


def before_or_after(name: str, number: int, after: bool, act: Callable[[], Any]) -> Prepare:
    """Has the n-th call of a function of `os` do something more."""

    def prepare() -> None:
        real, calls = getattr(os, name), [0]

        def called(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] >= number and not after:
                act()
            found = real(*arguments, **options)
            if calls[0] >= number and after:
                act()
            return found

        setattr(os, name, called)

    return prepare


def kill_itself() -> None:
    """As a machine that goes down does to it."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    """The error of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Campaign:
    """Trials against one whole run.

    Args:
        folder: for all files of it.
        fields: of its runs, beside FLAGS.
    """

    def __init__(self, folder: Path, **fields: Any) -> None:
        self.folder, self.fields = folder, fields
        self.store = tiny.write(folder / "store", {"train": 40, "val": 12, "test": 12}, "audio,depth", positions=3)
        self.whole = folder / "whole"
        self.seconds = time.monotonic()
        counted = folder / "counted.json"
        status = wait(start(self.new(self.whole), folder / "whole.log", lambda: count_calls(counted)))
        self.seconds = time.monotonic() - self.seconds
        if status:
            raise RuntimeError((folder / "whole.log").read_text())
        self.calls: dict[str, int] = json.loads(counted.read_text())

    def new(self, out: Path, **fields: Any) -> list[str]:
        """The words that begin a run."""
        values = {**FLAGS, "checkpoint_seconds": 0.0, **self.fields, "data": self.store, "out": out, **fields}
        return [f"--{name}={value}" for name, value in values.items() if name not in UNREAD]

    def trial(self, number: int) -> str:
        """Makes a trial; its mode.

        Raises:
            Differs: something is not as it must be.
        """
        chosen = random.Random(number)
        mode = MODES[number % len(MODES)]
        run = Run(self, number, chosen)
        getattr(run, f"by_{mode}")()
        run.end()
        return mode


def count_calls(file: Path) -> None:
    """Has a process write how often it called each of EVENTS."""
    calls: Counter[str] = Counter()
    for name in EVENTS:
        before_or_after(name, 1, False, lambda name=name: calls.update([name]))()  # type: ignore[misc]
    leave = os._exit

    def report(status: int) -> None:
        file.write_text(json.dumps(calls))
        leave(status)

    os._exit = report  # type: ignore[assignment]


class Run:
    """One run that is interrupted."""

    def __init__(self, campaign: Campaign, number: int, chosen: random.Random) -> None:
        self.campaign, self.random = campaign, chosen
        self.out = campaign.folder / f"trial-{number}"
        self.log = campaign.folder / f"trial-{number}.log"
        fields = {"checkpoint_seconds": chosen.choice((0.0, 0.0, 0.05, 1000.0))}
        fields["loader"] = chosen.choice(("direct", "direct", "prefetch"))
        self.begin = campaign.new(self.out, **fields)

    @property
    def words(self) -> list[str]:
        """What begins the run, or goes on with it."""
        return [f"--resume={self.out}"] if self.out.exists() else self.begin

    def start(self, words: list[str] | None = None, prepare: Prepare | None = None) -> int:
        """Begins or goes on."""
        return start(words or self.words, self.log, prepare)

    def killed_at_a_moment(self, words: list[str] | None = None, number: int = signal.SIGKILL) -> int:
        """Lets it work for some time, then sends a signal; the status."""
        process = self.start(words)
        time.sleep(self.random.uniform(0.0, self.campaign.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        return wait(process)

    def saved(self) -> list[int]:
        """Steps whose checkpoints are there, wherever."""
        found = (self.out / checkpoint.FOLDER).rglob("step-*.pt") if self.out.exists() else iter(())
        return sorted({int(path.stem.removeprefix("step-")) for path in found})

    def by_kill(self) -> None:
        """Kill -9 at random moments."""
        for _ in range(self.random.randint(1, 3)):
            self.killed_at_a_moment()

    def by_event(self) -> None:
        """Kill -9 before or after a call that changes files."""
        for _ in range(self.random.randint(1, 2)):
            name = self.random.choice([name for name, calls in self.campaign.calls.items() if calls])
            call = self.random.randint(1, self.campaign.calls[name])
            wait(self.start(prepare=before_or_after(name, call, self.random.random() < 0.5, kill_itself)))

    def by_step(self) -> None:
        """Going on from an earlier checkpoint, then kill -9: nothing that was saved is lost."""
        self.killed_at_a_moment() if self.random.random() < 0.7 else wait(self.start())
        steps = checkpoint.steps_in(self.out)
        if not steps:
            return
        before, metrics = self.saved(), self.metrics()
        words = [f"--resume={self.out}", f"--resume_step={self.random.choice(steps)}"]
        if self.random.random() < 0.5:
            name = self.random.choice(("replace", "rename", "fsync", "mkdir"))
            call = self.random.randint(1, 12)
            wait(self.start(words, before_or_after(name, call, self.random.random() < 0.5, kill_itself)))
        else:
            self.killed_at_a_moment(words)
        kept = self.saved()
        # Those that were set aside, and the newest two.
        if (self.out / checkpoint.FOLDER / f"{checkpoint.ASIDE}-1").exists() and not {before[-1]} <= {*kept}:
            raise Differs(f"of steps {before} only {kept} are there")
        if max(kept) < max(before):
            raise Differs(f"the newest of steps {before} is lost, {kept} are there")
        if b"\0" in self.metrics() or not metrics.startswith(self.metrics()[: min(len(metrics), 1)]):
            raise Differs("the metrics log is damaged")

    def by_two(self) -> None:
        """Two that go on at once: one works, the other is refused or finds that the run has ended."""
        self.killed_at_a_moment()
        if not self.out.exists():
            return
        first = self.start()
        time.sleep(self.random.choice((0.0, 0.05, 0.5)))
        second = self.start()
        statuses = sorted((wait(first), wait(second)))
        text = self.log.read_text()
        refused = f"run {self.out} is in use by process " in text
        if statuses != ([0, 1] if refused else [0, 0]) or (not refused and "has finished already" not in text):
            raise Differs(f"two at once ended with {statuses}")

    def by_term(self) -> None:
        """SIGTERM."""
        self._signal(signal.SIGTERM, errors.TERMINATED)

    def by_int(self) -> None:
        """Ctrl-C."""
        self._signal(signal.SIGINT, errors.INTERRUPTED)

    def _signal(self, number: int, expected: int) -> None:
        for _ in range(self.random.randint(1, 2)):
            begun = self.log.stat().st_size if self.log.exists() else 0
            status = self.killed_at_a_moment(number=number)
            text = self.log.read_bytes()[begun:].decode() if self.log.exists() else ""
            # Before the process has begun to run its command it ends like any other process.
            if status not in (0, expected) or "Traceback" in text:
                raise Differs(f"ended with status {status} instead of {expected}")
            if status == expected and f"run {self.out}\n" in text and "to go on: --resume " not in text:
                raise Differs("did not say how to go on")
            steps = checkpoint.steps_in(self.out)
            if "this step is ended and saved" in text and not (steps and f"step {steps[-1]} is saved" in text):
                raise Differs(f"did not save its step, but {steps}")

    def by_full(self) -> None:
        """A full disk, by a limit on the size of files or an error of fsync."""
        largest = self.random.choice((300, 3000, 30000, 60000, 100000, 200000))
        call = self.random.randint(1, self.campaign.calls["fsync"])
        limited = self.random.random() < 0.5

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

        begun = self.log.stat().st_size if self.log.exists() else 0
        status = wait(self.start(prepare=limit if limited else before_or_after("fsync", call, False, no_space)))
        text = self.log.read_bytes()[begun:].decode()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        if status not in (0, 1) or "Traceback" in text or "unexpected" in text or (status == 1 and len(lines) != 1):
            raise Differs(f"a full disk ended it with status {status}")

    def metrics(self) -> bytes:
        """Bytes of metrics.jsonl."""
        path = self.out / METRICS
        return path.read_bytes() if path.exists() else b""

    def end(self) -> None:
        """Goes on to the end and compares."""
        for _ in range(MOST_RESUMES):
            if (self.out / checkpoint.SUMMARY).exists():
                break
            status = wait(self.start())
            if status:
                raise Differs(f"going on ended with status {status}")
        differing = differences(self.campaign.whole, self.out)
        if differing:
            raise Differs(f"differs in {', '.join(differing)}")


def differences(whole: Path, run: Path) -> list[str]:
    """In what a run differs from another; empty where bits are equal."""
    found = []
    if (whole / METRICS).read_bytes() != (run / METRICS).read_bytes():
        found.append(METRICS)
    ours, theirs = (json.loads((folder / checkpoint.SUMMARY).read_text()) for folder in (run, whole))
    found += [name for name in ("rows", "sharing", "checkpoint", "steps") if ours.get(name) != theirs.get(name)]
    for which in ("last", "best"):
        ours, theirs = (checkpoint.read(checkpoint.find(folder, which)) for folder in (run, whole))
        for name in ("model", "optimizer", "club_optimizer", "rng", "usage", "step"):
            if not equal(ours.get(name), theirs.get(name)):
                found.append(f"{name} of the {which} checkpoint")
    if len(checkpoint.steps_in(run)) > 2:
        found.append("number of checkpoints")
    left = [str(path.relative_to(run)) for path in run.rglob(".*") if path.name != ".lock"]
    found += [f"leftover {name}" for name in left]
    pictures, expected = (sorted(path.name for path in folder.glob("plots/*")) for folder in (run, whole))
    if pictures != expected:
        found.append("pictures")
    return found


def equal(first: Any, second: Any) -> bool:
    """Whether tensors and plain values in any nesting have equal bits."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def say(line: str) -> None:
    """A line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Interrupts runs in many ways, and compares them with a whole one.")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--folder", type=Path, help="for all files, which are kept [a temporary one]")
    parser.add_argument("--mode", choices=MODES, help="only trials of this mode [all]")
    arguments = parser.parse_args()
    numbers = range(arguments.first, arguments.first + arguments.trials)
    chosen = [number for number in numbers if arguments.mode in (None, MODES[number % len(MODES)])]
    torch.set_num_threads(1)
    failed: dict[int, str] = {}
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill-campaign-")))
        folder.mkdir(parents=True, exist_ok=True)
        campaign, begun = Campaign(folder), time.monotonic()
        say(f"the whole run took {campaign.seconds:.1f} s; calls {campaign.calls}")
        for done, number in enumerate(chosen, 1):
            mode = MODES[number % len(MODES)]
            try:
                campaign.trial(number)
                counts[f"{mode} equal"] += 1
            except Exception as error:
                counts[f"{mode} DIFFERS"] += 1
                failed[number] = f"{mode}: {type(error).__name__}: {error}"
                say(f"trial {number}, {failed[number]}")
                log = folder / f"trial-{number}.log"
                if log.exists():
                    say("\n".join(f"    {line}" for line in log.read_text().split("\n")[-12:]))
            if done % 10 == 0:
                say(f"{done} trials, {len(failed)} differ, {time.monotonic() - begun:.0f} s")
    say(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    differing = f"; trials {', '.join(map(str, failed))} differ" if failed else ""
    say(f"{len(chosen) - len(failed)} of {len(chosen)} equal{differing}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
