"""Each probe task on its public layout, from the command line, under both protocols."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from layout_files import write_ave, write_ave_avvp, write_avvp, write_ucf51, write_ucf_vggsound

from unicode_fast.data import ClipSet
from unicode_fast.evaluate import main as evaluate
from unicode_fast.tasks import Row, runner
from unicode_fast.train import main as train

pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")

STREAMS = "audio,video"
# Task, layout, its writer, and the clips of the official protocol's score: all 24, or AVE's training split.
CASES: dict[str, tuple[str, Callable, int]] = {
    "classification": ("ave", write_ave, 18),
    "localisation": ("avvp", write_avvp, 24),
    "cross-localisation": ("ave-avvp", write_ave_avvp, 24),
    "cross-classification": ("ucf-vggsound", write_ucf_vggsound, 24),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, spoken: ClipSet) -> Path:
    """A few steps on AVE; its features have the shapes of the other layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    write_ave(folder / "ave", spoken)
    unread = ("word_width", "vector_specific_width")
    sizes = [f"--{name}={value}" for name, value in tiny.SIZES.items() if name not in unread]
    flags = [f"--data=ave:{folder / 'ave'}", f"--modalities={STREAMS}", f"--out={folder / 'run'}", "--device=cpu"]
    assert train([*flags, "--steps=4", "--batch_size=6", "--validations=0", "--probe_tasks=none", *sizes]) == 0
    return folder / "run"


@pytest.mark.parametrize("task", CASES)
def test_both_protocols_and_directions(
    run: Path,
    task: str,
    tmp_path: Path,
    spoken: ClipSet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout, write, scored = CASES[task]
    write(tmp_path / layout, spoken)
    sizes: list[int] = []

    class Counted(runner.Bootstrap):
        def __init__(self, clips: int, seed: int) -> None:
            sizes.append(clips)
            super().__init__(clips, seed)

    monkeypatch.setattr(runner, "Bootstrap", Counted)
    for protocol in ("held_out", "official"):
        for source, target in (("audio", "video"), ("video", "audio")):
            out = tmp_path / f"{protocol}-{source}.json"
            words = [str(run), f"--task={task}", f"--data={layout}:{tmp_path / layout}"]
            flags = [f"--protocol={protocol}", f"--from={source}", f"--to={target}", f"--out={out}"]
            assert evaluate([*words, *flags]) == 0
            assert "the run has no best checkpoint" in capsys.readouterr().err
            row = json.loads(out.read_text())
            assert all(0 <= row[name] <= 1 for name in ("score", "same_modality", "chance"))
    assert sizes[2:] == [scored, scored]
    # The held_out protocol scores clips outside the probe's training; AVVP's annotated videos are such clips for AVE.
    assert all(size == 24 if layout == "ave-avvp" else size < scored for size in sizes[:2])


# Layout of the open-set task, its writer, copies of the 24 clips, K, and the clips of each protocol's score, audio and
# video. AVE is scored on its test split under both protocols.
OPEN: dict[str, tuple[Callable, int, str, dict[str, tuple[int, int]]]] = {
    "ave": (write_ave, 1, "4", {"held_out": (3, 3), "official": (3, 3)}),
    "ucf51": (write_ucf51, 1, "", {"held_out": (7, 7), "official": (24, 24)}),
    "ucf-vggsound": (write_ucf_vggsound, 2, "5", {"held_out": (8, 14), "official": (48, 48)}),
}


@pytest.mark.parametrize("protocol", ["held_out", "official"])
@pytest.mark.parametrize("layout", OPEN)
def test_open_classification(run: Path, layout: str, protocol: str, tmp_path: Path, spoken: ClipSet) -> None:
    write, copies, known, scored = OPEN[layout]
    write(tmp_path / layout, spoken.select(np.arange(24 * copies) % 24))
    for number, (source, target) in enumerate((("video", "audio"), ("audio", "video"))):
        out = tmp_path / f"{protocol}-{source}.json"
        words = [str(run), "--task=open-classification", f"--data={layout}:{tmp_path / layout}", f"--out={out}"]
        flags = [
            f"--protocol={protocol}",
            f"--from={source}",
            f"--to={target}",
            *([f"--known={known}"] if known else []),
        ]
        assert evaluate([*words, *flags]) == 0
        row = Row.from_dict(json.loads(out.read_text()))
        assert row.clips == scored[protocol][number]
        assert all(0 <= value <= 1 for value in (row.score, row.same_modality, row.chance))
        assert row.score == row.metrics["hos" if protocol == "held_out" else "h"].value
        assert row.metrics["acc_in"].value <= row.metrics["acc_in_ceiling"].value <= 1
        assert row.token is not None
