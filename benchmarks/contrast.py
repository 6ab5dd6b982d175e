"""The Cross-CPC loss with its gradient by one contender, in a process of its own.

`python benchmarks/contrast.py eager published float32` prints one line of JSON. `bench_contrast.py` calls it.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable

import numpy as np
import torch
from contenders import Contender, milliseconds
from shapes import CONTRAST_SHAPES, ContrastShape
from torch import Tensor

from unicode_fast import cross_info_nce
from unicode_fast.runs import git_commit

# What products of float32 may lose, and the dtype of the vectors.
PRECISIONS = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
}
# Divides scores of standard normal vectors of width 256, which are then of order one.
TEMPERATURE = 16.0
Loss = Callable[[Tensor, Tensor], Tensor]


def weights(targets: Tensor) -> Tensor:
    """All pairs count the same."""
    return torch.ones(targets.shape[0], targets.shape[0], device=targets.device)


def ours(targets: Tensor, predictions: Tensor, backend: str | None = None) -> Tensor:
    return cross_info_nce(targets, predictions, weights(targets), temperature=TEMPERATURE, backend=backend).loss


def eager(targets: Tensor, predictions: Tensor) -> Tensor:
    """All scores at once: (target, source, K, B, B)."""
    scores = (targets[:, None] @ predictions[None].transpose(3, 4)).float() / TEMPERATURE
    return -scores.log_softmax(4).diagonal(dim1=3, dim2=4).mean((2, 3)).sum()


def pair_by_pair(one_pair: Loss) -> Loss:
    """The loss of all pairs and steps by a function that takes one of them: (B, D) and (B, D)."""

    def loss(targets: Tensor, predictions: Tensor) -> Tensor:
        pairs = [(t, s) for t in targets for s in predictions]
        terms = [one_pair(t[k], s[k]) for t, s in pairs for k in range(len(t))]
        return torch.stack(terms).sum() / targets.shape[1]

    return loss


def linear_cross_entropy(targets: Tensor, predictions: Tensor) -> Tensor:
    own = torch.arange(len(targets), device=targets.device)
    return torch.nn.functional.linear_cross_entropy(targets / TEMPERATURE, predictions, own)


def inf_cl(targets: Tensor, predictions: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(targets, predictions, scale=1 / TEMPERATURE).mean()


CONTENDERS: dict[str, Contender] = {
    "ours": Contender(lambda: ours),
    "reference": Contender(lambda: lambda a, b: ours(a, b, "reference")),
    "torch eager": Contender(lambda: eager),
    "torch eager compiled": Contender(lambda: torch.compile(eager), devices=("cuda",)),
    "torch linear_cross_entropy": Contender(lambda: pair_by_pair(linear_cross_entropy)),
    "inf-cl": Contender(lambda: pair_by_pair(inf_cl), "inf_cl", ("cuda",)),
}


def obstacle(contender: str, shape: ContrastShape, device: str) -> str:
    """Why a contender cannot run; empty where it can."""
    if contender == "torch linear_cross_entropy" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none"
    if "eager" in contender and device == "cuda":
        # Scores, their softmax and its gradient, in float32.
        needed = 3 * 4 * shape.modalities**2 * shape.steps * shape.clips**2
        free, _ = torch.cuda.mem_get_info()
        if needed > free / 2:
            return f"not run: needs {needed / 2**30:.0f} GiB"
    return CONTENDERS[contender].obstacle(device)


def with_gradients(loss: Loss, targets: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in both inputs."""
    leaves = targets.detach().requires_grad_(), predictions.detach().requires_grad_()
    value = loss(*leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def error(found: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest number."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def measure(contender: str, shape: str, precision: str, device: str) -> dict[str, object]:
    """One row of the results."""
    size = CONTRAST_SHAPES[shape]
    row: dict[str, object] = {"contender": contender, "shape": shape, "precision": precision, **size._asdict()}
    missing = obstacle(contender, size, device)
    if missing:
        return {**row, "missing": missing}
    setting, dtype = PRECISIONS[precision]
    torch.set_float32_matmul_precision(setting)
    torch.manual_seed(0)
    vectors = [torch.randn(size, device=device).to(dtype) for _ in range(2)]
    truth = with_gradients(lambda a, b: ours(a, b, "reference"), *(x.double() for x in vectors))
    loss = CONTENDERS[contender].make()
    found = with_gradients(loss, *vectors)
    errors = [error(part, true_part) for part, true_part in zip(found, truth, strict=True)]
    del truth, found
    peak = None
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with_gradients(loss, *vectors)
        peak = torch.cuda.max_memory_allocated() - before
    times = milliseconds(lambda: with_gradients(loss, *vectors)[0], device)
    return {
        **row,
        "median_ms": float(np.median(times)),
        "p20_ms": float(np.percentile(times, 20)),
        "p80_ms": float(np.percentile(times, 80)),
        "repeats": len(times),
        "loss_error": errors[0],
        "gradient_error": max(errors[1:]),
        "peak_bytes": peak,
        "gradient_bytes": sum(x.nbytes for x in vectors),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("shape", choices=CONTRAST_SHAPES)
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.contender, arguments.shape, arguments.precision, arguments.device)))


if __name__ == "__main__":
    main()
