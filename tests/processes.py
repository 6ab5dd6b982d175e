"""Python in a process of its own."""

import os
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen


def start(*words: object, folder: Path | None = None, **variables: str) -> Popen[str]:
    """With these words, in a folder, with variables beside those of the tests."""
    command, environment = [sys.executable, *map(str, words)], {**os.environ, **variables}
    return Popen(command, cwd=folder, env=environment, stdout=PIPE, stderr=PIPE, text=True)


def python(*words: object, folder: Path | None = None, **variables: str) -> CompletedProcess[str]:
    """Output and status of such a process."""
    with start(*words, folder=folder, **variables) as process:
        out, errors = process.communicate()
    return CompletedProcess(words, process.returncode, out, errors)
