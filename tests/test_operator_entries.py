"""The operators called without the public functions: they refuse bad arguments by name, or their result is right."""

from pathlib import Path

from processes import python

import unicode_fast

PROGRAM = Path(__file__).with_name("operator_entries.py")


def test_no_call_crashes() -> None:
    """In a process of its own, whose last line names the call in which it crashed."""
    package = Path(unicode_fast.__file__).parent.parent
    done = python(PROGRAM, PYTHONPATH=str(package), OMP_NUM_THREADS="1")
    lines = done.stdout.splitlines() or ["no call"]
    assert not [line for line in lines if line.startswith("FAILED")]
    assert done.returncode == 0, f"status {done.returncode} in the call {lines[-1]!r}\n{done.stderr}"
    assert int(lines[-1].removesuffix(" calls")) > 2000
