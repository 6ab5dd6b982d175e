"""The presets `official`, `paper` and `recommended`, each with `small` sizes or those of the `paper`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_args

from unicode_fast.config import Config, Kind, completed
from unicode_fast.methods.registry import rules_of

PRESETS = ("official", "paper", "recommended")
SIZES = ("small", "paper")

# The values of the released code; float64 throughout.
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
    "reset_after": 300,
    "reset_unless": "any",
    "reset_source": "codeword",
    "reset_ema": False,
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
    "code_matching_weight": 0.5,
    "code_matching_pairing": "official",
    "code_matching_directions": "rows",
    "assignment_weight": 0.0,
    "presence_weight": 0.0,
    "grounding_weight": 0.0,
    "fcid_target": "moving",
    "keep_last_batch": True,
    "steps": 600,
    "learning_rate": 4e-4,
    "schedule": "multistep",
    "warmup_steps": 0,
    "clip_norm": 0.5,
    "dtype": "float64",
    "text_padding": "read",
}

# The equations as printed. The docstring of `preset` lists what the paper leaves open.
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
    "reset_after": 30,
    "reset_unless": "all",
    "reset_source": "feature",
    "reset_ema": True,
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
    "code_matching_weight": 1.0,
    "code_matching_pairing": "symmetric",
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup_steps": 100,
    "dtype": "float32",
    "text_padding": "masked",
}

_RULES: dict[str, dict[str, Any]] = {"official": _OFFICIAL, "paper": _PAPER, "recommended": {}}

# Sizes of the paper's experiments (VGG-19 grids of 512 channels, VGGish, BERT words); epochs instead of steps.
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
    """The configuration from saved values, as `Config.flat` of this version or an older one returned them.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a field is unknown, a field that is not in ADDED_FIELDS is missing, or a value is not allowed.
    """
    values = completed(values)
    return preset(values.pop("preset"), values.pop("size")).replace_all(**values)


def usual(config: Config) -> Config:
    """The configuration of the same preset, size and method without other changes."""
    return preset(config.preset, config.size, config.method.method, config.method.dcid)


def accepted(row: Config, wanted: Mapping[str, Any], kinds: Collection[Kind] = get_args(Kind)) -> dict[str, Any]:
    """Those of the wanted changes that leave the rules of a method as they are, and that are read.

    Args:
        row: the usual configuration of the method.
        wanted: fields with other values.
        kinds: of the modalities of the run.
    """
    rules = rules_of(row.method.method, row.method.dcid)
    free = {name: value for name, value in wanted.items() if name not in rules}
    unread = row.replace_all(**free).unread_fields(kinds)
    return {name: value for name, value in free.items() if name not in unread}


def of_method(  # noqa: PLR0913 - a method, and what changes it
    base: Config,
    method: str,
    dcid: bool = False,
    own: Mapping[str, Any] | None = None,
    kinds: Collection[Kind] = get_args(Kind),
) -> Config:
    """The configuration of a method with the changes that `base` makes to its usual one, as far as `accepted`.

    Args:
        base: of another method or the same, with preset, size, data and training.
        method: as in `preset`.
        dcid: as in `preset`.
        own: further changes, which replace those of `base`.
        kinds: of the modalities of the run.

    Raises:
        ValueError: as in `preset`.
    """
    standard, row = usual(base).flat(), preset(base.preset, base.size, method, dcid)
    changes = {name: value for name, value in base.flat().items() if value != standard[name]}
    return row.replace_all(**accepted(row, {**changes, **(own or {})}, kinds))


def preset(name: str, size: str = "small", method: str = "uni-code", dcid: bool = False) -> Config:
    """A complete configuration by name; change single fields with `Config.replace`.

    `official` reproduces the released code, in float64:

    * sum pooling over grid cells; a residual block with a rectified skip;
    * sequential EMA, smoothed at each update, with partners at the same
      position; a reset changes neither count nor sum of the EMA;
    * CLUB with one permutation on quantised features;
    * Cross-CPC with the softmax over predictions and with self terms;
    * code matching with its second term untransposed.

    For any set of modalities the own feature weighs 1/2 and the others share
    1/2, as the released code does for audio, video and text.

    `paper` follows the equations as printed. Where the paper leaves a choice
    open, ours is:

    * The partner is r^a = softmax(z^a z^b^T / sqrt(D)) z^b over the valid positions of the same clip. It has no
      parameters and no gradient, because the EMA has none. The own feature weighs 1/2, the partners share 1/2.
    * Cross-CPC has K = 1 and one linear predictor per prediction step and source.
    * CLUB on z, over all pairs, averaged over channels, at least zero, weight 0.1.
    * Commitment and reconstruction errors are averaged over elements; the
      target of words is their input vectors.
    * A codeword stays if all modalities chose it within N_re = 30 batches. Else
      it is reset to a feature of the batch, with its count and sum.
    * Counts start at one, codewords at features.
    * Code matching along rows; one linear layer over the cells of a grid.
    * Adam at 1e-3 with warm-up and cosine; inner steps and clipping as released.

    `recommended` was chosen on the built-in data by the comparison in
    docs/choices.md, with CLUB on:

    * Codewords start at features, counts at one. One joint EMA update per batch is smoothed in the division only. A
      reset to features of the batch includes count and sum.
    * CLUB in closed form, averaged over channels, at least zero, weight 0.1.
    * Cross-CPC with the softmax in both directions; symmetric code matching.
    * For shared codes: z is normalised per modality. Commitment is mostly to
      partners with the same time axis, and each of them predicts their common
      assignment. Words that a lexicon grounds get codewords of their clip.
      Reconstruction weighs 1.5.

    Args:
        name: official, paper or recommended.
        size: "small" for the built-in data on a laptop, "paper" for the sizes
            and epochs of the paper's experiments.
        method: one of `unicode_fast.methods.METHODS`. Its rules replace those of the preset; docs/methods lists them.
        dcid: a comparison method is trained with CLUB and Cross-CPC of the preset.

    Raises:
        ValueError: the name, the size or the method is unknown, or the method has no form with `dcid`.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r:.60}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r:.60}")
    rules = {**_RULES[name], **_SIZES[size], **rules_of(method, dcid)}
    return Config(preset=name, size=size).replace_all(**rules, method=method, dcid=dcid)
