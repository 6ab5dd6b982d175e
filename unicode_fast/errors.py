"""Error messages of commands: one line for an error, and a file with the traceback for an unexpected one."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import linecache
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import unicode_fast
from unicode_fast.version import __version__

# Most characters of a message on one line.
LONGEST = 299
# Exit statuses that shells give processes after these signals.
INTERRUPTED, PIPE_CLOSED, TERMINATED = 130, 141, 143
_BAD_USAGE = 2
# The command in pyproject.toml.
SCRIPT = "unicode-fast"
# Signals within this time count as one.
_SAME_SECONDS = 1.0


# Messages with a remedy for system errors whose cause is not the file that they name.
REMEDIES = {
    errno.EMFILE: "this process may open no more files; `ulimit -n 65536` before the command allows more",
    errno.ENFILE: "this machine may open no more files; end processes with many files, or raise fs.file-max",
}


class TooManyFiles(RuntimeError):
    """The limit of open files is reached; the message has the remedy."""


class UsageError(ValueError):
    """A flag or a value of a command line is invalid."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises an error for an invalid command line, and prints no usage."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with argparse's message on one line."""
        message = re.sub(r"^argument --(\w+): invalid int value: ", r"\1 must be a whole number, got ", message)
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)|invalid choice: '(.*)' \(choose from (.*)\)", message)
        if unknown is not None:
            known = self._option_string_actions if unknown[1] else re.findall(r"[\w-]+", unknown[3])
            near = difflib.get_close_matches(unknown[1] or unknown[2], known, 1, 0.75)
            message += f", is {near[0]} meant?" if near else ""
        raise UsageError(f"{message}; see {self.prog} --help")


@contextlib.contextmanager
def of_command_line() -> Iterator[None]:
    """Context of checks of a command line: their ValueError or TypeError becomes a UsageError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        # Not those of files, which have classes of their own.
        if type(error) in (TypeError, ValueError) and is_foreseen(error):
            raise UsageError(str(error)) from error
        raise


def program(command: str = "") -> str:
    """The command of this process: `unicode-fast`, `python -m unicode_fast`, or the module of a command.

    Args:
        command: the subcommand; empty for the command itself.
    """
    called = Path(sys.argv[0])
    base = SCRIPT if called.name == SCRIPT else "python -m unicode_fast"
    whole = base == SCRIPT or called == Path(unicode_fast.__file__ or "").with_name("__main__.py")
    return f"{base}{' ' if whole else '.'}{command}" if command else base


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class Ending:
    """The signal to end a command, as an exception class: Terminated, KeyboardInterrupt, or None without a signal."""

    requested: type[KeyboardInterrupt] | None = None

    def within(self, seconds: float) -> bool:
        """Waits for a signal for at most `seconds`; returns whether it arrived."""
        deadline = time.monotonic() + seconds
        while self.requested is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.requested is not None


@contextlib.contextmanager
def postponed(message: str) -> Iterator[Ending]:
    """Context that postpones SIGTERM and Ctrl-C to its end; the block checks `Ending` to end early.

    A second signal ends the process at once. Signals within one second count as one, such as Ctrl-C on a terminal and
    SIGTERM of the parent command. Outside the main thread nothing is postponed.

    Args:
        message: for the error stream: what the command finishes before its end.
    """
    ending, process, since = Ending(), os.getpid(), [0.0]
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def note(number: int, frame: FrameType | None) -> None:
        status = TERMINATED if number == signal.SIGTERM else INTERRUPTED
        if os.getpid() != process:
            # A worker that reads batches, forked from this process. It ignores Ctrl-C: the step needs its batch.
            if number == signal.SIGTERM:
                os._exit(status)
        elif ending.requested is not None:
            if time.monotonic() - since[0] > _SAME_SECONDS:
                os._exit(status)
        else:
            since[0] = time.monotonic()
            ending.requested = Terminated if number == signal.SIGTERM else KeyboardInterrupt
            # Unlike `print`, `os.write` is safe in a signal handler.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{message}; another signal ends it at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if ending.requested is not None:
        raise ending.requested


def escaped(text: str) -> str:
    """A text on one line, with unprintable characters, such as those of a file name, as Python escapes."""
    return "".join(
        letter if letter.isprintable() else ascii(letter)[1:-1] if letter != "\n" else " " for letter in text
    )


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints a text to a stream, standard output by default, with unprintable characters as Python escapes."""
    print("\n".join(map(escaped, str(text).split("\n"))), file=file or sys.stdout, flush=True)  # noqa: T201


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text on one line of at most `longest` characters, with an ellipsis in its middle if it is longer."""
    line = escaped(text)
    if len(line) <= longest:
        return line
    head = 2 * longest // 3
    return f"{line[:head]} … {line[head + 3 - longest :]}"


def few(texts: Sequence[str], between: str = ", ", room: int = 150) -> str:
    """The first texts, as many as fit into `room` characters, and the number of the others."""
    shown: list[str] = []
    for text in texts:
        if shown and len(between.join([*shown, text])) > room:
            break
        shown.append(one_line(text, room))
    more = f" and {len(texts) - len(shown)} more" if len(shown) < len(texts) else ""
    return between.join(shown) + more


def message_of(error: BaseException) -> str:
    """The text of an error; for an OSError the reason and its file, or the remedy of REMEDIES."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        return REMEDIES[error.errno] + (f", got {str(error.filename)!r}" if error.filename is not None else "")
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}, got {str(error.filename)!r}"
    return str(error)


