"""Times of the operators on the CPU, on every backend that can run them; `pytest benchmarks/`."""

from collections.abc import Callable

import pytest
import torch
from contenders import new_state
from shapes import SHAPES, Shape

from unicode_fast import (
    EmaConfig,
    available_backends,
    codebook_update,
    codeword_distribution,
    commitment_loss,
    cross_info_nce,
    nearest_codeword,
)


def nearest(shape: Shape, backend: str) -> Callable[[], object]:
    features = torch.randn(shape.modalities * shape.clips * shape.positions, shape.width)
    codebook = torch.randn(shape.codewords, shape.width)
    index = nearest_codeword(features, codebook, backend=backend).index
    assert torch.equal(index, (features.double()[:, None] - codebook.double()).square().sum(-1).argmin(1))
    return lambda: nearest_codeword(features, codebook, backend=backend)


def update(shape: Shape, backend: str) -> Callable[[], object]:
    rows = [torch.randn(shape.clips * shape.positions, shape.width) for _ in range(shape.modalities)]
    codebook = torch.randn(shape.codewords, shape.width)
    index = [nearest_codeword(features, codebook).index for features in rows]
    state = new_state(codebook, shape.modalities)
    return lambda: codebook_update(state, rows, index, EmaConfig(), backend=backend)


def distribution(shape: Shape, backend: str) -> Callable[[], object]:
    features = torch.randn(shape.clips, shape.positions, shape.width, requires_grad=True)
    codebook, factors = torch.randn(shape.codewords, shape.width), torch.randn(shape.clips, shape.codewords)
    return lambda: (codeword_distribution(features, codebook, backend=backend) * factors).sum().backward()


def contrast(shape: Shape, backend: str) -> Callable[[], object]:
    size = (shape.modalities, 1, shape.clips, shape.width)
    targets, predictions = torch.randn(size, requires_grad=True), torch.randn(size, requires_grad=True)
    weights = torch.ones(shape.modalities, shape.modalities)
    return lambda: cross_info_nce(targets, predictions, weights, backend=backend).loss.backward()


def commitment(shape: Shape, backend: str) -> Callable[[], object]:
    features = torch.randn(shape.modalities, shape.clips * shape.positions, shape.width, requires_grad=True)
    codebook = torch.randn(shape.codewords, shape.width)
    index = torch.randint(shape.codewords, features.shape[:2])
    weights = torch.full((shape.modalities, shape.modalities), 0.25 / shape.width)
    return lambda: commitment_loss(features, index, codebook, weights, backend=backend).sum().backward()


CASES = {
    "commitment_loss": commitment,
    "nearest_codeword": nearest,
    "codebook_update": update,
    "codeword_distribution": distribution,
    "cross_info_nce": contrast,
}
RUNNABLE = [
    (operator, backend)
    for operator, backends in available_backends("cpu").items()
    for backend, state in backends.items()
    if state == "available"
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operator", "backend"), RUNNABLE)
def bench_operator(benchmark: Callable, operator: str, backend: str, shape: str) -> None:
    torch.manual_seed(0)
    benchmark(CASES[operator](SHAPES[shape], backend))
