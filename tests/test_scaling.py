"""The arithmetic of docs/scaling.md: its counts are those of the code, its tables those of the script."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

scaling = pytest.importorskip("scaling")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_the_page_shows_what_the_script_prints() -> None:
    page = scaling.PAGE.read_text()
    for name, table in scaling.tables(scaling.count()).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, f"python {scaling.__file__} --write"


def test_a_ring_moves_twice_the_bytes() -> None:
    reached = scaling.number("link_reached")
    assert scaling.all_reduce_seconds(450e9, 2) == pytest.approx(1 / reached)
    assert scaling.all_reduce_seconds(400e9, 64) == pytest.approx(2 * 63 / 64 / reached)


def test_operations_of_a_convolution() -> None:
    """The first convolution over a clip's grids, forward and backward, by hand."""
    parameters, flops = scaling.count_arithmetic()
    first = 3 * 2 * scaling.POSITIONS * 25 * 9 * 512 * 1024
    assert first < flops < 100 * first
    with torch.device("meta"):
        owner = scaling.UniCode(scaling.MODALITIES, scaling.published_config())
    assert parameters == sum(p.numel() for p in owner.parameters()) - sum(p.numel() for p in owner.club.parameters())


def test_what_a_gpu_measured_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    row = {"size": "published", "device": "NVIDIA H200", "clips_per_second": 4940.0}
    steps = [
        {**row, "contender": "recommended, tf32"},
        {**row, "contender": "recommended, bfloat16", "clips_per_second": 1.0},
        {**row, "contender": "recommended, bfloat16, channels last", "clips_per_second": 989.0},
        {**row, "contender": "recommended, tf32", "size": "default", "clips_per_second": 1e9},
        {"contender": "recommended, bfloat16", "size": "published", "missing": "not run"},
    ]
    loaders = [{**row, "feed": "prefetch", "feed_clips_per_second": 1e4}]
    assert scaling.measured(tmp_path, 1e10, 10**6) == {}
    for name, rows in (("train-step-cuda.json", steps), ("loader-cuda.json", loaders)):
        (tmp_path / name).write_text(json.dumps(rows))
    found = scaling.measured(tmp_path, 1e10, 10**6)
    assert {name: item.value for name, item in found.items()} == pytest.approx(
        {"tf32_reached": 0.1, "bfloat16_reached": 0.01, "memory_read": 1e10}
    )
    assert found["bfloat16_reached"].source == "measured, NVIDIA H200, recommended, bfloat16, channels last"
