"""The Cross-CPC loss with its gradient: `python benchmarks/contrast.py ours "torch eager"`.

It prints a line of JSON for each size and contender. `bench_contrast.py` calls it.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable

import torch
from contenders import Contender, captured, milliseconds
from measurement import origin, times_of
from memory import peak_bytes
from shapes import CONTRAST_CASES, CONTRAST_SHAPES, ContrastShape
from torch import Tensor

from unicode_fast import cross_info_nce

# Precision of float32 products, and dtype of the vectors.
PRECISIONS = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
}
# Scores of standard normal vectors of width 256 are then of order one.
TEMPERATURE = 16.0
# Longest estimated time of a call, and the estimate's products per second, which are rather low.
LONGEST_SECONDS = 20.0
PRODUCTS_A_SECOND = {"cpu": 2.5e10, "cuda": 2.5e13}
Loss = Callable[[Tensor, Tensor], Tensor]


def weights(targets: Tensor) -> Tensor:
    """Equal weights of all pairs."""
    return torch.ones(targets.shape[0], targets.shape[0], device=targets.device)


def ours(targets: Tensor, predictions: Tensor, backend: str | None = None, softmax_over: str = "predictions") -> Tensor:
    options = {"temperature": TEMPERATURE, "backend": backend, "softmax_over": softmax_over}
    return cross_info_nce(targets, predictions, weights(targets), **options).loss


def eager(targets: Tensor, predictions: Tensor) -> Tensor:
    """All scores at once: (target, source, K, B, B)."""
    scores = (targets[:, None] @ predictions[None].transpose(3, 4)).float() / TEMPERATURE
    return -scores.log_softmax(4).diagonal(dim1=3, dim2=4).mean((2, 3)).sum()


def pair_by_pair(one_pair: Loss) -> Loss:
    """The loss of all pairs and prediction steps from a function of one of them: (B, D) and (B, D)."""

    def loss(targets: Tensor, predictions: Tensor) -> Tensor:
        pairs = [(t, s) for t in targets for s in predictions]
        terms = [one_pair(t[k], s[k]) for t, s in pairs for k in range(len(t))]
        return torch.stack(terms).sum() / targets.shape[1]

    return loss


def linear_cross_entropy(chunked: bool) -> Loss:
    """Torch's own; chunks need memory for some of the scores only."""

    def loss(targets: Tensor, predictions: Tensor) -> Tensor:
        own = torch.arange(len(targets), device=targets.device)
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return torch.nn.functional.linear_cross_entropy(targets / TEMPERATURE, predictions, own, options=options)

    return loss


def inf_cl(targets: Tensor, predictions: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    return cal_flash_loss(targets, predictions, scale=1 / TEMPERATURE).mean()


# In the order of the runs; a time limit may cut off the last ones.
CONTENDERS: dict[str, Contender] = {
    "ours": Contender(lambda: ours),
    "ours in a CUDA graph": Contender(lambda: ours, devices=("cuda",)),
    "torch linear_cross_entropy in chunks": Contender(lambda: pair_by_pair(linear_cross_entropy(chunked=True))),
    "inf-cl": Contender(lambda: pair_by_pair(inf_cl), "inf_cl", ("cuda",)),
    "torch eager": Contender(lambda: eager),
    "torch eager in a CUDA graph": Contender(lambda: eager, devices=("cuda",)),
    "torch eager compiled": Contender(lambda: torch.compile(eager), devices=("cuda",)),
    "torch linear_cross_entropy": Contender(lambda: pair_by_pair(linear_cross_entropy(chunked=False))),
    "reference": Contender(lambda: lambda a, b: ours(a, b, "reference")),
}
# These need memory for all scores, their softmax and its gradient at once, in float32.
WITH_ALL_SCORES = tuple(name for name in CONTENDERS if "eager" in name or name == "torch linear_cross_entropy")


def obstacle(contender: str, shape: ContrastShape, device: str) -> str:
    """The reason why a contender cannot run, or needs too much; empty where it can run."""
    if "linear_cross_entropy" in contender and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none"
    missing = CONTENDERS[contender].obstacle(device)
    if missing:
        return missing
    scores = shape.modalities**2 * shape.steps * shape.clips**2
    needed = 3 * 4 * scores if contender in WITH_ALL_SCORES else 0
    if needed > free_bytes(device) / 2:
        return f"not run: needs {needed / 2**30:.0f} GiB"
    # Scores twice and both gradients.
    seconds = 4 * scores * shape.width / PRODUCTS_A_SECOND[device]
    return f"not run: needs about {seconds:.0f} s a call" if seconds > LONGEST_SECONDS else ""


def free_bytes(device: str) -> int:
    """Free memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def workspace_bytes(shape: ContrastShape) -> dict[str, int]:
    """Memory of our kernels beside inputs and gradients, by name, for more clips than one program processes."""
    scores = shape.modalities**2 * shape.steps * shape.clips
    return {"logsumexps": 4 * scores, "own scores": 4 * scores, "hits": scores}


def with_gradients(loss: Loss, targets: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients in both inputs."""
    leaves = targets.detach().requires_grad_(), predictions.detach().requires_grad_()
    value = loss(*leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves))


@functools.lru_cache(maxsize=1)
def problem(shape: str, precision: str, device: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Targets and predictions, and the loss with its gradients in float64; once for all contenders of a process."""
    torch.manual_seed(0)
    vectors = [torch.randn(CONTRAST_SHAPES[shape], device=device).to(PRECISIONS[precision][1]) for _ in range(2)]
    return vectors, with_gradients(lambda a, b: ours(a, b, "reference"), *(x.double() for x in vectors))


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
    torch.set_float32_matmul_precision(PRECISIONS[precision][0])
    vectors, truth = problem(shape, precision, device)
    loss = CONTENDERS[contender].make()

    def call() -> tuple[Tensor, ...]:
        return with_gradients(loss, *vectors)

    try:
        found = call()
        errors = [error(value, true_value) for value, true_value in zip(found, truth, strict=True)]
        del truth, found
        peak = peak_bytes(call, device)
        timed = captured(call) if "in a CUDA graph" in contender else call
        times = milliseconds(lambda: timed()[0], device)
    except torch.cuda.OutOfMemoryError:
        return {**row, "missing": "not run: needs more memory than there is"}
    return {
        **row,
        **times_of(times),
        "loss_error": errors[0],
        "gradient_error": max(errors[1:]),
        "peak_bytes": peak,
        "gradient_bytes": sum(x.nbytes for x in vectors),
        "workspace_bytes": workspace_bytes(size) if contender == "ours" and device == "cuda" else None,
        **origin(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    for shape, precision in CONTRAST_CASES[arguments.device]:
        for contender in arguments.contender:
            print(json.dumps(measure(contender, shape, precision, arguments.device)), flush=True)
            if arguments.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
