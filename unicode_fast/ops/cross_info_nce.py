"""The operator for the contrastive loss over all pairs of modalities and prediction steps; differentiable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from unicode_fast.ops import _checks, _library, _sharded
from unicode_fast.reference.cross_info_nce import (
    CrossInfoNCEInputs,
    cross_info_nce_backward_reference,
    cross_info_nce_reference,
    cross_info_nce_with_gradient_reference,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SOFTMAX_OVER = ("predictions", "candidates", "both")


class CrossInfoNCE(NamedTuple):
    """Results of `cross_info_nce`.

    Attributes:
        loss: ().
        pair_loss: (target, source, K), without gradient; () for two sets of vectors.
        hits: int64, in the shape of `pair_loss`.
    """

    loss: Tensor
    pair_loss: Tensor
    hits: Tensor


def cross_info_nce(  # noqa: PLR0913 - three tensors and five independent switches; a record would only hide them
    targets: Tensor,
    predictions: Tensor,
    pair_weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    softmax_over: str = "predictions",
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    rows: slice = slice(None),
    backend: str | None = None,
) -> CrossInfoNCE:
    """Contrastive loss of every pair of modalities at every prediction step, with the batch's clips as negatives.

    The score of target t, source s and prediction step k is targets[t, k] @ predictions[s, k]^T / temperature. The loss
    of a pair is the mean over steps of the mean over clips of -log softmax at the diagonal. The result is the weighted
    sum over pairs. A score counts if both of its vectors are valid. A clip counts if both of its own vectors are valid,
    a step if it has such a clip.

    Rows i of two sets of vectors, (B, D) each, belong together; the sets are one pair of weight 1. With both softmaxes
    and a temperature this is the loss of CLIP::

        images, texts = torch.nn.functional.normalize(torch.randn(2, 8, 64), dim=-1)
        loss = unicode_fast.cross_info_nce(images, texts, softmax_over="both", temperature=0.07).loss

    Args:
        targets: (modalities, K, B, D) or (B, D), all but B at least 1; float64, float32, float16 or bfloat16.
        predictions: in the shape and dtype of `targets`, on its device. Under autocast the dtypes may differ.
        pair_weights: (target, source), floating point, on the device of `targets`; without gradient. A pair of
            weight 0 adds nothing to the loss. None for weights of 1, and for (B, D).
        valid: (modalities, K, B) bool, or (B) for (B, D), the vectors that count in both inputs; None for all. The
            others may hold anything, NaN included.
        softmax_over: "predictions" for a softmax over the predictions of the batch, "candidates" for one over its
            targets, "both" for the mean of the two losses.
        temperature: a number greater than 0, and normal, in the dtype of the result, or a () tensor on the device of
            `targets`, with gradient; the value of a tensor is not checked.
        group: processes of torch.distributed with one shard of the batch each, of any size, in order. Each must call
            this function, with the same arguments except for B.
        rows: consecutive clips whose share of the loss is computed, each contrasted with all B. The results of several
            calls add up to those of the batch if their rows make up the batch. Not with `group`.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Returns:
        loss: (); pair_loss: (target, source, K), () for (B, D), mean over the clips that count, 0 where none does;
        hits: int64 in the shape of pair_loss, the clips whose score with themselves is the first largest along the
        softmax ("both": along predictions). Floats are float64 for float64 inputs, else float32. Only `loss` is
        differentiable, once, in `targets`, `predictions` and a tensor `temperature`.

        With a group all processes get the results of the whole batch. Each gets the gradients of its loss in its own
        vectors, and a share of the gradient in `temperature`. So the gradients of shared parameters add up over
        processes to that of the whole batch. Where they are averaged, as in DistributedDataParallel, multiply the loss
        by the number of processes.

    Raises:
        TypeError: a dtype is unsupported, the dtypes of targets and predictions differ outside autocast, or `group` is
            no ProcessGroup.
        ValueError: shapes or devices differ, `softmax_over` is unknown, or the temperature is out of range. Or
            `pair_weights` requires a gradient, or `rows` has another step than 1, its bounds are not in order or not
            within the clips, or it leaves out clips of a group.
        BackendUnavailable: `backend` cannot run here; the message has the reason.

    Precision:
        Float64 for float64 inputs, else float32; products of float32 follow torch.set_float32_matmul_precision().
        Autocast works as for torch's own losses: vectors of two dtypes are computed in the wider one, float32 at least,
        and nothing else changes. In the gradient Triton rounds the factors of half-precision vectors to their dtype,
        once; all sums are in float32, in a fixed order.

    Memory:
        Never a B x B matrix. C++ holds at most max(2^19, modalities B D) scores, and one number for each softmax,
        pair, step and clip; where inputs are masked, strided, in half precision or of several steps, also the vectors
        of one step. The reference holds a few times max(2^19, modalities^2 K B) scores and copies of the inputs. On a
        CPU the gradients are held from the loss on. Triton holds one float32 number for each softmax, pair, step and
        clip. Beyond 128 clips it needs one more and a byte during the computation, and with "both" up to 512 more. A
        mask, a D that is no multiple of 128, and strided inputs cost a copy of the inputs. A group adds the vectors
        of the whole batch, on each process.

    Backends:
        Triton computes float32 and half precision on NVIDIA GPUs of compute capability 8.0 and newer; C++ computes all
        dtypes on a CPU; the reference computes anything else. In Triton the loss of up to 128 clips is one kernel, its
        gradient another. On a CPU one pass over the scores gives both where a gradient is needed. With a group the
        CPU waits for the sizes of the shards, and torch.compile breaks its graph.

    Synchronisation:
        On a GPU no call without a group waits for the device, except for two. Triton's loss of up to 128 clips and its
        gradient need a counter on the device. The first call on a device that is not captured makes 64 counters for
        CUDA graphs, and the CPU waits for its stream. So does the first such call after graphs have taken all 64. The
        first call on a stream makes the counter of that stream, without a wait.

        A call during the capture of a graph never waits. Each captured kernel takes a counter, which it keeps until the
        process ends. If none is left, or no call came before the capture, each replay clears one first: an operation
        more for each kernel. So call the loss and its gradient once before a capture.

    Source:
        Xia et al., NeurIPS 2023, Eq. 6 ("candidates") and its released code ("predictions"); for two sets of vectors
        with "both": Radford et al., ICML 2021.
    """
    targets, predictions = _in_one_dtype(targets, predictions)
    _check(targets, predictions, pair_weights, valid)
    if targets.dim() == 2:
        result = cross_info_nce(
            targets[None, None],
            predictions[None, None],
            valid=None if valid is None else valid[None, None],
            softmax_over=softmax_over,
            temperature=temperature,
            group=group,
            rows=rows,
            backend=backend,
        )
        return CrossInfoNCE(result.loss, result.pair_loss.view(()), result.hits.view(()))
    if pair_weights is None:
        pair_weights = torch.ones(len(targets), len(targets), device=targets.device)
    _checks.check_choice("softmax_over", softmax_over, SOFTMAX_OVER)
    _checks.check_group(group)
    clips = range(targets.shape[2])
    own = _checked_rows(rows, clips, whole=group is not None)
    if isinstance(temperature, Tensor):
        _checks.check_tensor("temperature", temperature, _checks.FEATURE_DTYPES)
        _checks.check_like("temperature", temperature, (), "without dimensions", targets, "targets")
    else:
        dtype = torch.promote_types(targets.dtype, torch.float32)
        _checks.check_temperature(temperature, dtype)
        temperature = torch.full((), temperature, dtype=dtype, device=targets.device)
    leaves = targets, predictions, temperature
    # On a CPU the gradient is computed with the loss, because the products of its scores take most of the time.
    at_once = targets.is_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    called = "cross_info_nce_with_gradient" if at_once else None
    operator = _library.find_operator("cross_info_nce", targets.device, backend, called)
    settings = (pair_weights, valid, temperature, softmax_over)
    if group is not None:
        return _of_group(operator, targets, predictions, settings, group)
    if len(own) == len(clips):
        return CrossInfoNCE(*operator(targets, predictions, *settings, 0)[:3])
    own_targets, own_predictions = targets[:, :, rows], predictions[:, :, rows]
    return _share(operator, (own_targets, targets), (own_predictions, predictions), settings, own.start)


def _checked_rows(rows: Any, clips: range, *, whole: bool) -> range:
    """The clips of a slice; `whole` refuses a slice without some of them."""
    try:
        own = clips[rows] if isinstance(rows, slice) else None
    except (TypeError, ValueError):
        own = None
    if own is not None and own.step == 1 and own.start <= own.stop and (own == clips or not whole):
        if all(bound is None or -len(clips) <= bound <= len(clips) for bound in (rows.start, rows.stop)):
            return own
    raise ValueError(
        "rows must be a slice of step 1 and of all clips with a group, start and stop in order and within the "
        f"{len(clips)} clips, got {rows!r}"
    )


def _share(
    operator: Any,
    targets: tuple[Tensor, Tensor],
    predictions: tuple[Tensor, Tensor],
    settings: tuple[Tensor, Tensor | None, Tensor, str],
    offset: int,
) -> CrossInfoNCE:
    """The results' share of some clips, from their vectors and those of all clips."""
    *tensors, softmax_over = settings
    shares = []
    for direction in ("predictions", "candidates") if softmax_over == "both" else (softmax_over,):
        # Queries are own clips, keys those of the whole batch.
        own, every = (0, 1) if direction == "predictions" else (1, 0)
        shares.append(operator(targets[own], predictions[every], *tensors, direction, offset))
    losses, pair_losses, hits, *_ = zip(*shares, strict=True)
    return CrossInfoNCE(torch.stack(losses).mean(0), torch.stack(pair_losses).mean(0), hits[0])


