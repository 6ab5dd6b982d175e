"""How commands end where something is wrong: one short line that names it, a file for what nobody foresaw, a status."""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from processes import python, start

from unicode_fast import ablate, errors, evaluate, leaderboard, reproduce, train
from unicode_fast.compat import convert
from unicode_fast.data import __main__ as data
from unicode_fast.errors import LONGEST, escaped, is_foreseen, one_line, run_main
from unicode_fast.report import tables as report

PACKAGE = Path(errors.__file__).parent
Main = Callable[[Sequence[str] | None], int]


def ended(main: Main, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and what was said on the error stream."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda _: main(list(words)))
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


LONG = "x" * 5000
CASES: list[tuple[Main, list[str], int, str]] = [
    (train.main, ["--nope", "3"], 2, "unrecognized arguments: --nope 3; .*train --help"),
    (train.main, ["--steps"], 2, "--steps: expected one argument"),
    (train.main, ["--seeds", "abc"], 2, "seeds must be a whole number, got 'abc'"),
    (train.main, ["--resume_step", "last", "--resume", "x"], 2, "resume_step must be a whole number, got 'last'"),
    (train.main, ["--width", LONG], 2, "width must be int, got str 'xxx"),
    (train.main, ["--width", "0"], 2, "width must be a whole number of at least 1, got 0"),
    (train.main, ["--seeds", "0"], 2, "seeds must be at least 1, got 0"),
    (train.main, ["--resume_step", "3"], 2, "resume_step needs --resume RUN"),
    (train.main, ["--format", "gif"], 2, "format must be one of .*, got 'gif'"),
    (train.main, ["--device", "tpu"], 2, "device must be auto, cpu or cuda, got 'tpu'"),
    (train.main, ["--method", "fcid", "--dcid"], 2, "dcid must be false with method 'fcid', .*, got true"),
    (train.main, ["--data", "nowhere", "--easy"], 2, "easy needs built-in data, got data '.*nowhere'"),
    (train.main, ["--data", f"{LONG}:y"], 1, "File name too long, got"),
    (train.main, ["--data", "\x1b[31mred"], 1, r"\\x1b\[31mred"),
    (train.main, ["--resume", "nowhere"], 1, "resume must be a run folder with a config.yaml, got 'nowhere'"),
    (train.main, ["--config", "/dev/null/x"], 1, "config must be a readable YAML file, got '/dev/null/x'"),
    (evaluate.main, [], 2, "run must be a run folder"),
    (evaluate.main, ["nowhere", "--from=audio", "--to=video"], 1, "run folder nowhere does not exist"),
    (evaluate.main, ["x", "--task", "singing"], 2, "task must be one of .*, got 'singing'"),
    (evaluate.main, ["x", "--protocol", "best"], 2, "protocol must be one of .*, got 'best'"),
    (evaluate.main, ["x", "--checkpoint", "y"], 2, "checkpoint must be best, last or a training step, got 'y'"),
    (evaluate.main, ["x", "--seed=-1"], 2, "seed must be at least 0, got -1"),
    (evaluate.main, ["x", "--toc_channels=4", "--toc_weights=0,0"], 2, "toc_weights must be .*, got '0,0'"),
    (evaluate.main, ["x", "--device", "tpu"], 2, "device must be auto, cpu or cuda, got 'tpu'"),
    (evaluate.main, ["x", "--out", "/"], 1, "out must be a file that does not exist yet, got '/'"),
    (report.main, [], 2, "arguments are required: runs"),
    (report.main, ["nowhere", "--otu", "y"], 2, "unrecognized arguments: --otu y, is --out meant"),
    (ablate.main, ["--otu", "y"], 2, "unrecognized arguments: --otu y, is --out meant"),
    (ablate.main, [], 2, "arguments are required: --out"),
    (leaderboard.main, ["--otu", "y"], 2, "unrecognized arguments: --otu y, is --out meant"),
    (leaderboard.main, [], 2, "arguments are required: --out"),
    (reproduce.main, ["--tabel", "1"], 2, "unrecognized arguments: --tabel 1, is --table meant"),
    (report.main, ["nowhere", "--format", "gif"], 2, "format must be one of .*, got 'gif'"),
    (report.main, ["nowhere", "--out", "y"], 1, "run must be a run folder with a config.yaml, got 'nowhere'"),
    (convert.main, ["out"], 2, "one of the arguments --from-cmg --to-cmg is required"),
    (
        convert.main,
        ["--to-cmg", "x", "out", "--checkpoint", "y"],
        2,
        "checkpoint must be .*, got 'y'",
    ),
    (convert.main, ["--from-cmg", "nowhere", "out"], 1, "from-cmg must be a file .*, got 'nowhere'"),
    (ablate.main, ["--out"], 2, "--out"),
    (data.main, [], 2, "arguments are required: command"),
    (data.main, ["sing"], 2, "invalid choice: 'sing'"),
    (data.main, ["pack", "nowhere", "store"], 1, "data must be one of .*, got 'nowhere'"),
    (data.main, ["check", "nowhere"], 1, "data must be one of .*, got 'nowhere'"),
    (data.main, ["shards", "nowhere", "store", "--clips", "0"], 2, "clips must be at least 1, got 0"),
]


@pytest.mark.parametrize(("main", "words", "status", "said"), CASES, ids=[case[3][:30] for case in CASES])
def test_one_line_that_names_what_is_wrong(
    main: Main,
    words: list[str],
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = ended(main, words, capsys)
    assert code == status
    assert re.fullmatch(rf"error: .*({said}).*\n", text), text
    assert len(text) <= LONGEST + 1 and text[:-1].isprintable()
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors.tempfile, "tempdir", str(tmp_path))

    def fails(words: Sequence[str] | None) -> int:
        return len({}[f"no key {LONG}"])

    code, text = ended(fails, [], capsys)
    (log,) = tmp_path.iterdir()
    assert code == 1 and len(text) <= LONGEST + 1
    assert text.startswith("error: unexpected KeyError: 'no key xxx") and text.endswith(f"traceback is in {log}\n")
    content = log.read_text()
    assert "Traceback (most recent call last)" in content and f"no key {LONG}" in content and "in fails" in content


def test_what_the_package_raises_is_foreseen() -> None:
    """Not so what it stumbles over, though the type may be the same."""

    def error_of(call: Callable[[], object]) -> BaseException:
        try:
            call()
        except BaseException as error:
            return error
        raise AssertionError

    from unicode_fast.config import check_value

    assert is_foreseen(error_of(lambda: check_value("width", "wide")))
    assert is_foreseen(error_of(lambda: open("/no/where")))
    assert not is_foreseen(error_of(lambda: int("wide")))
    assert not is_foreseen(error_of(lambda: check_value("widht", 3)))
    # An error of the package itself, without the given values.
    assert not is_foreseen(error_of(lambda: one_line(3)))  # type: ignore[arg-type]


def test_a_message_on_one_line() -> None:
    assert escaped("a\nb\x1b[0m\u202eé\x00\ud800") == "a b\\x1b[0m\\u202eé\\x00\\ud800"
    short = one_line("a" * 400 + "b" * 400, 30)
    assert len(short) == 30 and short.startswith("a" * 20) and " … " in short and short.endswith("b" * 7)
    assert one_line("a" * LONGEST) == "a" * LONGEST


class TestProcesses:
    """A command as from a shell."""

    # The package without what takes seconds to import.
    LIGHT = f"""if True:
        import sys, types
        package = types.ModuleType("unicode_fast")
        package.__path__, package.__file__ = [{str(PACKAGE)!r}], {str(PACKAGE / "__init__.py")!r}
        sys.modules["unicode_fast"] = package
        from unicode_fast.errors import run_main
    """

    @pytest.mark.parametrize(
        "words", [["-m", "unicode_fast.report"], ["-m", "unicode_fast", "report"], ["unicode-fast", "report"]]
    )
    def test_an_interrupt_while_a_command_is_imported(self, words: list[str], tmp_path: Path) -> None:
        """Which takes seconds, here as long as it takes to be interrupted."""
        # As pip writes it.
        (tmp_path / "unicode-fast").write_text("from unicode_fast.__main__ import run\nrun()\n")
        (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
        paths = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
        with start(*words, folder=tmp_path, PYTHONPATH=paths) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            _, text = process.communicate()
        assert text == "interrupted\n"
        assert process.returncode == 130

    def test_output_that_is_no_longer_read(self) -> None:
        code = "    run_main(lambda _: print('\\n' * 1_000_000) or 0)"
        with start("-c", self.LIGHT + code) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait() == 141

    def test_letters_that_the_terminal_lacks(self) -> None:
        code = "    run_main(lambda _: print('→ é') or 0)"
        done = python("-c", self.LIGHT + code, PYTHONIOENCODING="ascii", LC_ALL="C")
        assert (done.returncode, done.stdout, done.stderr) == (0, "? ?\n", "")


def test_streams_that_cannot_be_set_up_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit, match="0"):
        run_main(lambda _: 0)
