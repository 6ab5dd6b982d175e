"""cross_info_nce of a batch that several processes hold in parts: as one process computes it for the whole batch."""

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
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], softmax_over: str, group: dist.ProcessGroup | None = None
) -> tuple[CrossInfoNCE, list[Tensor]]:
    targets, predictions, weights, valid = inputs
    leaves = [targets.clone().requires_grad_(), predictions.clone().requires_grad_()]
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    options = {"valid": valid, "softmax_over": softmax_over, "temperature": temperature, "group": group}
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
                part = (
                    targets[:, :, own],
                    predictions[:, :, own],
                    weights,
                    None if valid is None else valid[:, :, own],
                )
                found, gradients = compute(part, softmax_over, dist.group.WORLD)
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
def test_parts_are_as_the_whole(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(check_on_rank, (ranks, str(tmp_path)), nprocs=ranks)
