"""The main loop of the search on Hopper, run on the host: barriers, stages, descriptors and what each thread gets.

What it cannot show is that the machine's instructions do what tests/hopper_loop.cpp takes them to do.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"


def run(folder: Path, loop: str, width: int, tiles: int) -> str:
    """What tests/hopper_loop.cpp prints with this main loop."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler was found for the main loop")
    (folder / "hopper_loop.cuh").write_text(loop)
    options = ["-std=c++17", "-O1", "-pthread", "-Wno-unknown-pragmas", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([compiler, *options, str(TESTS / "hopper_loop.cpp"), "-o", str(folder / "loop")], check=True)
    command = [str(folder / "loop"), str(width), str(tiles)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()


@pytest.fixture(scope="module")
def loop() -> str:
    return (CSRC / "cuda" / "hopper_loop.cuh").read_text()


# Rings of 6, 5 and 2 stages, each gone round more than twice.
@pytest.mark.parametrize(("width", "tiles"), [(64, 14), (192, 4), (576, 1)])
def test_scores(tmp_path: Path, loop: str, width: int, tiles: int) -> None:
    assert run(tmp_path, loop, width, tiles) == f"{128 * 256 * tiles} 0"


@pytest.mark.parametrize(
    ("right", "mistaken"),
    [
        ("wait_for_products<1>();", ""),  # a stage is given back while products read it
        ("+ k * 2,", "+ k * 4,"),  # a wrong place within a stage
        ("k > 0 || chunk > 0", "true"),  # sums of the tile before
        ("chunk * (kGroupRows * 2", "chunk * (kGroupRows * 1"),  # a wrong place within the rows
    ],
)
def test_mistakes_show(tmp_path: Path, loop: str, right: str, mistaken: str) -> None:
    """With a mistake in the loop the test above fails: it can fail."""
    assert right in loop
    assert run(tmp_path, loop.replace(right, mistaken), 576, 2) != f"{128 * 256 * 2} 0"
