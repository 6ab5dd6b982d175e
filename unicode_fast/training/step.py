"""The gradient of a batch: its clips are encoded in pieces and compared as a whole, and each piece takes its part back.

Pieces are the micro-batches of each rank; a plain step has one, whose graph is kept. The features of all pieces are
gathered, so every rank computes the losses of the whole batch. Each piece goes on with the gradient of its own clips,
and with its own reconstruction. Nothing is approximated.

Source:
    Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    RepL4NLP 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unicode_fast.methods import Losses, UniCodeMethod
from unicode_fast.modules import ModelOutput, UniCode
from unicode_fast.modules.codebook import straight_through
from unicode_fast.training.shard import Shard


class MicroBatch(NamedTuple):
    """Some clips of a batch, one after the other."""

    clips: slice
    features: dict[str, Tensor]
    mask: dict[str, Tensor] | None


def micro_batches(features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None, number: int) -> list[MicroBatch]:
    """A batch in so many pieces, equal but for one clip; in fewer where it has not that many clips."""
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


class Piece:
    """A micro-batch and its features.

    A piece whose graph is kept goes back through it once, in the end. Another one is encoded again with a graph, with
    the same dropout: its specific half for the reconstruction, its semantic half in the end.

    Args:
        model: that encodes.
        batch: the clips.
        kept: whether the graph is kept.
    """

    def __init__(self, model: UniCode, batch: MicroBatch, kept: bool) -> None:
        model.check(batch.features, batch.mask)
        self.model, self.batch, self.kept = model, batch, kept
        self.random = None if kept else _random_state(model.device)
        with torch.set_grad_enabled(kept):
            encoded = [model.encode_features(name, *self._input(name)) for name in model.names]
        self.semantic = [z for z, _ in encoded]
        self.club = [own.club for _, own in encoded]
        self.specific = [own for _, own in encoded] if kept else []
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def tensors(self) -> list[Tensor]:
        """What the whole batch is made of: z, features as CLUB sees them, words for the lexicon, masks."""
        features, mask = self.batch.features, self.batch.mask
        words = self.model.words(features, mask)
        masks = [] if mask is None else [mask[name] for name in self.model.names]
        return [*self.semantic, *self.club, *words.values(), *masks]

    def reconstruct(
        self, method: UniCodeMethod, whole: ModelOutput, clips: slice, steps: Tensor, club: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """Decodes, and goes back to decoders and specific encoders.

        Args:
            method: of the model.
            whole: the batch.
            clips: where those of this piece stand in it.
            steps: valid ones of the batch by modality.
            club: gradient in the batch's features as CLUB sees them, by modality; None where there is none.

        Returns:
            Share of the reconstruction terms, (modalities,), and their gradient in z after its normalisation.
        """
        output = ModelOutput(self.batch.mask)
        vectors, passed = [], []
        for number, name in enumerate(self.model.names):
            own = self.specific[number] if self.kept else self.model.encode_specific(name, *self._input(name))
            specific, target = (_leaf(tensor) for tensor in (own.specific, own.target))
            passed += [(own.specific, specific), (own.target, target)]
            if (gradient := club[number]) is not None:
                self.waiting.append((own.club, gradient[clips]))
            vectors.append(whole.semantic[name][clips].detach().requires_grad_())
            quantised = straight_through(vectors[-1], whole.codeword[name][clips])
            output.index[name] = whole.index[name][clips]
            output.decoded[name], output.target[name] = self.model.decode(name, quantised, specific), target
        shares = dict(zip(self.model.names, method.valid_steps(output) / steps, strict=True))
        terms = torch.stack(list(method.reconstruction(output, shares).values()))
        terms.sum().backward()
        self.waiting += [(tensor, leaf.grad) for tensor, leaf in passed if leaf.grad is not None]
        if not self.kept:
            self._go_back()
        return terms.detach(), [_gradient(vector) for vector in vectors]

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Goes back to the semantic encoders from the gradient in z before its normalisation."""
        semantic = self.semantic
        if self.random is not None:
            _set_random_state(self.random, self.model.device)
            semantic = [self.model.encode_semantic(name, *self._input(name)) for name in self.model.names]
        self.waiting += zip(semantic, gradients, strict=True)
        self._go_back()

    def _go_back(self) -> None:
        outputs, gradients = zip(*self.waiting, strict=True)
        torch.autograd.backward(outputs, gradients)
        self.waiting = []

    def _input(self, name: str) -> tuple[Tensor, Tensor | None]:
        mask = self.batch.mask
        return self.batch.features[name], None if mask is None else mask[name]


