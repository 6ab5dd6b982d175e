"""Segmentation of pixels by queries: a segmenter is trained with one modality's queries and tested with another's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from unicode_fast.tasks.encoded import TEST, TRAIN, VALIDATION, EncodedDataset
from unicode_fast.tasks.metrics.intervals import Bootstrap, Estimate
from unicode_fast.tasks.metrics.masks import (
    MaskScores,
    frame_scores,
    joined,
    measured_masks,
    official_mask_scores,
)
from unicode_fast.tasks.probe import EncodedClips, center_and_scale, probe_seed, seeded
from unicode_fast.tasks.segmentation.backbones import BackboneChoice, PyramidSettings, TimmPyramid
from unicode_fast.tasks.segmentation.segmenter import Segmenter, load_segmenter, save_segmenter
from unicode_fast.tasks.table import Row, check_protocol

NAME = "segmentation"
# The released scripts: one epoch, four clips per batch.
OFFICIAL_BATCH = 4
OFFICIAL_RATE = 1e-4
JUDGED = 5


class Masks:
    """Frames, masks and queries of one split, clips in one order.

    The data set's array "<name>.frames" is (clips, F, H, W) or (clips, F, H, W, channels) uint8. Its array
    "<name>.mask" is (clips, K, H, W), 1 on the foreground. The labelled frames are the first K <= F.

    Args:
        encoded: the data set and the frozen model.
        split: its name.
        queries: modalities of the queries.

    Raises:
        ValueError: the data set has no such arrays, they do not fit together, or a clip lacks a query.
    """

    def __init__(self, encoded: EncodedDataset, split: str, queries: Sequence[str]) -> None:
        frames, masks, self.codes = [], [], {}
        for name in queries:
            if lacking := encoded.left_out(split, name):
                raise ValueError(
                    f"data for segmentation must have a query in every clip, got {lacking} of {split} without {name!r}"
                )
            arrays = encoded.clips(split, name).arrays
            shown = shown_modality(arrays)
            frames.append(arrays[f"{shown}.frames"])
            masks.append(arrays[f"{shown}.mask"])
            self.codes[name] = encoded.codes(split, name)
        self.frames, self.mask = frames[0], masks[0]
        if self.mask.shape[0] != self.frames.shape[0] or not 1 <= self.mask.shape[1] <= self.frames.shape[1]:
            raise ValueError(
                "masks must have shape (clips, K, H, W) with K from 1 to the number of frames, got "
                f"{self.mask.shape} for frames {self.frames.shape}"
            )
        if counts := {len(codes) for codes in self.codes.values()} - {len(self.frames)}:
            raise ValueError(f"queries must have the {len(self.frames)} clips of the frames, got {min(counts)} clips")

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.frames)

    @property
    def channels(self) -> int:
        """Channels of the frames; 1 for frames without this axis."""
        return self.frames.shape[4] if len(self.frames.shape) == 5 else 1

    def pictures(self, clips: np.ndarray, device: torch.device) -> Tensor:
        """(n, F, H, W, channels) uint8 of clips (n,)."""
        chosen = torch.from_numpy(np.array(self.frames[clips]))
        return (chosen if chosen.dim() == 5 else chosen[..., None]).to(device)

    def truth(self, clips: np.ndarray) -> np.ndarray:
        """(n, K, H, W) bool of clips (n,)."""
        return np.asarray(self.mask[clips]) > 0


def shown_modality(arrays: Mapping[str, Any]) -> str:
    """The modality whose frames have masks.

    Raises:
        ValueError: there is none, or several.
    """
    names = [key.removesuffix(".mask") for key in arrays if key.endswith(".mask")]
    found = sorted(name for name in names if f"{name}.frames" in arrays)
    if len(found) != 1:
        raise ValueError(
            "data for segmentation must hold arrays '<name>.frames' and '<name>.mask' of one modality, got "
            f"{', '.join(found) or 'none'}; of the built-in data, talking-digits-two does"
        )
    return found[0]


def query_names(encoded: EncodedDataset) -> list[str]:
    """Modalities of queries: those of the model, except the one with the segmented frames.

    Raises:
        ValueError: the data set has no frames with masks.
    """
    arrays = encoded.clips(TEST, encoded.names[0]).arrays
    return [name for name in encoded.names if name != shown_modality(arrays)]


def tiled(codes: EncodedClips, clips: np.ndarray, positions: int) -> Tensor:
    """(n, positions, D) codewords of clips (n,), a shorter sequence repeated from its start."""
    order = torch.arange(positions) % codes.index.shape[1]
    return codes.table[codes.index[torch.from_numpy(clips)][:, order]]


class Segmentation:
    """Segmenters on one data set; each is trained once, on first use.

    Args:
        encoded: the data set and the frozen model, on whose device segmenters are trained too.
        seed: of segmenters, shuffled queries and intervals.
        backbone: the pyramid; None takes the light one.
        steps: of training; None takes the backbone's own rule.
    """

    def __init__(
        self, encoded: EncodedDataset, seed: int = 0, backbone: BackboneChoice | None = None, steps: int | None = None
    ) -> None:
        self.encoded, self.seed, self.backbone = encoded, seed, backbone or BackboneChoice()
        self.steps = steps
        self.device = encoded.model.device
        self.queries = query_names(encoded)
        self._masks: dict[str, Masks] = {}
        self._trained: dict[tuple[str, str, str], Segmenter] = {}

    def masks(self, split: str) -> Masks:
        """Frames, masks and queries of a split."""
        if split not in self._masks:
            self._masks[split] = Masks(self.encoded, split, self.queries)
        return self._masks[split]

    def rule(self, protocol: str) -> PyramidSettings:
        """Training rule of the segmenters."""
        rule = self.backbone.settings
        if protocol == "official":
            rule = replace(rule, batch_size=OFFICIAL_BATCH, learning_rate=OFFICIAL_RATE, epochs=1, steps=0, decay=False)
        return rule if self.steps is None else replace(rule, steps=self.steps)

    def segmenter(self, source: str, chosen_by: str, protocol: str = "held_out") -> Segmenter:
        """The segmenter that is trained with queries of one modality.

        Args:
            source: the queries' modality in training.
            chosen_by: the queries' modality on the validation split. The state with the best mIoU is kept; among
                equals, the latest.
            protocol: held_out trains on all labelled frames, official on the first of each clip.
        """
        protocol = check_protocol(protocol)
        if (source, chosen_by, protocol) not in self._trained:
            judges = self.queries if protocol == "official" else [source]
            for judge, segmenter in self._train(source, judges, protocol).items():
                self._trained[source, judge, protocol] = segmenter
        return self._trained[source, chosen_by, protocol]

    def segmenter_of(self, source: str, target: str, protocol: str = "held_out") -> Segmenter:
        """The segmenter of a direction."""
        return self.segmenter(source, self._chosen_by(source, target, protocol), protocol)

    def _train(self, source: str, judges: Sequence[str], protocol: str) -> dict[str, Segmenter]:
        rule, masks = self.rule(protocol), self.masks(TRAIN)
        labelled = 1 if protocol == "official" else masks.mask.shape[1]
        steps = rule.steps or rule.epochs * -(-len(masks) // rule.batch_size)
        # The released code validates once, after its only epoch.
        judged = 1 if protocol == "official" else JUDGED
        judged_at = {round(steps * (number + 1) / judged) for number in range(judged)} | {steps}
        best: dict[str, tuple[float, Segmenter]] = {}
        generator = torch.Generator().manual_seed(probe_seed(self.seed, NAME, "order", source))
        with seeded(self.device, probe_seed(self.seed, NAME, source)):
            segmenter = self._new(masks, source).to(self.device)
            optimizer = torch.optim.Adam(segmenter.parameters(), rule.learning_rate)
            order = torch.empty(0, dtype=torch.int64)
            for step in tqdm(range(1, steps + 1), f"segmenter on {source}", leave=False):
                if not len(order):
                    order = torch.randperm(len(masks), generator=generator)
                clips, order = np.sort(order[: rule.batch_size].numpy()), order[rule.batch_size :]
                if rule.decay:
                    optimizer.param_groups[0]["lr"] = rule.learning_rate * _half_cosine((step - 1) / steps)
                segmenter.train()
                logits = self._logits(segmenter, masks, source, clips)[:, :labelled]
                truth = torch.from_numpy(masks.truth(clips)[:, :labelled]).to(self.device)
                optimizer.zero_grad(set_to_none=True)
                binary_cross_entropy_with_logits(logits, truth.to(logits.dtype)).backward()
                optimizer.step()
                if step in judged_at:
                    for judge in judges:
                        score = self._judged(segmenter, judge, protocol)
                        if judge not in best or score >= best[judge][0]:
                            best[judge] = score, self._copy(segmenter)
        return {judge: kept.requires_grad_(False) for judge, (_, kept) in best.items()}

    def _new(self, masks: Masks, source: str) -> Segmenter:
        segmenter = Segmenter(**self._description(), settings=self.backbone.settings)
        if self.backbone.weights is not None and isinstance(segmenter.backbone, TimmPyramid):
            segmenter.backbone.load_weights(self.backbone.weights)
        center, scale = center_and_scale(masks.codes[source].to(torch.float32))
        segmenter.query_center.copy_(center)
        segmenter.query_scale.copy_(scale)
        return segmenter

    def _copy(self, segmenter: Segmenter) -> Segmenter:
        copy = Segmenter(**segmenter.description, settings=self.backbone.settings).to(self.device)
        copy.load_state_dict(segmenter.state_dict())
        return copy.eval()

    def _judged(self, segmenter: Segmenter, judge: str, protocol: str) -> float:
        scores = self.scores(segmenter, judge, VALIDATION)
        return scores.miou if protocol == "held_out" else official_mask_scores(scores, OFFICIAL_BATCH)[0]

    def _logits(
        self, segmenter: Segmenter, masks: Masks, query: str, clips: np.ndarray, query_clips: np.ndarray | None = None
    ) -> Tensor:
        """Logits (n, F, H, W) of clips with their own queries, or with those of `query_clips`."""
        positions = int(segmenter.description["query_steps"])
        codes = tiled(masks.codes[query], clips if query_clips is None else query_clips, positions)
        return segmenter(masks.pictures(clips, self.device), codes.to(self.device, torch.float32))

    @torch.no_grad()
    def probabilities(
        self, segmenter: Segmenter, query: str, split: str, clips: np.ndarray, query_clips: np.ndarray | None = None
    ) -> np.ndarray:
        """(n, F, H, W) float32, each clip segmented by its own query, or by that of its clip in `query_clips`."""
        segmenter.eval()
        return torch.sigmoid(self._logits(segmenter, self.masks(split), query, clips, query_clips)).cpu().numpy()

    def scores(self, segmenter: Segmenter, query: str, split: str = TEST, *, shuffled: bool = False) -> MaskScores:
        """Scores of all labelled frames of a split.

        Args:
            segmenter: trained.
            query: the queries' modality.
            split: of the clips.
            shuffled: each clip has the query of another clip.
        """
        masks = self.masks(split)
        own, labelled, found = np.arange(len(masks)), masks.mask.shape[1], []
        query_clips = another_clip(len(masks), probe_seed(self.seed, NAME, "shuffled")) if shuffled else own
        # A multiple of the training batch, because evaluation keeps no activations.
        for clips in np.array_split(own, -(-len(masks) // (4 * self.backbone.settings.batch_size))):
            probability = self.probabilities(segmenter, query, split, clips, query_clips[clips])[:, :labelled]
            truth = masks.truth(clips)
            found.append(
                frame_scores(
                    probability.reshape(-1, *probability.shape[2:]),
                    truth.reshape(-1, *truth.shape[2:]),
                    np.repeat(clips, labelled),
                )
            )
        return joined(found)

    def row(self, source: str, target: str, protocol: str = "held_out") -> Row:
        """One direction with its interval and other metrics.

        Args:
            source: the queries' modality in training.
            target: the queries' modality in testing.
            protocol: held_out or official.
        """
        protocol = check_protocol(protocol)
        own = self.segmenter_of(source, target, protocol)
        metrics = self._measured(own, target)
        metrics |= {f"shuffled_{name}": value for name, value in self._measured(own, target, shuffled=True).items()}
        upper = self._measured(self.segmenter(target, target, protocol), target)
        metric = "official_miou" if protocol == "official" else "miou"
        return Row(
            task=NAME,
            source=source,
            target=target,
            score=metrics[metric].value,
            same_modality=upper[metric].value,
            chance=metrics[f"shuffled_{metric}"].value,
            protocol=protocol,
            interval=metrics[metric].interval,
            metrics=metrics,
            clips=len(self.masks(TEST)),
            at_chance=upper[metric].reaches(metrics[f"shuffled_{metric}"].value),
            same_interval=upper[metric].interval,
        )

    def _measured(self, segmenter: Segmenter, query: str, *, shuffled: bool = False) -> dict[str, Estimate]:
        scores = self.scores(segmenter, query, shuffled=shuffled)
        bootstrap = Bootstrap(len(self.masks(TEST)), probe_seed(self.seed, "bootstrap"))
        return measured_masks(scores, bootstrap, OFFICIAL_BATCH)

    def save(self, path: Path, source: str, target: str, protocol: str = "held_out") -> None:
        """Writes the segmenter of a direction; see `save_segmenter`."""
        save_segmenter(self.segmenter_of(source, target, protocol), path, {"source": source})

    def load(self, path: Path, source: str, target: str, protocol: str = "held_out") -> None:
        """Loads a saved segmenter for a direction, in place of training.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is damaged.
            ValueError: it was trained with queries of another modality, for another backbone or other clips.
        """
        segmenter = load_segmenter(path, self.backbone.settings, {"source": source, **self._description()})
        protocol = check_protocol(protocol)
        self._trained[source, self._chosen_by(source, target, protocol), protocol] = segmenter.to(self.device)

    def _chosen_by(self, source: str, target: str, protocol: str) -> str:
        """Modality of the validation queries; in the released code, the tested one."""
        return target if protocol == "official" else source

    def _description(self) -> dict[str, Any]:
        masks = self.masks(TEST)
        return {
            "backbone": self.backbone.name,
            "channels": masks.channels,
            "frames": masks.frames.shape[1],
            "query_steps": max(codes.index.shape[1] for codes in masks.codes.values()),
            "query_width": next(iter(masks.codes.values())).table.shape[1],
        }


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def another_clip(clips: int, seed: int) -> np.ndarray:
    """(clips,) a permutation without fixed points; a single clip stays itself."""
    order = np.random.default_rng(seed).permutation(clips)
    other = np.empty(clips, np.int64)
    other[order] = np.roll(order, 1)
    return other