def is_foreseen(error: BaseException) -> bool:
    """Whether the package raised the error itself, or it is a system error that names its file."""
    if type(error).__module__.partition(".")[0] == "unicode_fast":
        return True
    if isinstance(error, OSError) and (error.errno in REMEDIES or (error.strerror and error.filename is not None)):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(unicode_fast.__file__ or "").parent
    if not frames or package not in Path(frames[-1].filename).parents:
        return False
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    # Without the source the two cases cannot be distinguished.
    return line.startswith("raise ") or not line


def run_main(main: Callable[[Sequence[str] | None], int]) -> None:
    """Runs a command and ends the process with its status.

    An error is one line on the error stream, with status 2 for an invalid flag or value and 1 for all else, such as a
    missing file. The line of an unexpected error names a file with the traceback. SIGTERM ends a command as Ctrl-C
    does, with status 143.
    """
    for stream in (sys.stdout, sys.stderr):
        # Terminals may not support the characters of all languages.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if unicode_fast.__file__ is None:
        _end(f"error: the folder unicode_fast in {Path.cwd()} hides the package; change to another folder", 1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminator(os.getpid()))
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(None)
        sys.stdout.flush()
    except Terminated:
        _end("ended by SIGTERM", TERMINATED)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output, such as head, has closed it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except UsageError as error:
        _end(one_line(f"error: {error}"), _BAD_USAGE)
    except Exception as error:
        _end(_line_of(error), 1)
    sys.exit(status)


def _line_of(error: Exception) -> str:
    if is_foreseen(error):
        return one_line(f"error: {message_of(error)}")
    name = type(error).__name__
    # torch's CPU allocator raises a plain RuntimeError.
    full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if full or isinstance(error, MemoryError) or name == "OutOfMemoryError":
        where = "the GPU" if name == "OutOfMemoryError" else "this machine"
        remedy = "reduce --batch_size, --width or --codewords, or increase --micro_batches"
        return f"error: the memory of {where} is full; {remedy}"
    where = _log(error)
    room = LONGEST - len(where)
    return f"{one_line(f'error: unexpected {name}: {error}', room)}{where}"


def _log(error: Exception) -> str:
    """Writes the traceback to a file; returns the clause that names it."""
    try:
        handle, name = tempfile.mkstemp(prefix="unicode-fast-", suffix=".log")
    except OSError:
        return "; the traceback cannot be written to a file"
    with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        print(f"unicode_fast {__version__}, Python {platform.python_version()}, {platform.platform()}", file=file)  # noqa: T201
        print(*sys.argv, file=file)  # noqa: T201
        traceback.print_exception(type(error), error, error.__traceback__, file=file)
    return f"; the traceback is in {name}"


def _end(line: str, status: int) -> None:
    # Standard output comes before the error.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(line, file=sys.stderr)  # noqa: T201
    sys.exit(status)


def _terminator(process: int) -> Callable[[int, FrameType | None], None]:
    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            # A worker that reads batches, forked from this process.
            os._exit(TERMINATED)
        # A second signal ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    return end


def is_starting() -> bool:
    """Whether Python is importing this package to run one of its commands."""
    given = sys.orig_argv
    module = given[given.index("-m") + 1 :][:1] if "-m" in given else []
    as_module = sys.argv[:1] == ["-m"] and module != [] and module[0].partition(".")[0] == "unicode_fast"
    return as_module or Path(*sys.argv[:1]).name == SCRIPT


def quiet_interrupt() -> None:
    """Until `run_main` starts, Ctrl-C ends this process at once with one line.

    An exception would interrupt an import, and the half-imported module would cause other errors.
    """
    signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
