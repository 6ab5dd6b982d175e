"""The end of a command: a status, one line, and a file for an unforeseen error."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_locks import forked, status_of

from unicode_fast import errors
from unicode_fast.checkpoint import CheckpointError


def ends(act: Callable[[], object], tmp_path: Path) -> tuple[int, str]:
    """Status and output of a command."""
    output = tmp_path / "output"

    def run() -> None:
        descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
        os.environ["TMPDIR"] = str(tmp_path)
        # Background processes of a shell ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 0
        try:
            errors.run_main(lambda _: act() or 0)  # type: ignore[func-returns-value, return-value]
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(status)

    return status_of(forked(run)), output.read_text()


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "status", "line"),
    [
        (lambda: None, 0, ""),
        (send(signal.SIGTERM), 143, "ended by SIGTERM\n"),
        (send(signal.SIGINT), 130, "interrupted\n"),
        (fail(BrokenPipeError()), 141, ""),
        (fail(errors.UsageError("no such flag")), 2, "error: no such flag\n"),
        (fail(CheckpointError("a\nb \x1b[1m")), 1, "error: a b \\x1b[1m\n"),
        (fail(OSError(28, "No space left on device", "/x")), 1, "error: No space left on device, got '/x'\n"),
        (fail(CheckpointError("x" * 1000)), 1, "error: " + "x" * 192 + " … " + "x" * 97 + "\n"),
    ],
)
def test_status_and_line(act: Callable[[], object], status: int, line: str, tmp_path: Path) -> None:
    assert ends(act, tmp_path) == (status, line)


def test_full_memory(tmp_path: Path) -> None:
    line = "error: the memory of this machine is full; reduce --batch_size, --width or --codewords, or increase "
    assert ends(lambda: torch.empty(1 << 50), tmp_path) == (1, f"{line}--micro_batches\n")


def test_output_has_no_escapes_of_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    errors.say("one\x1b[31m red\ntwo")
    errors.say("three\r", sys.stderr)
    assert capsys.readouterr() == ("one\\x1b[31m red\ntwo\n", "three\\r\n")


class TestPostponed:
    @pytest.mark.parametrize(
        ("number", "kind"), [(signal.SIGTERM, errors.Terminated), (signal.SIGINT, KeyboardInterrupt)]
    )
    def test_it_is_raised_at_the_end(
        self, number: int, kind: type[KeyboardInterrupt], capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
        done = []
        with pytest.raises(KeyboardInterrupt) as caught, errors.postponed("work is saved") as ending:
            assert ending.requested is None and not ending.within(0.02)
            os.kill(os.getpid(), number)
            assert ending.within(5.0)
            done.append(ending.requested)
        assert done == [kind] and caught.type is kind
        assert capfd.readouterr().err == "\nwork is saved; another signal ends it at once\n"
        assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before

    def test_a_second_one_ends_it_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(errors, "_SAME_SECONDS", 0.0)

        def act() -> None:
            with errors.postponed("work is saved") as ending:
                os.kill(os.getpid(), signal.SIGTERM)
                ending.within(5.0)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError

        status, text = ends(act, tmp_path)
        assert (status, text) == (130, "\nwork is saved; another signal ends it at once\n")

    def test_those_of_the_same_moment_are_one(self) -> None:
        with pytest.raises(KeyboardInterrupt), errors.postponed("") as ending:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert ending.within(5.0) and ending.requested is KeyboardInterrupt

    def test_children_read_on_after_ctrl_c_and_end_at_sigterm(self) -> None:
        with errors.postponed("") as ending:
            reading, ended = (
                forked(lambda number=number: [os.kill(os.getpid(), number)])  # type: ignore[misc]
                for number in (signal.SIGINT, signal.SIGTERM)
            )
            assert (status_of(reading), status_of(ended)) == (0, 143)
            assert ending.requested is None

    def test_another_error_is_not_hidden(self) -> None:
        with pytest.raises(ZeroDivisionError), errors.postponed(""):
            os.kill(os.getpid(), signal.SIGINT)
            raise ZeroDivisionError
