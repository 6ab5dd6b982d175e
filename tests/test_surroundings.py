"""What a command inherits from where it is started: the locale, and a notebook's backend for pictures."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tiny
import yaml

import unicode_fast
from unicode_fast.tasks import Row

PACKAGE = Path(unicode_fast.__path__[0])
SOURCES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")}


def text_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that read or write a file as text, by the names and modes that the package uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            modes = [word for word in words if word in ("r", "w", "a", "x", "r+", "w+", "a+")]
            if name in ("read_text", "write_text") or (name in ("open", "fdopen") and modes):
                yield node


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Resources of an installation, which are read by name, are UTF-8 by themselves; our own `write_text` is atomic."""
    wrong = [
        f"{file.name}:{call.lineno}"
        for file, tree in SOURCES.items()
        for call in text_calls(tree)
        if not any(word.arg == "encoding" for word in call.keywords)
        and not (isinstance(call.func, ast.Name) and call.func.id == "write_text")
        and not (isinstance(call.func, ast.Attribute) and call.func.attr == "read_text" and call.args)
    ]
    assert not wrong


def test_matplotlib_is_imported_without_the_environments_backend() -> None:
    wrong = []
    for file, tree in SOURCES.items():
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr) == "any_backend()"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "matplotlib" for name in names) and id(node) not in guarded:
                wrong.append(f"{file.name}:{node.lineno}")
            assert not any("pyplot" in name for name in names)
    assert [place.split(":")[0] for place in wrong] == ["headless.py"]


def test_a_report_from_a_notebook_under_an_ascii_locale(tmp_path: Path) -> None:
    run = tmp_path / "Läufe"
    run.mkdir()
    values = {**tiny.config().flat(), "data": str(tmp_path / "Ziffern-für-alle")}
    (run / "config.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    row = Row("classification", "audio", "video", 0.5, 0.75, 0.25)
    (run / "summary.json").write_text(json.dumps({"rows": [row.as_dict()]}), encoding="utf-8")
    surroundings = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "MPLBACKEND": "module://nowhere.inline",
    }
    done = subprocess.run(
        [sys.executable, "-m", "unicode_fast.report", str(run), "--out", str(tmp_path / "report")],
        env={**os.environ, **surroundings, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "classification audio → video" in page and "data Ziffern-für-alle" in page
    assert "classification audio ? video" in done.stdout.decode("ascii")
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