def _of_group(
    operator: Any,
    targets: Tensor,
    predictions: Tensor,
    settings: tuple[Tensor, Tensor | None, Tensor, str],
    group: ProcessGroup,
) -> CrossInfoNCE:
    """The results of the whole batch; this process computes its share."""
    weights, valid, temperature, softmax_over = settings
    shard = _sharded.find_shard(targets.shape[2], targets.device, group)
    if valid is not None:
        valid = _sharded.gather(valid.to(torch.uint8), shard, 2).bool()
    every = {
        direction: _sharded.gather(vectors, shard, 2)
        for direction, vectors in (("predictions", predictions), ("candidates", targets))
        if softmax_over in (direction, "both")
    }
    share = _share(
        operator,
        (targets, every.get("candidates", targets)),
        (predictions, every.get("predictions", predictions)),
        (weights, valid, temperature, softmax_over),
        shard.offset,
    )
    return CrossInfoNCE(*(_sharded.all_reduce_sum(value, shard) for value in share))


def _in_one_dtype(targets: Any, predictions: Any) -> tuple[Any, Any]:
    """Targets and predictions; under autocast in the wider of their dtypes, as in torch's own losses."""
    vectors = targets, predictions
    if not all(isinstance(x, Tensor) and x.dtype in _checks.FEATURE_DTYPES for x in vectors):
        return vectors
    if targets.dtype == predictions.dtype or not torch.is_autocast_enabled(targets.device.type):
        return vectors
    dtype = torch.promote_types(torch.promote_types(targets.dtype, predictions.dtype), torch.float32)
    return targets.to(dtype), predictions.to(dtype)


