"""README, pages and examples: what they show runs, and what they name is there."""

import pkgutil
import re
from pathlib import Path

import pytest
import torch
import yaml

import unicode_fast
from unicode_fast import data, media
from unicode_fast.data.check import check

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return [block.split("```")[0] for block in (ROOT / page).read_text().split("```python\n")[1:]]


def run(code: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(compile(code, "documentation", "exec"), names)
    return names


def test_the_readme_is_short_and_its_first_screen_runs() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert lines.index("<!-- run-command -->") < 20


def test_commands_are_those_of_the_page_on_getting_started() -> None:
    commands = re.findall(r"<!-- (\w+)-command -->\n```bash\n(.+)\n```\n<!-- /\1-command -->", README)
    assert [name for name, _ in commands] == ["run", "test"]
    page = (ROOT / "docs" / "getting-started.md").read_text()
    assert all(f"```bash\n{command}\n```" in page for _, command in commands)


def test_the_model_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(blocks("README.md")[0])
    assert names["codes"].index.shape == (2, 10) and names["codes"].vector.shape == (2, 10, 128)  # type: ignore
    assert not names["model"].training  # type: ignore


@pytest.mark.parametrize("page", ["README.md", "docs/data.md"])
def test_the_own_data_of(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [block for block in blocks(page) if "clips.csv" in block]
    monkeypatch.chdir(tmp_path)
    run(example)
    report = check("clips:mine", progress=False)
    assert report.findings == [] and report.clips["train"] == {"depth": 100, "radar": 100}


def test_the_page_on_getting_started() -> None:
    (example,) = blocks("docs/getting-started.md")
    assert torch.isfinite(run(example)["losses"].total)  # type: ignore


def test_the_page_on_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks after the first, which takes a run and a checkpoint, with data and model of the README."""
    monkeypatch.chdir(tmp_path)
    names = run("\n".join([*blocks("README.md"), *blocks("docs/python.md")[1:]]))
    assert names["rebuilt"].shape == (40, 8, 9, 9, 3) and names["error"] > 0  # type: ignore
    assert names["index"]["video"].shape == (8, 10) and names["loss"].shape == ()  # type: ignore


def listed(page: str) -> list[str]:
    """Names of the blocks of an API page, and of the members that a block lists."""
    blocks = re.findall(r"^::: (\S+)$(?:\n +options: \{members: \[(.*)\]\})?", page, re.MULTILINE)
    return [f"{name}.{one}".rstrip(".") for name, members in blocks for one in ("", *re.findall(r"\w+", members))]


def is_documented(name: str) -> bool:
    """Of a constant a page shows the value; named tuples and dataclasses make a docstring of their fields."""
    thing = pkgutil.resolve_name(name)
    made = f"{name.rpartition('.')[2]}("
    return isinstance(thing, str | tuple) or bool(thing.__doc__) and not thing.__doc__.startswith(made)


@pytest.mark.parametrize(("page", "module"), [("api", unicode_fast), ("api-data", data), ("api-media", media)])
def test_every_public_name_has_its_place(page: str, module: object) -> None:
    names = listed((ROOT / "docs" / f"{page}.md").read_text())
    assert set(module.__all__) - {name.rpartition(".")[2] for name in names} == set()  # type: ignore
    assert [name for name in names if not is_documented(name)] == []


def test_a_name_that_is_missing_or_has_no_docstring_is_found() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        is_documented("unicode_fast.no_such_name")
    assert not is_documented(f"{__name__}.run") and is_documented(f"{__name__}.listed")


def test_links_of_files_outside_the_site_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
        assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_tables_are_what_their_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    update_readme = pytest.importorskip("update_readme")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    pages = "".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for name, text in update_readme.sections().items():
        assert pages.count(f"<!-- {name} -->\n{text}\n<!-- /{name} -->") == 1, f"python {update_readme.__file__}"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == unicode_fast.__version__
    assert f"## [{unicode_fast.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        *("Xia", "Huang", "Zhu", "Zhao")
    ]
