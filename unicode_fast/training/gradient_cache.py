"""The gradient of a batch in the memory of a part of it, its contrastive losses over all of it all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unicode_fast.methods import Losses, UniCodeMethod
from unicode_fast.modules import ModelOutput
from unicode_fast.modules.codebook import straight_through
from unicode_fast.ops import sharded
from unicode_fast.ops.sharded import Part


class MicroBatch(NamedTuple):
    """Some clips of a batch, one after the other."""

    clips: slice
    features: dict[str, Tensor]
    mask: dict[str, Tensor] | None


def micro_batches(features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, number: int) -> list[MicroBatch]:
    """A batch in so many parts, equal but for one clip; in fewer where it has not that many clips."""
    clips = len(next(iter(features.values())))
    number = min(number, clips)
    edges = [clips * n // number for n in range(number + 1)]
    return [
        MicroBatch(
            slice(start, end),
            {name: values[start:end] for name, values in features.items()},
            None if mask is None else {name: valid[start:end] for name, valid in mask.items()},
        )
        for start, end in zip(edges[:-1], edges[1:], strict=True)
    ]


def cached_backward(
    method: UniCodeMethod,
    club_optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[MicroBatch],
    part: Part | None = None,
) -> tuple[ModelOutput, Losses]:
    """CLUB's inner steps, the losses of the whole batch, and their gradient added to that of the parameters.

    Each micro-batch is encoded without a graph first, and the features of all are normalised together. The terms that
    compare clips go back to these features. Then each micro-batch is encoded again with a graph: its specific half,
    which is decoded, whose gradient reaches the normalised features too; and, when these gradients have gone back
    through the normalisation, its semantic half, with the same dropout. So the batch is encoded twice, and nothing is
    approximated.

    Args:
        method: of the model.
        club_optimizer: of its CLUB networks.
        parameters: of the main optimiser.
        batches: of `micro_batches`.
        part: which clips of a batch that processes share these are together; None for all of it.

    Returns:
        The output for the whole batch, nothing of it decoded, and its losses, without gradient.

    Source:
        Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        RepL4NLP 2021.
    """
    model = method.model
    states = []
    encoded = []
    with torch.no_grad():
        for batch in batches:
            model.check(batch.features, batch.mask)
            states.append(_random_state(model.device))
            encoded.append(_encode(method, batch))
    output, raw, normalised = _joined(method, encoded, batches, part)
    method.fit_club(output, club_optimizer)
    terms, recognised = method.alignment(output)
    leaves = [*output.semantic.values(), *output.club.values()]
    torch.stack(list(terms.values())).sum().backward(
        inputs=[*leaves, *model.cpc.parameters(), *model.lexicon.parameters()]
    )

    own = method.valid_steps(output)
    whole = own if part is None else sharded.total(own, part)
    errors: dict[str, Tensor] = {}
    gradients = [torch.zeros_like(z) if z.grad is None else z.grad for z in output.semantic.values()]
    for batch in batches:
        for name, error in _backward_specific(method, batch, output, whole, parameters, gradients).items():
            errors[name] = errors[name] + error if name in errors else error
    if model.norms:
        gradients = list(torch.autograd.grad(normalised, raw, gradients))
    for batch, state in zip(batches, states, strict=True):
        _set_random_state(state, model.device)
        semantic = [model.encode_semantic(name, batch.features[name], _of(batch.mask, name)) for name in model.names]
        arriving = [gradient[batch.clips] for gradient in gradients]
        torch.autograd.backward(semantic, arriving, inputs=list(parameters))
    if part is not None:
        errors = dict(zip(errors, sharded.add_up(torch.stack(list(errors.values())), part), strict=True))
    terms = {**errors, **{name: term.detach() for name, term in terms.items()}}
    return output, Losses(torch.stack(list(terms.values())).sum(), terms, recognised)


def _encode(method: UniCodeMethod, batch: MicroBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Semantic features, and specific ones as CLUB sees them, by modality."""
    semantic, club = {}, {}
    for name in method.model.names:
        semantic[name], own = method.model.encode_features(name, batch.features[name], _of(batch.mask, name))
        club[name] = own.club
    return semantic, club


def _joined(
    method: UniCodeMethod,
    encoded: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    batches: Sequence[MicroBatch],
    part: Part | None,
) -> tuple[ModelOutput, list[Tensor], list[Tensor]]:
    """The output for all micro-batches, whose features are leaves of the graph; z by modality, and normalised."""
    raw, club = (
        {name: torch.cat([found[kind][name] for found in encoded]).requires_grad_() for name in method.model.names}
        for kind in (0, 1)
    )
    masks = [batch.mask for batch in batches if batch.mask is not None]
    mask = {name: torch.cat([few[name] for few in masks]) for name in method.model.names} if masks else None
    output = ModelOutput({}, club, {}, {}, {}, {}, {}, mask, part)
    words = [method.model.words(batch.features, batch.mask) for batch in batches]
    output.words.update({name: torch.cat([few[name] for few in words]) for name in method.model.lexicon})
    normalised = {name: method.model.normalise(name, z, output) for name, z in raw.items()}
    output.semantic.update({name: z.detach().requires_grad_() for name, z in normalised.items()})
    for name, found in method.model.codebook.quantise(output.semantic).items():
        output.index[name], output.codeword[name], output.quantised[name] = found
    return output, list(raw.values()), list(normalised.values())


def _backward_specific(  # noqa: PLR0913 - the batch, a part of it, and where its gradient goes
    method: UniCodeMethod,
    batch: MicroBatch,
    whole: ModelOutput,
    steps: Tensor,
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Takes the gradient of a micro-batch to decoders and specific encoders, and adds that of the normalised features.

    Returns its share of the reconstruction terms.
    """
    model = method.model
    output = ModelOutput({}, {}, {}, {}, {}, {}, {}, batch.mask)
    tensors, arriving = [], []
    leaves = {name: z.detach()[batch.clips].requires_grad_() for name, z in whole.semantic.items()}
    for name in model.names:
        own = model.encode_specific(name, batch.features[name], _of(batch.mask, name))
        club = whole.club[name].grad
        if club is not None:
            tensors.append(own.club)
            arriving.append(club[batch.clips])
        output.index[name] = whole.index[name][batch.clips]
        vector = straight_through(leaves[name], whole.codeword[name][batch.clips])
        output.decoded[name], output.target[name] = model.decode(name, vector, own.specific), own.target
    shares = dict(zip(model.names, method.valid_steps(output) / steps, strict=True))
    terms = method.reconstruction(output, shares)
    total = torch.stack(list(terms.values())).sum()
    inputs = [*parameters, *leaves.values()]
    torch.autograd.backward([total, *tensors], [torch.ones_like(total), *arriving], inputs=inputs)
    for gradient, leaf in zip(gradients, leaves.values(), strict=True):
        if leaf.grad is not None:
            gradient[batch.clips] += leaf.grad
    return {name: term.detach() for name, term in terms.items()}


def _of(mask: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    return None if mask is None else mask[name]


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that dropout draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