def _check(targets: Any, predictions: Any, pair_weights: Any, valid: Any) -> None:
    _checks.check_tensor("targets", targets, _checks.FEATURE_DTYPES)
    _checks.check_tensor("predictions", predictions, (targets.dtype,))
    if targets.dim() not in (2, 4) or 0 in (*targets.shape[:-2], targets.shape[-1]):
        raise ValueError(
            f"targets must have shape (modalities, K, B, D) or (B, D), all but B at least 1, got {tuple(targets.shape)}"
        )
    _checks.check_like("predictions", predictions, targets.shape, "that of targets", targets, "targets")
    if pair_weights is not None:
        _checks.check_tensor("pair_weights", pair_weights, _checks.FEATURE_DTYPES)
        if targets.dim() == 2:
            raise ValueError("pair_weights must be None for targets of shape (B, D), which are one pair, got a tensor")
        shape = (len(targets), len(targets))
        _checks.check_like("pair_weights", pair_weights, shape, "(target, source)", targets, "targets")
        if pair_weights.requires_grad:
            raise ValueError("pair_weights must have requires_grad=False, as they get no gradient, got True")
    if valid is not None:
        _checks.check_tensor("valid", valid, (torch.bool,))
        meaning = "(B) of targets" if targets.dim() == 2 else "(modalities, K, B) of targets"
        _checks.check_like("valid", valid, targets.shape[:-1], meaning, targets, "targets")


