"""Operators without a peer in another library, on every backend of the CPU; `pytest benchmarks/`.

Rows are kept in results/operators-cpu.json. The search and Cross-CPC have benchmarks beside other libraries.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from contenders import new_state
from measurement import origin, times_of
from shapes import SHAPES, Shape

from unicode_fast import (
    EmaConfig,
    available_backends,
    codebook_update,
    codeword_distribution,
    commitment_loss,
    nearest_codeword,
)


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


def commitment(shape: Shape, backend: str) -> Callable[[], object]:
    features = torch.randn(shape.modalities, shape.clips * shape.positions, shape.width, requires_grad=True)
    codebook = torch.randn(shape.codewords, shape.width)
    index = torch.randint(shape.codewords, features.shape[:2])
    weights = torch.full((shape.modalities, shape.modalities), 0.25 / shape.width)
    return lambda: commitment_loss(features, index, codebook, weights, backend=backend).sum().backward()


ROWS, KEY = "operators", ("operator", "shape", "contender")
CASES = {
    "commitment_loss": commitment,
    "codebook_update": update,
    "codeword_distribution": distribution,
}
RUNNABLE = [
    (operator, backend)
    for operator, backends in available_backends("cpu").items()
    if operator in CASES
    for backend, state in backends.items()
    if state == "available"
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operator", "backend"), RUNNABLE)
def bench_operator(benchmark: Any, keep: Callable[[dict], None], operator: str, backend: str, shape: str) -> None:
    torch.manual_seed(0)
    benchmark(CASES[operator](SHAPES[shape], backend))
    if benchmark.stats is not None:
        times = times_of(1000 * np.array(benchmark.stats.stats.data))
        names = {"operator": operator, "contender": backend, "shape": shape}
        keep({**names, **SHAPES[shape]._asdict(), **times, **origin("cpu")})
