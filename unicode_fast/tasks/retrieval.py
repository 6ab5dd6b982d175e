"""Retrieval between modalities: a head is trained against an anchor and tested on a new modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils import skip_init

from unicode_fast.data import ClipSet
from unicode_fast.tasks.encoded import TEST, TRAIN, VALIDATION, EncodedDataset
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.ranking import DEPTHS, Ranking, equal_rows, rank_by_cosine
from unicode_fast.tasks.probe import ENCODE_BATCH, one_thread, probe_seed
from unicode_fast.tasks.table import Row, check_protocol

NAME = "retrieval"
# Depth K of the reported R@K; the paper prints R@5 and R@10.
DEPTH = 10


@dataclass(frozen=True)
class RetrievalRule:
    """Training rule of a head.

    Attributes:
        steps: of Adam.
        batch_size: pairs that are contrasted with each other.
        learning_rate: of Adam, per step.
        temperature: divisor of the cosines.
        judged_every: training steps between validations, which choose the kept head.
    """

    steps: int = 600
    batch_size: int = 200
    learning_rate: float = 2e-3
    temperature: float = 0.07
    judged_every: int = 50


class RetrievalHead(nn.Module):
    """Two linear projections into one space: of the queries, and of the anchor.

    Args:
        width: of the codewords.
        anchor_width: of the anchor's embedding.
        generator: of the initial weights, uniform as torch's own.
    """

    def __init__(self, width: int, anchor_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.project = skip_init(nn.Linear, width, width)
        self.project_anchor = skip_init(nn.Linear, anchor_width, width)
        with torch.no_grad():
            for layer in (self.project, self.project_anchor):
                for parameter in layer.parameters():
                    parameter.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)

    def forward(self, clips: Tensor, anchors: Tensor) -> Tensor:
        """Cosine similarity (clips, anchors) of embeddings (clips, D) and (anchors, A)."""
        return normalize(self.project(clips)) @ normalize(self.project_anchor(anchors)).T


def symmetric_info_nce(similarity: Tensor, temperature: float) -> Tensor:
    """Mean of InfoNCE in both directions from similarities (B, B), pairs on the diagonal."""
    logits, pairs = similarity / temperature, torch.arange(len(similarity), device=similarity.device)
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


class Retrieval:
    """Retrieval on one data set of paired clips; each head is trained once, on first use.

    Args:
        encoded: the data set and the frozen model.
        seed: of heads and intervals.
        rule: of the heads' training.
    """

    def __init__(self, encoded: EncodedDataset, seed: int = 0, rule: RetrievalRule | None = None) -> None:
        self.encoded, self.seed, self.rule = encoded, seed, rule or RetrievalRule()
        self._embedded: dict[tuple[str, str], np.ndarray] = {}
        self._heads: dict[tuple[str, str], RetrievalHead] = {}

    def anchor_of(self, source: str, target: str) -> str | None:
        """The data set's third modality; None where it has only two, or more than three."""
        others = [name for name in self.encoded.dataset.modalities if name not in (source, target)]
        return others[0] if len(others) == 1 else None

    def embedding(self, split: str, name: str) -> np.ndarray:
        """(clips that have the modality, D) float32: the mean of a clip's codewords over valid positions.

        A modality that the model does not encode, as in the paper's protocol, is embedded by its features. Their mean
        over valid positions is standardised by mean and deviation of the training clips.
        """
        if (split, name) not in self._embedded:
            if name in self.encoded.names:
                codes = self.encoded.codes(split, name)
                self._embedded[split, name] = mean_over_positions(codes.vector.numpy(), codes.mask.numpy())
            else:
                self._embedded[split, name] = self._of_features(split, name)
        return self._embedded[split, name]

    def _of_features(self, split: str, name: str) -> np.ndarray:
        means = []
        for clips in (self.encoded.clips(split, name), self.encoded.clips(TRAIN, name)):
            features, count = clips.features[name], len(clips)
            batches = np.array_split(np.arange(count), -(-count // ENCODE_BATCH))
            flat = [np.asarray(features[batch]).reshape(len(batch), features.shape[1], -1) for batch in batches]
            masks = [np.asarray(clips.mask[name])[batch] for batch in batches]
            means.append(np.concatenate([mean_over_positions(*pair) for pair in zip(flat, masks, strict=True)]))
        deviation = means[1].std(0)
        return (means[0] - means[1].mean(0)) / np.where(deviation > 0, deviation, 1)

    def head(self, source: str, anchor: str) -> RetrievalHead:
        """The head of training pairs; recall on validation pairs of the same modalities chooses the kept step."""
        if (source, anchor) not in self._heads:
            with one_thread():
                self._heads[source, anchor] = self._trained(source, anchor)
        return self._heads[source, anchor]

    def _trained(self, source: str, anchor: str) -> RetrievalHead:
        rule = self.rule
        generator = torch.Generator().manual_seed(probe_seed(self.seed, NAME, source, anchor))
        clips, anchors = (torch.from_numpy(vectors).float() for vectors in self._pairs(TRAIN, source, anchor))
        head = RetrievalHead(clips.shape[1], anchors.shape[1], generator)
        optimizer = torch.optim.Adam(head.parameters(), rule.learning_rate, fused=True)
        best: tuple[float, dict[str, Tensor]] | None = None
        order = torch.empty(0, dtype=torch.int64)
        for step in range(1, rule.steps + 1):
            if len(order) < min(rule.batch_size, len(clips)):
                order = torch.cat([order, torch.randperm(len(clips), generator=generator)])
            chosen, order = order[: rule.batch_size], order[rule.batch_size :]
            optimizer.zero_grad(set_to_none=True)
            symmetric_info_nce(head(clips[chosen], anchors[chosen]), rule.temperature).backward()
            optimizer.step()
            if step % rule.judged_every == 0 or step == rule.steps:
                rankings = both_ways(*self._projected(head, VALIDATION, source, anchor))
                score = float(np.mean([ranking.recall[DEPTH].mean() for ranking in rankings]))
                if best is None or score > best[0]:
                    best = score, {key: value.clone() for key, value in head.state_dict().items()}
        if best is not None:
            head.load_state_dict(best[1])
        return head.requires_grad_(False)

    def vectors(self, source: str, target: str, anchor: str | None, split: str = TEST) -> tuple[np.ndarray, np.ndarray]:
        """(clips, D) queries and (clips, D) gallery of the clips of a split that have both, to compare by cosine.

        Args:
            source: the modality whose head is used.
            target: the queries' modality.
            anchor: the gallery's modality; None compares embeddings of source and target without a head.
            split: of the clips.
        """
        if anchor is None:
            return self._pairs(split, source, target)
        self._check_pairs(split, target, anchor)
        return self._projected(self.head(source, anchor), split, target, anchor)

    @torch.no_grad()
    def _projected(self, head: RetrievalHead, split: str, name: str, anchor: str) -> tuple[np.ndarray, np.ndarray]:
        with one_thread():
            queries, gallery = self._pairs(split, name, anchor)
            return _of_distinct(head.project, queries), _of_distinct(head.project_anchor, gallery)

    def row(self, source: str, target: str, protocol: str = "held_out", anchor: str | None = None) -> Row:
        """One direction with its interval and other metrics.

        Args:
            source: the modality that the head is trained on, against the anchor.
            target: the modality that is tested against the anchor, zero-shot.
            protocol: held_out or official.
            anchor: None takes the data set's third modality. Without a third, embeddings of source and target are
                compared without training.

        Raises:
            ValueError: the anchor is source or target or unknown, or clips are not paired.
        """
        protocol = check_protocol(protocol)
        anchor = self.anchor_of(source, target) if anchor is None else anchor
        if anchor is not None and (anchor in (source, target) or anchor not in self.encoded.dataset.modalities):
            others = [name for name in self.encoded.dataset.modalities if name not in (source, target)]
            raise ValueError(f"anchor must be one of {', '.join(others) or 'none'}, got {anchor!r}")
        query, gallery = (target, anchor) if anchor is not None else (source, target)
        vectors = self.vectors(source, target, anchor)
        metrics = self._measured(*vectors, query, gallery)
        trained = self.vectors(query, query, gallery) if anchor is None else self.vectors(target, target, anchor)
        recall = rank_by_cosine(*trained).recall[DEPTH]
        same = Bootstrap(len(recall), probe_seed(self.seed, "bootstrap")).of_mean(recall)
        score = metrics[f"{query}->{gallery} R@{DEPTH}"]
        clips = len(vectors[0])
        chance = min(1.0, DEPTH / clips)
        if protocol == "official":
            metrics = {name: value for name, value in metrics.items() if name.endswith((" R@5", " R@10"))}
        elif anchor is not None:
            direct = self._measured(*self.vectors(source, target, None), source, target)
            metrics |= {f"untrained {name}": value for name, value in direct.items()}
        return Row(
            task=NAME,
            source=source,
            target=target,
            score=score.value,
            same_modality=float(recall.mean()),
            chance=chance,
            protocol=protocol,
            anchor=anchor,
            interval=score.interval,
            metrics=metrics,
            clips=clips,
            left_out=len(self.encoded.dataset.clips(TEST, query)) - clips,
            at_chance=same.reaches(chance),
            same_interval=same.interval,
        )

    def _measured(self, queries: np.ndarray, items: np.ndarray, query: str, gallery: str) -> dict[str, Estimate]:
        """Both directions and both kinds of relevance."""
        bootstrap = Bootstrap(len(queries), probe_seed(self.seed, "bootstrap"))
        target = self._classes(query, gallery)
        relevances = {"": None} if target is None else {"": None, " of the class": target}
        measured = {}
        for which, labels in relevances.items():
            directions = (f"{query}->{gallery}", f"{gallery}->{query}")
            for direction, ranking in zip(directions, both_ways(queries, items, labels), strict=True):
                for depth in DEPTHS:
                    measured[f"{direction}{which} R@{depth}"] = bootstrap.of_mean(ranking.recall[depth])
                measured[f"{direction}{which} median rank"] = bootstrap.of_median(ranking.rank)
        return measured

    def _classes(self, name: str, other: str) -> np.ndarray | None:
        """Classes of the test clips that have both modalities; None without classes."""
        clips = self.encoded.clips(TEST, name)
        return clips.target[self.encoded.common(TEST, name, other)[0]] if "class" in clips.arrays else None

    def shown(self, name: str, other: str) -> ClipSet:
        """The test clips that have both modalities, with the features of the first one."""
        return self.encoded.clips(TEST, name).select_unread(self.encoded.common(TEST, name, other)[0])

    def _check_pairs(self, split: str, first: str, second: str) -> None:
        one, other = (self.encoded.dataset.clips(split, name) for name in (first, second))
        if len(one) != len(other) or not np.array_equal(one.id, other.id):
            raise ValueError(f"clips of {first!r} and {second!r} must be paired, got unpaired clips in split {split!r}")

    def _pairs(self, split: str, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the clips that have both modalities, (clips, D) each."""
        self._check_pairs(split, first, second)
        places = self.encoded.common(split, first, second)
        if not len(places[0]):
            raise ValueError(f"split {split!r} must have clips with both {first!r} and {second!r}, got none")
        return self.embedding(split, first)[places[0]], self.embedding(split, second)[places[1]]


def both_ways(queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray | None = None) -> tuple[Ranking, Ranking]:
    """Rankings of the gallery by the queries, then of the queries by the gallery; see `rank_by_cosine`."""
    return rank_by_cosine(queries, gallery, labels), rank_by_cosine(gallery, queries, labels)


def _of_distinct(layer: nn.Linear, rows: np.ndarray) -> np.ndarray:
    """The layer applied to each row, with the same bits for copies of a row."""
    distinct, place = equal_rows(rows)
    return layer(torch.from_numpy(distinct)).numpy()[place]


def mean_over_positions(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(clips, D) from (clips, T, D): the mean over positions where mask (clips, T) is True."""
    weight = np.asarray(mask, np.float32)
    weight = weight / weight.sum(1, keepdims=True)
    return np.einsum("ntd,nt->nd", values, weight).astype(np.float32)
