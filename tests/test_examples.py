"""The scripts in examples/, each as a user starts it, at a tiny size."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from media_files import beeps, write_media
from processes import python

from unicode_fast import load

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object, cache: Path) -> str:
    """What a script prints."""
    variables = {"UNICODE_FAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = python(EXAMPLES / f"{name}.py", *arguments, folder=cache, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of own_data.py, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, run("own_data", "mine", "--clips", 48, "--steps", 2, cache=folder)


def test_own_data_becomes_scores(mine: tuple[Path, str]) -> None:
    folder, printed = mine
    assert load(folder / "mine" / "run").names == ("depth", "radar")
    # The row of the table after training, and that of evaluate, which is the same.
    rows = re.findall(r"^classification  radar -> depth +(\S+)", printed, re.MULTILINE)
    assert len(rows) == 2 and rows[0] == rows[1]


def test_search_finds_clips(mine: tuple[Path, str]) -> None:
    folder, _ = mine
    printed = run("search", "mine/run", "--from", "radar", "--to", "depth", "--first", 3, cache=folder)
    assert re.search(r"^clip take3: the first by depth are take\d+, take\d+, take\d+$", printed, re.MULTILINE)
    assert re.search(r"^of the first 3, \d+ % have the query's class; by chance 25 %$", printed, re.MULTILINE)


def test_own_loop_trains_and_keeps_a_model(tmp_path: Path) -> None:
    printed = run("own_loop", "--steps", 2, "--clips", 80, "--out", "mine.safetensors", cache=tmp_path)
    lines = r"^step 0: loss \d+\.\d+\nsame code in both modalities: \d+ % of positions$"
    assert re.search(lines, printed, re.MULTILINE)
    assert load(tmp_path / "mine.safetensors").names == ("radar", "depth")


def test_the_codebook_alone_becomes_shared(tmp_path: Path) -> None:
    printed = run("codebook_only", "--steps", 300, cache=tmp_path)
    (same,) = re.findall(r"^same code in both modalities: (\d+) % of positions$", printed, re.MULTILINE)
    assert int(same) >= 90


def write_stamps(folder: Path) -> None:
    """A few pictures, texts and sounds in the places of Tux Paint's; one stamp lacks its sound, another its picture."""
    image = pytest.importorskip("PIL.Image")
    chosen = np.random.default_rng(0)
    for number in range(40):
        kind = ("animals", "plants")[number % 2]
        stamp = folder / kind / f"{number}.txt"
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(f"The {kind} number {number}.\nfr.utf8=Le numéro {number}.\n")
        if number != 4:
            pixels = chosen.integers(0, 256, (30, 40, 4), dtype=np.uint8)
            image.fromarray(pixels, "RGBA").save(stamp.with_suffix(".png"))
        if number != 7:
            write_media(stamp.with_name(f"{number}_desc_fr.ogg"), sound=beeps(1.2, (number % 2,)))


@pytest.mark.slow
def test_stamps_become_a_search_page(tmp_path: Path) -> None:
    for package in ("av", "efficientnet_lite_pytorch", "wordllama"):
        if find_spec(package) is None:
            pytest.skip(f"package {package} is not installed, extra media")
    write_stamps(tmp_path / "stamps")
    flags = ("--stamps", "stamps", "--steps", 2, "--queries", "a plant")
    printed = run("stamps", "made", *flags, cache=tmp_path)
    assert "40 of 40 files, 40 clips" in printed
    assert "1 of 40 clips have no audio" in printed and "1 of 40 clips have no video" in printed
    assert len(re.findall(r"^retrieval ", printed, re.MULTILINE)) == 3
    assert (tmp_path / "made" / "codebook.html").read_text().count("data:image/jpeg") > 0
    assert len(re.findall(r"(?:animals|plants)/\d+\.mp4", printed.split("a plant")[-1])) >= 5
