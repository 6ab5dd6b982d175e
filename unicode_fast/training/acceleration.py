"""Acceleration of a training step with the same results: memory layout, compiled layers, a CUDA graph."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unicode_fast.config import TrainConfig
from unicode_fast.modules import UniCode
from unicode_fast.modules.wrapped import unwrapped
from unicode_fast.training.metrics_logger import StepResult

# Steps before a capture, in which libraries choose their algorithms and allocate memory.
WARM_UP = 3
# Most compiled versions of a method. With or without graph, with or without mask, one clip or several make eight; the
# others are for sizes that a compiler may distinguish.
VERSIONS = 32
# Options of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
Batch = Mapping[str, Tensor]
Step = Callable[[Batch, Batch | None], StepResult]


def check_acceleration(config: TrainConfig, device: torch.device) -> None:
    """Checks that the device supports the configuration, and that a CUDA graph can capture the step.

    Raises:
        ValueError: `precision` is tf32 or `cuda_graph` is set, and the device is not CUDA; or `cuda_graph` is combined
            with micro-batches or activation checkpointing, which read the state of the generator.
    """
    for name, off in (("micro_batches", 1), ("activation_checkpointing", False)):
        if config.cuda_graph and getattr(config, name) != off:
            raise ValueError(f"cuda_graph needs {name} {off}, got {getattr(config, name)}")
    if device.type == "cuda":
        return
    if config.precision == "tf32":
        raise ValueError(f"precision 'tf32' needs device cuda, got {device}; {device} supports bfloat16 and float32")
    if config.cuda_graph:
        raise ValueError(f"cuda_graph needs device cuda, got {device}")


def accelerate(model: UniCode, config: TrainConfig) -> None:
    """Sets the memory layout of weights and compiles encoders and decoders by the configuration; no value changes."""
    model = unwrapped(model)
    if config.channels_last:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    if config.compile:
        for encoder in model.encoders.values():
            _compile(encoder, "encode_semantic")
            _compile(encoder, "encode_specific")
        for decoder in model.decoders.values():
            _compile(decoder, "forward")


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, which needs as much; does nothing with another libc.

    A step on the CPU otherwise returns pages several times. Their page faults took 5 % of a default step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, size in ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, 1 << 30)):
            libc.mallopt(option, size)


def _compile(module: nn.Module, method: str) -> None:
    """Replaces a method by one that is compiled in training mode, with a dynamic number of clips.

    All other sizes are static. A graph break or too many versions raise an error, where torch would continue without
    compiling: compiled and eager passes of one step would draw different dropout.
    """
    plain = getattr(module, method)
    compiled = torch.compile(_with_own_code(plain), dynamic=False, fullgraph=True)

    @functools.wraps(plain)
    def call(*tensors: Tensor | None) -> Any:
        if not module.training:
            return plain(*tensors)
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            with torch._dynamo.config.patch(recompile_limit=VERSIONS):
                return compiled(*tensors)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cause = f"{type(error.inner_exception).__name__}: {error.inner_exception}"
            raise RuntimeError(f"compile needs a compiler that works, --compile false turns it off: {cause}") from error
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"compile needs more than {VERSIONS} versions of {type(module).__name__}.{method}; "
                "TORCH_LOGS=recompiles prints the reasons, --compile false turns it off"
            ) from error

    setattr(module, method, call)


def _with_own_code(method: MethodType) -> MethodType:
    """The method with a copy of its code object, because torch counts compiled versions by code object."""
    shared = method.__func__
    own = FunctionType(
        shared.__code__.replace(), shared.__globals__, shared.__name__, shared.__defaults__, shared.__closure__
    )
    return MethodType(own, method.__self__)


class _Captured(NamedTuple):
    """A CUDA graph, its input tensors, and its results."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: StepResult


class GraphedStep:
    """A training step that is captured as a CUDA graph for each shape of batch, and replayed.

    Warm-up steps are undone: parameters, buffers, optimiser state and the CUDA generator are restored. The next call
    overwrites the tensors of a result.

    Args:
        step: the step. It must not synchronise with the device, and draws from torch's generator or by counters.
        model: the step changes its parameters and buffers.
        optimizers: the step changes their state. They are capturable, and their moments start at zero.
    """

    def __init__(self, step: Step, model: UniCode, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.step, self.model, self.optimizers = step, model, optimizers
        self.captured: dict[Any, _Captured] = {}

    def __call__(self, features: Batch, mask: Batch | None) -> StepResult:
        """The result of the step on this batch."""
        given = [*features.values(), *(mask or {}).values()]
        key = (mask is None, *((tensor.shape, tensor.dtype) for tensor in given))
        if key not in self.captured:
            self.captured[key] = self._capture(features, mask)
        graph, inputs, result = self.captured[key]
        for kept, tensor in zip(inputs, given, strict=True):
            kept.copy_(tensor, non_blocking=True)
        graph.replay()
        return result

    def _capture(self, features: Batch, mask: Batch | None) -> _Captured:
        kept = {name: tensor.clone() for name, tensor in features.items()}
        kept_mask = None if mask is None else {name: tensor.clone() for name, tensor in mask.items()}
        device = self.model.device
        draws = torch.cuda.get_rng_state(device)
        before = {tensor: tensor.detach().clone() for tensor in self._state()}
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.step(kept, kept_mask)
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.no_grad():
            for tensor in self._state():
                tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.step(kept, kept_mask)
        torch.cuda.set_rng_state(draws, device)
        return _Captured(graph, [*kept.values(), *(kept_mask or {}).values()], result)

    def _state(self) -> Iterator[Tensor]:
        """All tensors that a step changes; the first step creates those of the optimisers."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for optimizer in self.optimizers:
            for moments in optimizer.state.values():
                yield from (value for value in moments.values() if isinstance(value, Tensor))
