"""cross_info_nce of a batch sharded over several processes, against one process with the whole batch."""

from pathlib import Path

import pytest
import tolerances
import torch
import torch.distributed as dist
from cases import generator, normal
from compare import assert_close
from tolerances import EXACT
from torch import Tensor

from unicode_fast.ops import CrossInfoNCE, cross_info_nce

MODALITIES, STEPS, WIDTH = 3, 2, 6
SOFTMAXES = ("predictions", "candidates", "both")
# Clips of each process.
SPLITS = {2: [(4, 4), (7, 2)], 3: [(3, 3, 3), (5, 0, 4)]}


def batch(clips: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    shape = (MODALITIES, STEPS, clips, WIDTH)
    weights = torch.rand(MODALITIES, MODALITIES, generator=generator(5), dtype=torch.float64)
    valid = torch.rand(shape[:3], generator=generator()) < 0.7 if masked else None
    return normal(*shape, dtype=torch.float64), normal(*shape, seed=1, dtype=torch.float64), weights, valid


def compute(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], softmax_over: str, **whose: object
) -> tuple[CrossInfoNCE, list[Tensor]]:
    targets, predictions, weights, valid = inputs
    leaves = [targets.clone().requires_grad_(), predictions.clone().requires_grad_()]
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    options = {"valid": valid, "softmax_over": softmax_over, "temperature": temperature, **whose}
    result = cross_info_nce(*leaves, weights, **options)  # type: ignore[arg-type]
    return result, list(torch.autograd.grad(3 * result.loss, [*leaves, temperature]))


def check_on_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    tolerance = tolerances.cross_info_nce_gradient(50, torch.float64)
    for split in SPLITS[ranks]:
        own = slice(sum(split[:rank]), sum(split[: rank + 1]))
        for softmax_over in SOFTMAXES:
            for masked in (False, True):
                inputs = batch(sum(split), masked)
                expected, truths = compute(inputs, softmax_over)
                targets, predictions, weights, valid = inputs
                shard = (
                    targets[:, :, own],
                    predictions[:, :, own],
                    weights,
                    None if valid is None else valid[:, :, own],
                )
                found, gradients = compute(shard, softmax_over, group=dist.group.WORLD)
                assert_close(found.loss, expected.loss, tolerance, "loss")
                assert_close(found.pair_loss, expected.pair_loss, tolerance, "pair_loss")
                assert_close(found.hits, expected.hits, EXACT, "hits")
                for gradient, truth in zip(gradients[:2], truths[:2], strict=True):
                    assert_close(gradient, truth[:, :, own], tolerance, "gradient")
                dist.all_reduce(gradients[2])
                assert_close(gradients[2], truths[2], tolerance, "sum of gradients in temperature")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("ranks", SPLITS)
def test_shards_are_as_the_whole(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_on_rank, (ranks, str(tmp_path)), nprocs=ranks)


@pytest.mark.parametrize("softmax_over", SOFTMAXES)
@pytest.mark.parametrize("masked", [False, True])
def test_shares_of_rows_add_up(softmax_over: str, masked: bool) -> None:
    """One process has all vectors, and computes the scores of some clips at a time."""
    inputs = batch(9, masked)
    tolerance = tolerances.cross_info_nce_gradient(50, torch.float64)
    expected, truths = compute(inputs, softmax_over)
    shares = [compute(inputs, softmax_over, rows=rows) for rows in (slice(None, 5), slice(5, 5), slice(-4, None))]
    for name in CrossInfoNCE._fields:
        found = torch.stack([getattr(share, name) for share, _ in shares]).sum(0)
        assert_close(found, getattr(expected, name), EXACT if name == "hits" else tolerance, name)
    for truth, *found in zip(truths, *(gradients for _, gradients in shares), strict=True):
        assert_close(torch.stack(found).sum(0), truth, tolerance, "gradient")


@pytest.mark.parametrize(
    "rows",
    [
        slice(0, 4, 2),
        slice(0, 4, 0),
        slice(None, None, -1),
        3,
        slice("a", 3),
        slice(0, 2.0),
        slice(3, 10),
        slice(-10, 3),
        slice(5, 3),
    ],
)
def test_rows_follow_each_other(rows: object) -> None:
    vectors = torch.randn(9, WIDTH)
    with pytest.raises(
        ValueError, match=r"rows must be a slice of step 1 and of all .* within the 9 clips, got (slice|3)"
    ):
        cross_info_nce(vectors, vectors, rows=rows)  # type: ignore[arg-type]