def _check_arguments(*arguments: Any) -> None:
    """As `_check`, for queries that may be some of the clips of the keys."""
    inputs = CrossInfoNCEInputs(*arguments)
    targets, predictions, offset = inputs.targets, inputs.predictions, inputs.offset
    _checks.check_choice("softmax_over", inputs.softmax_over, SOFTMAX_OVER)
    for name, vectors in (("targets", targets), ("predictions", predictions)):
        _checks.check_tensor(name, vectors, _checks.FEATURE_DTYPES if name == "targets" else (targets.dtype,))
        if vectors.dim() != 4 or 0 in (*vectors.shape[:2], vectors.shape[3]):
            raise ValueError(
                f"{name} must have shape (modalities, K, B, D), all but B at least 1, got {tuple(vectors.shape)}"
            )
    modalities, steps, _, width = targets.shape
    shape = (modalities, steps, predictions.shape[2], width)
    _checks.check_like("predictions", predictions, shape, "that of targets but for B", targets, "targets")
    queries, keys = (vectors.shape[2] for vectors in inputs.queries_and_keys())
    if not 0 <= offset <= keys - queries or (inputs.softmax_over == "both" and queries != keys):
        raise ValueError(
            f"offset must be the position of {queries} clips among {keys}, of all with softmax_over 'both', got "
            f"{offset} with {inputs.softmax_over!r}"
        )
    for name, value, dtypes, size in (
        ("pair_weights", inputs.pair_weights, _checks.FEATURE_DTYPES, (modalities, modalities)),
        ("temperature", inputs.temperature, _checks.FEATURE_DTYPES, ()),
        ("valid", inputs.valid, (torch.bool,), (modalities, steps, keys)),
    ):
        if value is not None or name != "valid":
            _checks.check_tensor(name, value, dtypes)
            _checks.check_like(name, value, size, "to match targets and predictions", targets, "targets")


def _check_backward(gradient: Any, logsumexp: Any, clip_weights: Any, *arguments: Any) -> None:
    _check_arguments(*arguments)
    inputs = CrossInfoNCEInputs(*arguments)
    modalities, steps, number, _ = inputs.queries_and_keys()[0].shape
    pairs = (modalities, modalities, steps)
    dtype = torch.promote_types(inputs.targets.dtype, torch.float32)
    for name, value, dtypes, shape in (
        ("gradient", gradient, _checks.FEATURE_DTYPES, ()),
        ("logsumexp", logsumexp, (dtype,), (2 if inputs.softmax_over == "both" else 1, *pairs, number)),
        ("clip_weights", clip_weights, (dtype,), pairs),
    ):
        _checks.check_tensor(name, value, dtypes)
        _checks.check_like(name, value, shape, "as in the loss", inputs.targets, "targets")


def _implementation(*inputs: Any) -> tuple[Tensor, ...]:
    return cross_info_nce_reference(CrossInfoNCEInputs(*inputs))


