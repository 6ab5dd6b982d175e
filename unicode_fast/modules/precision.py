"""Precision of products, by the field `precision`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from unicode_fast.config import TrainConfig


def autocast_context(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """A context with matrix products, convolutions and LSTMs in bfloat16 if `precision` is "bfloat16".

    Their results may be bfloat16 too. A float64 model stays float64.
    """
    lower = config.precision == "bfloat16" and config.dtype == "float32"
    return torch.autocast(device.type, torch.bfloat16) if lower else nullcontext()


@contextmanager
def float32_precision(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """A context with float32 products on CUDA in full float32 if `precision` is "float32", else in TF32.

    With "bfloat16" these are the products outside of `autocast_context`, which are those of losses. torch's default is
    TF32 in convolutions and LSTMs, float32 elsewhere; the context restores it.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, onednn.matmul)
    before = [backend.fp32_precision for backend in backends]
    _switch(backends, ["ieee" if config.precision == "float32" else "tf32"] * len(backends))
    try:
        yield
    finally:
        _switch(backends, before)


def _switch(backends: Sequence[Any], values: Sequence[str]) -> None:
    """Sets the precision of products, convolutions and LSTMs on CUDA, and of oneDNN's products.

    torch's older switches come first. Inductor reads them, and reading them fails if one of the newer switches,
    oneDNN's included, contradicts them.
    """
    cuda, convolutions, _, onednn = values
    torch.set_float32_matmul_precision("highest" if cuda != "tf32" else "medium" if onednn == "bf16" else "high")
    torch.backends.cudnn.allow_tf32 = convolutions == "tf32"
    for backend, value in zip(backends, values, strict=True):
        backend.fp32_precision = value