def backward(
    method: UniCodeMethod,
    club_optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    shard: Shard | None = None,
) -> tuple[ModelOutput, Losses]:
    """CLUB's inner steps, the losses of the whole batch, and their gradient in the parameters of the main optimiser.

    Args:
        method: of the model.
        club_optimizer: of its CLUB networks.
        batches: of `micro_batches`, the clips of this rank.
        shard: which clips of the batch these are, where ranks share it.

    Returns:
        The output for the whole batch, nothing of it decoded, and its losses, without gradient.
    """
    model = method.model
    pieces = [Piece(model, batch, kept=len(batches) == 1) for batch in batches]
    joined = [torch.cat(parts).detach() for parts in zip(*(piece.tensors() for piece in pieces), strict=True)]
    whole, raw, normalised = _whole(model, joined if shard is None else shard.gather(joined), pieces[0])

    method.fit_club(whole, club_optimizer, None if shard is None else shard.average_gradients)
    own = slice(None) if shard is None else shard.own
    found, recognised = method.alignment(whole, rows=own)
    torch.stack(list(found.values())).sum().backward(
        inputs=[*whole.semantic.values(), *whole.club.values(), *model.cpc.parameters(), *model.lexicon.parameters()]
    )

    gradients = [_gradient(z) for z in whole.semantic.values()]
    # Every rank has the same share of the gradient in all of these.
    club = [None if y.grad is None else y.grad / method.share(whole, own) for y in whole.club.values()]
    errors, steps, first = [], method.valid_steps(whole), own.start or 0
    places = [slice(first + batch.clips.start, first + batch.clips.stop) for batch in batches]
    for piece, clips in zip(pieces, places, strict=True):
        error, more = piece.reconstruct(method, whole, clips, steps, club)
        errors.append(error)
        for gradient, added in zip(gradients, more, strict=True):
            gradient[clips] += added
    if shard is not None:
        shard.all_reduce_sum(gradients)
    if model.norms:
        # By way of the moments each clip has a gradient in all others.
        gradients = list(torch.autograd.grad(normalised, raw, gradients))
    for piece, clips in zip(pieces, places, strict=True):
        piece.backward([gradient[clips] for gradient in gradients])

    names = [f"reconstruction.{name}" for name in model.names]
    found = {**dict(zip(names, torch.stack(errors).sum(0), strict=True)), **found}
    found = {name: term.detach() for name, term in found.items()}
    if shard is not None:
        parameters = [parameter for group in model.parameter_groups().values() for parameter in group]
        summed = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shard.all_reduce_sum([*summed, *found.values(), *recognised.values()])
    return whole, Losses(torch.stack(list(found.values())).sum(), found, recognised)


def _whole(model: UniCode, tensors: Sequence[Tensor], like: Piece) -> tuple[ModelOutput, list[Tensor], list[Tensor]]:
    """The output for all clips, whose features are leaves of the graph; z before its normalisation, and after it."""
    given = iter(tensors)
    raw, club = ({name: next(given).requires_grad_() for name in model.names} for _ in range(2))
    words = {name: next(given) for name in model.lexicon}
    mask = None if like.batch.mask is None else {name: next(given) for name in model.names}
    output = ModelOutput(mask, club=club, words=words)
    normalised = {name: model.normalise(name, z, output) for name, z in raw.items()}
    output.semantic.update({name: z.detach().requires_grad_() for name, z in normalised.items()})
    model.quantise(output)
    return output, list(raw.values()), list(normalised.values())


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


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