def _backward_implementation(
    gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    return cross_info_nce_backward_reference(gradient, logsumexp, clip_weights, CrossInfoNCEInputs(*inputs))


def _with_gradient(*inputs: Any) -> tuple[Tensor, ...]:
    return cross_info_nce_with_gradient_reference(CrossInfoNCEInputs(*inputs))


def _scaled(gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the loss, the first three tensors, times that in the loss; see `_backward_with_gradient`."""
    return tuple(gradient.to(x.dtype) * x for x in tensors[:3])


def _triton(*inputs: Any) -> tuple[Tensor, ...]:
    # Imported in the first call, because it imports Triton.
    from unicode_fast.kernels.cross_info_nce import cross_info_nce_triton

    return cross_info_nce_triton(CrossInfoNCEInputs(*inputs))


def _backward_triton(gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    from unicode_fast.kernels.cross_info_nce import cross_info_nce_backward_triton

    return cross_info_nce_backward_triton(gradient, logsumexp, clip_weights, CrossInfoNCEInputs(*inputs))


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = CrossInfoNCEInputs(*arguments)
    queries, _ = inputs.queries_and_keys()
    modalities, steps, number, _ = queries.shape
    dtype = torch.promote_types(queries.dtype, torch.float32)
    pairs = (modalities, modalities, steps)
    softmaxes = 2 if inputs.softmax_over == "both" else 1
    return (
        queries.new_empty((), dtype=dtype),
        queries.new_empty(pairs, dtype=dtype),
        queries.new_empty(pairs, dtype=torch.int64),
        queries.new_empty((softmaxes, *pairs, number), dtype=dtype),
        queries.new_empty(pairs, dtype=dtype),
    )


def _fake_backward(gradient: Tensor, logsumexp: Tensor, clip_weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = CrossInfoNCEInputs(*arguments)
    return tuple(x.new_empty(x.shape) for x in (inputs.targets, inputs.predictions, inputs.temperature))


def _fake_with_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = CrossInfoNCEInputs(*arguments)
    return (
        *_fake(*arguments)[:3],
        *(x.new_empty(x.shape) for x in (inputs.targets, inputs.predictions, inputs.temperature)),
    )


def _fake_scaled(gradient: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in tensors[:3])


def _check_scaled(gradient: Any, *tensors: Any) -> None:
    _checks.check_tensor("gradient", gradient, _checks.FEATURE_DTYPES)
    names = ("targets", "predictions", "temperature")
    for name, found, given in zip(names, tensors[:3], tensors[3:], strict=True):
        _checks.check_tensor(name, given, _checks.FEATURE_DTYPES)
        _checks.check_tensor(f"in_{name}", found, (given.dtype,))
        _checks.check_like(f"in_{name}", found, given.shape, f"that of {name}", given, name)
    _checks.check_like("gradient", gradient, (), "as in the loss", tensors[3], "targets")


def _setup_context_with_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    targets, predictions, _, _, temperature, *_ = inputs
    ctx.save_for_backward(*others[2:], targets, predictions, temperature)
    ctx.mark_non_differentiable(*others)


def _backward_with_gradient(ctx: Any, operator: OpOverload, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # The operator takes the inputs too, so that its results depend on them and refuse a second gradient.
    in_targets, in_predictions, in_temperature = operator(gradient, *ctx.saved_tensors)
    return in_targets, in_predictions, None, None, in_temperature, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softmax_over, ctx.offset = inputs
    _, *others = output
    ctx.save_for_backward(*others[2:], *tensors)
    ctx.mark_non_differentiable(*others)


def _backward(ctx: Any, operator: OpOverload, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    in_targets, in_predictions, in_temperature = operator(gradient, *ctx.saved_tensors, ctx.softmax_over, ctx.offset)
    return in_targets, in_predictions, None, None, in_temperature, None, None


_INPUTS = (
    "Tensor targets, Tensor predictions, Tensor pair_weights, Tensor? valid, Tensor temperature, str softmax_over, "
    "SymInt offset"
)
_library.declare(
    "cross_info_nce",
    f"({_INPUTS}) -> (Tensor loss, Tensor pair_loss, Tensor hits, Tensor logsumexp, Tensor clip_weights)",
    _check_arguments,
    _implementation,
    _fake,
)
_library.declare(
    "cross_info_nce_backward",
    f"(Tensor gradient, Tensor logsumexp, Tensor clip_weights, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _check_backward,
    _backward_implementation,
    _fake_backward,
)
_library.declare(
    "cross_info_nce_with_gradient",
    f"({_INPUTS}) -> (Tensor loss, Tensor pair_loss, Tensor hits, Tensor in_targets, Tensor in_predictions, "
    "Tensor in_temperature)",
    _check_arguments,
    _with_gradient,
    _fake_with_gradient,
)
_library.declare(
    "cross_info_nce_with_gradient_backward",
    "(Tensor gradient, Tensor in_targets, Tensor in_predictions, Tensor in_temperature, Tensor targets, "
    "Tensor predictions, Tensor temperature) -> (Tensor, Tensor, Tensor)",
    _check_scaled,
    _scaled,
    _fake_scaled,
)
_library.implement("cross_info_nce", "CUDA", _check_arguments, _triton)
_library.implement("cross_info_nce_backward", "CUDA", _check_backward, _backward_triton)
_library.declare_gradient("cross_info_nce", _backward, _setup_context)
_library.declare_gradient("cross_info_nce_with_gradient", _backward_with_gradient, _setup_context_with_gradient)
_library.refuse_second_gradient("cross_info_nce")
_library.refuse_second_gradient("cross_info_nce", "cross_info_nce_with_gradient")
