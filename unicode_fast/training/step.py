"""Losses and gradients of a batch that is encoded in micro-batches, on one rank or several: gradient caching.

Contrastive losses compare all clips of a batch, but memory may not hold the graph of all clips. A training step

1. encodes each micro-batch, without a graph if there are several;
2. gathers the features of all micro-batches and all ranks;
3. computes the losses of the whole batch and their gradients in these features;
4. decodes each micro-batch and adds the gradient of its reconstruction;
5. encodes each micro-batch again with a graph, and continues the backward pass from the gradients of its features.

With one micro-batch, 1 keeps the graph and 5 reuses it. The gradients are those of one graph, to rounding.

Source:
    Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    RepL4NLP 2021.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unicode_fast.methods import Losses, Method
from unicode_fast.modules import ModelOutput, UniCode
from unicode_fast.training.shard import Shard


class MicroBatch(NamedTuple):
    """Consecutive clips of a batch."""

    clips: slice
    features: dict[str, Tensor]
    mask: dict[str, Tensor] | None


def micro_batches(features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, number: int) -> list[MicroBatch]:
    """Splits a batch into micro-batches whose sizes differ by at most one clip; never more of them than clips."""
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


class EncodedMicroBatch:
    """A micro-batch and its features, with the backward passes of its decoders and encoders.

    Args:
        model: encodes and decodes.
        batch: the clips.
        keep_graph: True keeps the graph of the encoders for one backward pass at the end. False encodes again with a
            graph and the same dropout: the specific half to decode, the semantic half at the end.
    """

    def __init__(self, model: UniCode, batch: MicroBatch, keep_graph: bool) -> None:
        model.check(batch.features, batch.mask)
        self.model, self.batch, self.keep_graph = model, batch, keep_graph
        self.random = [] if keep_graph else [generator.get_state() for generator in _generators(model.device)]
        with torch.set_grad_enabled(keep_graph):
            encoded = [model.encode_features(name, *self._input(name)) for name in model.names]
        self.semantic = [z for z, _ in encoded]
        self.club = [own.club for _, own in encoded]
        self.more = [own.more for _, own in encoded]
        observes = model.alignment.observes
        self.observed = [model.observe(name, *self._input(name)) for name in model.names] if observes else []
        self.specific = [own for _, own in encoded] if keep_graph else []
        # Outputs of the encoders with their gradients, for the next backward pass.
        self.pending: list[tuple[Tensor, Tensor]] = []

    def tensors(self) -> list[Tensor]:
        """What the losses of the whole batch read.

        These are z, specific features for CLUB, further features, words for the lexicon, observed features, and masks.
        """
        features, mask = self.batch.features, self.batch.mask
        words = self.model.words(features, mask)
        masks = [] if mask is None else [mask[name] for name in self.model.names]
        more = [tensor for tensors in self.more for tensor in tensors]
        return [*self.semantic, *self.club, *more, *words.values(), *self.observed, *masks]

    def reconstruct(
        self, method: Method, whole: ModelOutput, clips: slice, positions: Tensor, club: Sequence[Tensor | None]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Decodes, and runs the backward pass of the decoders and, unless the graph is kept, the specific encoders.

        Args:
            method: of the model.
            whole: the whole batch.
            clips: the clips of this micro-batch in it.
            positions: number of valid positions of the whole batch, (modalities,), at least 1.
            club: gradient in the specific features for CLUB, (B, T, Y) by modality; None where there is none.

        Returns:
            The terms of these clips that compare no clips, by name, and their gradients in the normalised z, then in
            further features.
        """
        output = ModelOutput(self.batch.mask, clips=clips)
        leaves: list[tuple[Tensor, Tensor]] = []
        for number, name in enumerate(self.model.names):
            own = self.specific[number] if self.keep_graph else self.model.encode_specific(name, *self._input(name))
            output.specific[name], output.target[name], output.club[name] = map(
                _leaf, (own.specific, own.target, own.club)
            )
            leaves += [
                (own.specific, output.specific[name]), (own.target, output.target[name]), (own.club, output.club[name]),
            ]  # fmt: skip
            if (gradient := club[number]) is not None:
                self.pending.append((own.club, gradient[clips]))
            output.semantic[name] = whole.semantic[name][clips].detach().requires_grad_()
            output.more[name] = tuple(tensor[clips].detach().requires_grad_() for tensor in whole.more[name])
            output.index[name], output.codeword[name] = whole.index[name][clips], whole.codeword[name][clips]
        output.quantised.update(self.model.decoder_inputs(output.semantic, whole, clips))
        for name, vector in output.quantised.items():
            output.decoded[name] = self.model.decode_vectors(name, vector, output.specific[name])
        self.model.decode_levels(output, whole)
        shares = dict(zip(self.model.names, method.valid_positions(output) / positions, strict=True))
        terms = method.reconstruction(output, shares)
        torch.stack(list(terms.values())).sum().backward()
        self.pending += [(tensor, leaf.grad) for tensor, leaf in leaves if leaf.grad is not None]
        if not self.keep_graph:
            self._backward_pending()
        read = [*output.semantic.values(), *_flat(output.more)]
        return {name: term.detach() for name, term in terms.items()}, [_gradient(leaf) for leaf in read]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Runs the backward pass of the encoders.

        Args:
            gradients: in z before its normalisation, (b, T, D) by modality, then in further features.
        """
        semantic = self.semantic
        if not self.keep_graph:
            for generator, state in zip(_generators(self.model.device), self.random, strict=True):
                generator.set_state(state)
            semantic = [self.model.encode_semantic(name, *self._input(name)) for name in self.model.names]
        more = [tensor for tensors in self.more for tensor in tensors]
        self.pending += zip([*semantic, *more], gradients, strict=True)
        self._backward_pending()

    def _backward_pending(self) -> None:
        outputs, gradients = zip(*self.pending, strict=True)
        torch.autograd.backward(outputs, gradients)
        self.pending = []

    def _input(self, name: str) -> tuple[Tensor, Tensor | None]:
        mask = self.batch.mask
        return self.batch.features[name], None if mask is None else mask[name]


def backward(
    method: Method,
    club_optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    shard: Shard | None = None,
) -> tuple[ModelOutput, Losses]:
    """CLUB's inner steps, then the losses of the whole batch and the gradients of the main optimiser's parameters.

    Args:
        method: of the model.
        club_optimizer: of its CLUB networks.
        batches: `micro_batches` of the clips of this rank.
        shard: the clips of this rank in the batch; None where one rank holds the whole batch.

    Returns:
        The output for the whole batch, without `decoded` and `target`, and its losses, without gradient.
    """
    model = method.model
    parameters = [parameter for group in model.parameter_groups().values() for parameter in group]
    own = slice(None) if shard is None else shard.own
    # 1. and 2. Features of the whole batch.
    encoded = [EncodedMicroBatch(model, batch, keep_graph=len(batches) == 1) for batch in batches]
    features = [torch.cat(tensors).detach() for tensors in zip(*(micro.tensors() for micro in encoded), strict=True)]
    masked = batches[0].mask is not None
    further = [len(tensors) for tensors in encoded[0].more]
    whole, raw, normalised = _whole_batch(model, features if shard is None else shard.gather(features), further, masked)

    # 3. Losses of the whole batch: each rank has its share of the terms and contrasts its clips with all.
    method.fit_club(whole, club_optimizer, None if shard is None else shard.average_gradients)
    share = method.share(whole, own)
    terms = {name: term if share == 1 else share * term for name, term in method.alignment(whole).items()}
    contrast, recognised = method.contrast(whole, rows=own)
    terms |= contrast
    # Not in the CLUB networks, which have an optimiser of their own.
    torch.stack(list(terms.values())).sum().backward(
        inputs=[*whole.semantic.values(), *whole.club.values(), *_flat(whole.more), *parameters]
    )
    gradients = [_gradient(z) for z in (*whole.semantic.values(), *_flat(whole.more))]
    # Each rank has the gradient of its share of the terms, and decodes with that of the whole.
    club = [None if y.grad is None else y.grad / share for y in whole.club.values()]

    # 4. Reconstruction.
    # A modality that no clip has, has errors of 0.
    positions, first = method.valid_positions(whole).clamp(min=1), own.start or 0
    errors: defaultdict[str, list[Tensor]] = defaultdict(list)
    slices = [slice(first + batch.clips.start, first + batch.clips.stop) for batch in batches]
    for micro, clips in zip(encoded, slices, strict=True):
        error, added = micro.reconstruct(method, whole, clips, positions, club)
        for name, term in error.items():
            errors[name].append(term)
        for gradient, more in zip(gradients, added, strict=True):
            gradient[clips] += more

    # 5. Encoders. The terms of a rank have gradients in the clips of all ranks.
    if shard is not None:
        shard.all_reduce_sum(gradients)
    if model.norms:
        # The moments of the batch connect every clip with all others.
        of_z, others = gradients[: len(raw)], gradients[len(raw) :]
        gradients = [*torch.autograd.grad(normalised, raw, of_z), *others]
    for micro, clips in zip(encoded, slices, strict=True):
        micro.backward([gradient[clips] for gradient in gradients])

    terms = {**{name: torch.stack(parts).sum(0) for name, parts in errors.items()}, **terms}
    terms = {name: term.detach() for name, term in terms.items()}
    if shard is not None:
        summed = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shard.all_reduce_sum([*summed, *terms.values(), *recognised.values()])
    return whole, Losses(torch.stack(list(terms.values())).sum(), terms, recognised)


def _whole_batch(
    model: UniCode, tensors: Sequence[Tensor], more: Sequence[int], masked: bool
) -> tuple[ModelOutput, list[Tensor], list[Tensor]]:
    """The output for all clips, with features as leaves of the graph; z before and after its normalisation."""
    given = iter(tensors)
    raw, club = ({name: next(given).requires_grad_() for name in model.names} for _ in range(2))
    further = {
        name: tuple(next(given).requires_grad_() for _ in range(number))
        for name, number in zip(model.names, more, strict=True)
    }
    words = {name: next(given) for name in model.lexicon}
    observed = {name: next(given) for name in model.names if model.alignment.observes}
    mask = {name: next(given) for name in model.names} if masked else None
    output = ModelOutput(mask, club=club, words=words, more=further, observed=observed)
    normalised = {name: model.normalise(name, z, output) for name, z in raw.items()}
    output.semantic.update({name: z.detach().requires_grad_() for name, z in normalised.items()})
    model.quantise(output)
    return output, list(raw.values()), list(normalised.values())


def _flat(tensors: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for several in tensors.values() for tensor in several]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators that dropout draws from."""
    return [torch.default_generator, *([torch.cuda.default_generators[device.index]] if device.type == "cuda" else [])]
