"""The named configurations: `official`, `paper` and `recommended`, each at a `small` or the `paper`'s size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unicode_fast.config import Config, completed

PRESETS = ("official", "paper", "recommended")
SIZES = ("small", "paper")

# The released code's numbers, whatever their reason; float64 throughout.
_OFFICIAL: dict[str, Any] = {
    "feature_norm": "none",
    "grid_pooling": "sum",
    "residual_skip": "relu",
    "equal_layers": True,
    "cpc_layers": 2,
    "cpc_bias": True,
    "cpc_steps": 1,
    "codebook_init": "uniform",
    "ema_initial_count": 0.0,
    "ema_update": "sequential",
    "ema_smoothing": "compounding",
    "ema_partner": "aligned",
    "unequal_lengths": "refuse",
    "revive_after": 300,
    "revive_unless": "any",
    "revive_source": "codeword",
    "revive_ema": False,
    "reconstruction_weight": 1.0,
    "word_target": "lstm",
    "commitment_own": 2.0,
    "commitment_partner": 1.0,
    "commitment_partners": "all",
    "commitment_norm": "mean",
    "club_estimator": "official",
    "club_input": "quantised",
    "club_floor": False,
    "club_reduction": "sum",
    "club_weight": 1.0,
    "club_inner_steps": 5,
    "cpc_self_weight": 0.1,
    "cpc_softmax_over": "predictions",
    "cpc_scale": "one",
    "cpc_earliest": 1,
    "cmcm_weight": 0.5,
    "cmcm_pairing": "official",
    "cmcm_directions": "rows",
    "assignment_weight": 0.0,
    "presence_weight": 0.0,
    "grounding_weight": 0.0,
    "keep_last_batch": True,
    "steps": 600,
    "learning_rate": 4e-4,
    "schedule": "multistep",
    "warmup_steps": 0,
    "clip_norm": 0.5,
    "dtype": "float64",
    "text_padding": "read",
}

# The equations as printed; what the paper leaves open is listed in `preset`.
_PAPER: dict[str, Any] = {
    **_OFFICIAL,
    "grid_pooling": "flatten",
    "residual_skip": "input",
    "equal_layers": False,
    "cpc_layers": 1,
    "cpc_bias": False,
    "codebook_init": "data",
    "ema_initial_count": 1.0,
    "ema_update": "joint",
    "ema_smoothing": "none",
    "ema_partner": "attended",
    "unequal_lengths": "means",
    "revive_after": 30,
    "revive_unless": "all",
    "revive_source": "feature",
    "revive_ema": True,
    "word_target": "input",
    "commitment_own": 1.0,
    "commitment_partner": 0.5,
    "club_estimator": "closed_form",
    "club_input": "semantic",
    "club_floor": True,
    "club_reduction": "mean",
    "club_weight": 0.1,
    "cpc_self_weight": 0.0,
    "cpc_softmax_over": "candidates",
    "cpc_earliest": 0,
    "cmcm_weight": 1.0,
    "cmcm_pairing": "symmetric",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 100,
    "dtype": "float32",
    "text_padding": "masked",
}

_RULES: dict[str, dict[str, Any]] = {"official": _OFFICIAL, "paper": _PAPER, "recommended": {}}

# Sizes of the published experiments (VGG-19 grids of 512 channels, VGGish, BERT words); epochs instead of steps.
_PAPER_SIZE: dict[str, Any] = {
    "width": 256,
    "codewords": 400,
    "vector_specific_width": 256,
    "word_width": 256,
    "grid_hidden_width": 1024,
    "grid_specific_width": 2048,
    "grid_club_width": 512,
    "grid_semantic_width": 512,
    "squeeze_width": 64,
    "feedforward_width": 1024,
    "club_hidden_width": 128,
    "steps": 0,
    "epochs": 6,
}
_SIZES: dict[str, dict[str, Any]] = {"small": {}, "paper": _PAPER_SIZE}


def from_saved(values: Mapping[str, Any]) -> Config:
    """The configuration that `Config.flat` gave as these values, in this version or an older one.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a field is unknown, missing and not of ADDED_FIELDS, or has a value that it cannot have.
    """
    values = completed(values)
    return preset(values.pop("preset"), values.pop("size")).replace_all(**values)


def preset(name: str, size: str = "small") -> Config:
    """A complete configuration by name; change single fields with `Config.replace`.

    `official` computes what the released code computes, traits and all, in
    float64: sum pooling over grid positions, a residual block whose skip is
    rectified, sequential EMA with smoothing each time, partners at the same
    position, CLUB by one permutation on quantised features, Cross-CPC softmax
    over predictions with self terms, L_cmcm with its second term untransposed,
    a reset that leaves the EMA state alone. For sets of modalities other than
    audio-video-text it follows the audio-video-text rules: the own feature
    weighs 1/2, the others share 1/2.

    `paper` takes the equations as printed. Where the paper is silent, these
    are our choices, with which they train: the partner
    r^a = softmax(z^a z^b^T / sqrt(D)) z^b over the valid steps of the same
    clip, without parameters and detached, since the EMA gives no gradient to
    train any; with more than two modalities the own feature weighs 1/2 and the
    partners share 1/2; one linear predictor per step and source; CLUB on z,
    over all pairs, averaged over channels, never below zero, at a tenth of the
    weight; commitment and reconstruction errors averaged over elements; K = 1;
    a codeword is kept when all modalities chose it within N_re = 30 batches,
    else it becomes a feature of the batch, running count and sum included;
    counts start at one, codewords from features; words are reconstructed as
    their input vectors; code matching looks along rows; positions of a grid are
    read by one linear layer; Adam at 1e-3 with warm-up and cosine. Inner steps
    and clipping are as released.

    `recommended` is chosen on the built-in data by what docs/choices.md
    compares, with CLUB kept on: codewords start from data,
    counts at one, one joint EMA step smoothed in the division only, revival
    from features of the batch that lasts, CLUB in closed form averaged over
    channels, never below zero, at a tenth of the weight, Cross-CPC with the
    softmax in both directions, symmetric code matching. So that modalities
    share codes: z normalised by modality, commitment mostly to partners with
    the same time axis, their agreed assignment predicted by each of them, and
    words that a lexicon finds to name what the clip holds drawn to its codes;
    reconstruction weighs 1.5 against these.

    Args:
        name: official, paper or recommended.
        size: "small" suits the built-in data and a laptop, "paper" has the
            sizes and epochs of the published experiments.

    Raises:
        ValueError: the name or the size is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r:.60}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r:.60}")
    return Config(preset=name, size=size).replace_all(**{**_RULES[name], **_SIZES[size]})
