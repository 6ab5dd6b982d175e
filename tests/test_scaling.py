"""The arithmetic of docs/scaling.md: its counts are those of the code, its tables those of the script."""

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
    first = 3 * 2 * scaling.STEPS * 25 * 9 * 512 * 1024
    assert first < flops < 100 * first
    with torch.device("meta"):
        owner = scaling.UniCode(scaling.MODALITIES, scaling.published_config())
    assert parameters == sum(p.numel() for p in owner.parameters()) - sum(p.numel() for p in owner.club.parameters())
