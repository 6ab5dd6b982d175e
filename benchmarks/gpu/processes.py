"""Processes with time limits, each in its own group, which is killed as a whole; their lines are read as they come."""

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.02
# For the end of a killed process.
KILL_SECONDS = 3.0


class Job(NamedTuple):
    """A process to run.

    Attributes:
        name: of its logs, and of its subject.
        command: program and arguments.
        seconds: its own time limit.
        environment: variables beyond those of this process.
        quiet: seconds without a line, after the first, that count as a hang.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = {}
    quiet: float = math.inf


class Ending(NamedTuple):
    """How a process ended.

    Attributes:
        status: exit status, negative for a signal; None where it was stopped.
        text: how it ended, in a few words; "" for status 0.
        out_of_time: True where the time limit of all, not its own, stopped it.
        started: False where it could not be started.
    """

    status: int | None
    text: str
    out_of_time: bool = False
    started: bool = True


class _Running:
    """A started process, its logs, and its unread lines."""

    def __init__(self, job: Job, logs: Path, until: float) -> None:
        self.job, self.until, self.started = job, until, time.monotonic()
        stem = re.sub(r"\W+", "-", job.name)
        self.errors = logs / f"{stem}.err"
        with (logs / f"{stem}.out").open("wb") as out, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env={**os.environ, **job.environment},
                start_new_session=True,
            )
        self.out = (logs / f"{stem}.out").open(errors="replace")
        self.rest = ""
        # Time of the last line.
        self.last_line = math.inf

    def lines(self) -> list[str]:
        """Whole lines since the last call."""
        *whole, self.rest = (self.rest + self.out.read()).split("\n")
        if whole:
            self.last_line = time.monotonic()
        return whole

    def ending(self) -> Ending | None:
        """Its ending; None while it runs within its limits."""
        status, now = self.process.poll(), time.monotonic()
        quiet = now - self.last_line > self.job.quiet
        if status is None and not quiet and now < min(self.until, self.started + self.job.seconds):
            return None
        self.kill()
        if status is None:
            late = now < self.started + self.job.seconds
            passed = f"{now - self.started:.0f} s"
            if quiet and now < self.until:
                return Ending(None, f"hangs: no line for {self.job.quiet:.0f} s")
            return Ending(
                None, f"stopped after {passed}, no time is left" if late else f"timed out after {passed}", late
            )
        if status < 0:
            return Ending(status, f"killed by {signal.Signals(-status).name}")
        errors = self.errors.read_text(errors="replace").strip().splitlines()
        return Ending(status, f"exit {status}: {errors[-1][:200] if errors else 'no message'}" if status else "")

    def kill(self) -> None:
        """Kills the whole group, with processes that the process left behind."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            # It hangs in a driver, where no signal ends it. Later jobs do not wait for it.
            pass


def follow(jobs: Sequence[Job], logs: Path, until: float, at_once: int = 1) -> Iterator[tuple[Job, str | Ending]]:
    """Runs jobs in their order and yields each line of their standard output as it comes, then the ending of each.

    Args:
        jobs: those whose turn comes after `until` are not started.
        logs: folder for their whole output.
        until: time.monotonic() at which all jobs must have ended.
        at_once: number of jobs at one time.
    """
    waiting, running = list(jobs), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                if time.monotonic() >= until:
                    yield job, Ending(None, "not run: no time is left", True)
                    continue
                try:
                    running.append(_Running(job, logs, until))
                except OSError as error:
                    yield job, Ending(None, f"cannot be started: {error}", started=False)
            for each in list(running):
                ending = each.ending()
                for line in each.lines() + ([each.rest] if ending and each.rest else []):
                    yield each.job, line
                if ending:
                    running.remove(each)
                    each.out.close()
                    yield each.job, ending
            time.sleep(POLL_SECONDS)
    finally:
        for each in running:
            each.kill()
