"""Training on a layout, on a packed store and on a stream gives a run; unusable data are an error."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from layout_files import write_ave, write_avel, write_avvp, write_checked, write_own, write_rows

from unicode_fast import checkpoint
from unicode_fast.data import ClipSet, open_data
from unicode_fast.data.store.write import pack
from unicode_fast.data.stream import write_shards
from unicode_fast.train import main

pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")

SIZES = [
    f"--{name}={value}" for name, value in tiny.SIZES.items() if name not in ("word_width", "vector_specific_width")
]
NO_PROBES = ["--validations=0", "--probe_tasks=none"]
STREAMS = ("audio", "video")


def train(data: str, out: Path, *more: str, steps: int = 20) -> list[dict]:
    """A tiny run; returns the lines of its training losses."""
    flags = ["--data", data, "--out", str(out), "--device=cpu", f"--steps={steps}", "--modalities=audio,video"]
    assert main([*flags, "--batch_size=4", *SIZES, *more]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def losses(lines: list[dict]) -> list[dict]:
    return [line["losses"] for line in lines]


def test_a_layout_trains_as_its_packed_store(tmp_path: Path, spoken: ClipSet) -> None:
    write_checked(tmp_path / "vgg", spoken.select(np.arange(12)), "vggsound81k")
    spec = f"vggsound81k:{tmp_path / 'vgg'}"
    direct = train(spec, tmp_path / "direct", "--train_split=all", *NO_PROBES)
    pack(open_data(spec), tmp_path / "store", shard_bytes=100_000, progress=False)
    packed = train(str(tmp_path / "store"), tmp_path / "packed", "--train_split=all", *NO_PROBES)
    assert losses(direct) == losses(packed) and len(direct) > 0
    assert json.loads((tmp_path / "packed" / "summary.json").read_text())["rows"] == []


def test_clips_without_classes_are_searched(tmp_path: Path, spoken: ClipSet) -> None:
    write_checked(tmp_path / "vgg", spoken, "vggsound81k")
    flags = ["--validations=0", "--probe_tasks=retrieval", "--train_split=all"]
    train(f"vggsound81k:{tmp_path / 'vgg'}", tmp_path / "run", *flags, steps=2)
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["task"], row["from"], row["to"]) for row in rows] == [
        ("retrieval", "audio", "video"),
        ("retrieval", "video", "audio"),
    ]


def test_ave_is_probed(tmp_path: Path, spoken: ClipSet) -> None:
    write_ave(tmp_path / "ave", spoken)
    train(f"ave:{tmp_path / 'ave'}", tmp_path / "run", "--validations=1", "--probe_tasks=classification", steps=2)
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert [(row["from"], row["to"]) for row in rows] == [("audio", "video"), ("video", "audio")]
    assert rows[0]["chance"] == pytest.approx(1 / 28)


def test_classes_that_cannot_be_learned_are_a_note(
    tmp_path: Path, spoken: ClipSet, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "own"
    write_own(root, spoken)
    shutil.rmtree(root / "sound.labels")
    (root / "classes.txt").unlink()
    for before, after in (("sound", "audio"), ("picture", "video")):
        (root / before).rename(root / after)
    table, data = root / "clips.csv", f"clips:{root}"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    write_rows(table, rows[0], [[*{**row, "class": f"{n}.5"}.values()] for n, row in enumerate(rows)])
    flags = ["--validations=1", "--probe_tasks=none"]
    train(data, tmp_path / "run", *flags, steps=2)
    text = capsys.readouterr().err
    assert re.search(r"note: \d+ numbers are the classes of \d+ clips of train: each number is a separate class", text)
    assert re.search(r"note: classes of val without a clip in train: .* cannot be recognised \(\d+\.5, ", text)
    train(data, tmp_path / "unmeasured", *NO_PROBES, steps=2)
    assert "note: " not in capsys.readouterr().err


def test_a_stream_trains_and_resumes(tmp_path: Path, spoken: ClipSet) -> None:
    write_avel(tmp_path / "avel", spoken)
    data = open_data(f"vggsound-avel24k:{tmp_path / 'avel'}", modalities=STREAMS)
    write_shards(data, tmp_path / "shards", 3, progress=False)
    spec = f"webdataset:{tmp_path / 'shards'}"
    whole = train(spec, tmp_path / "whole", "--checkpoint_seconds=0", *NO_PROBES)
    first = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert main(["--resume", str(tmp_path / "whole"), "--resume_step", "19"]) == 0
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == first and len(whole) > 0
    # As from two ranks, which have another order.
    path = checkpoint.find(tmp_path / "whole", "last")
    content = checkpoint.read(path)
    assert content["progress"]["ranks"] == 1
    torch.save({**content, "progress": {**content["progress"], "ranks": 2}}, path)
    with pytest.raises(checkpoint.CheckpointError, match="number of ranks must be 2 as before, .* stream, got 1"):
        main(["--resume", str(tmp_path / "whole"), "--resume_step", str(content["step"])])


def test_what_cannot_be_trained_on(tmp_path: Path, spoken: ClipSet) -> None:
    write_avvp(tmp_path / "avvp", spoken)
    with pytest.raises(ValueError, match=r"'all' of avvp, where audio and video have separate clips"):
        train(f"avvp:{tmp_path / 'avvp'}", tmp_path / "run", "--train_split=all", *NO_PROBES)
    write_checked(tmp_path / "vgg", spoken, "vggsound81k")
    for more, message in (
        ([], "validations and the tasks cl.*n, .* val, test; --validations 0 --probe_tasks none trains without"),
        (["--probe_tasks=none"], "a class for each clip, .*, .* in train, val; --validations 0 trains without"),
        (["--validations=0", "--probe_tasks=classification,retrieval"], "test; --probe_tasks retrieval trains without"),
    ):
        with pytest.raises(ValueError, match=message):
            train(f"vggsound81k:{tmp_path / 'vgg'}", tmp_path / "run", *more)
    with pytest.raises(ValueError, match="train_split must be one of all, train, val, test of .*vgg, got 'tune'"):
        train(f"vggsound81k:{tmp_path / 'vgg'}", tmp_path / "run", "--train_split=tune")
    with pytest.raises(ValueError, match="text_model needs data of a layout with sentences, got data 'talking-digits'"):
        main(["--text_model", "x", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
