"""What to try for a codebook: advice that the use of its codewords gives reason for, and that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from unicode_fast import health
from unicode_fast.config import Config
from unicode_fast.report.codebook_data import CodebookUse

# Least overlaps of use, with a common time axis and without. The preset recommended reaches 0.76 and 0.46 on
# talking-digits (docs/presets.md).
_OVERLAP_OF_TIMED, _OVERLAP = 0.5, 0.3
# Scores of docs/ablation.md rise up to this number of codewords.
_LARGEST_GAIN = 256
_CHOICES, _ABLATION, _PRESETS = "docs/choices.md", "docs/ablation.md", "docs/presets.md"


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        seen: what the page shows.
        advice: what to try; empty if there is nothing to do.
        source: page of the documentation with the measurements.
    """

    seen: str
    advice: str
    source: str


@dataclass(frozen=True)
class _Term:
    """A term for sharing: a field of the method, its value in preset recommended, and what it changed on choices.md."""

    field: str
    recommended: Any
    effect: str

    @property
    def shown(self) -> str:
        """The recommended value as a flag takes it."""
        return f"{self.recommended:g}" if isinstance(self.recommended, float) else str(self.recommended)

    def is_weaker(self, config: Config) -> bool:
        """Whether a run has less of the term than the preset recommended."""
        value = getattr(config.method, self.field)
        return bool(value < self.recommended if isinstance(value, float) else value != self.recommended)


_TIMED = (
    _Term("feature_norm", "batch", "shared uses in events 93 % with it, 81 % without"),
    _Term("commitment_partner", 10.0, "shared uses in events 93 % at 10, 56 % at 1"),
    _Term("assignment_weight", 1.0, "shared uses in events of audio 93 % with it, 85 % without"),
)
_WORDS = (
    _Term("grounding_weight", 0.5, "token score of text to audio 81 % with it, 22 % without"),
    _Term("feature_norm", "batch", "token score of text to audio 81 % with it, 40 % without"),
)


def advise(use: CodebookUse, config: Config, sizes: Sequence[int]) -> list[Advice]:
    """Advice for a codebook.

    Args:
        use: of its codewords.
        config: of the run.
        sizes: of the codebooks whose choices a code joins.
    """
    sharing = next(iter(use.sharing.values()))
    words, of_words = list(use.sharing.items())[-1]
    which = f", {words}" if len(use.sharing) > 1 else ""
    what = "pairs of codewords" if len(sizes) > 1 else "codewords"
    collapsed = health.collapsed(sharing.codes_in_use, sharing.perplexity, use.counts.shape[1], what)
    found = [
        Advice(seen.strip(), f"Check{advice}.", "docs/concepts.md")
        for seen, advice in (text.split(" Check", 1) for text in collapsed.values())
    ]
    if len(sizes) == 1:
        found += _of_size(use, config)
    pairs = ["-".join(pair) for pair in combinations(use.names, 2)]
    timed = {key: sharing.overlap[key] for key in pairs if key in use.timed}
    others = {key: of_words.overlap[key] for key in pairs if key not in use.timed}
    for overlaps, least, terms, note in (
        (timed, _OVERLAP_OF_TIMED, _TIMED, ""),
        (others, _OVERLAP, _WORDS, which),
    ):
        low = [f"{key} {100 * overlap:.0f} %" for key, overlap in overlaps.items() if overlap < least]
        if low:
            found.append(Advice(f"Overlap of use is low{note}: {', '.join(low)}.", *_terms(config, terms)))
    return found


def _of_size(use: CodebookUse, config: Config) -> list[Advice]:
    size, dead = use.counts.shape[1], len(use.dead)
    if dead == 0 and size < _LARGEST_GAIN:
        return [
            Advice(
                f"All {size} codewords are in use.",
                f"Try --codewords {2 * size}: scores on talking-numbers rose up to {_LARGEST_GAIN} codewords.",
                _ABLATION,
            )
        ]
    if 2 * dead <= size:
        return []
    seen = f"{dead:,} of {size:,} codewords are not used in split {use.split}."
    if config.method.club_weight and config.method.club_reduction == "sum" and config.method.method == "uni-code":
        advice = "Try --club_reduction mean: two to eight times as many codes were in use with it."
        return [Advice(seen, advice, _PRESETS)]
    if config.method.codebook_init == "uniform":
        advice = "Try --codebook_init data: codewords that start far from all features are not found again."
        return [Advice(seen, advice, _PRESETS)]
    if config.method.reset_after == 0:
        return [Advice(seen, "Try --reset_after 30: idle codewords are reset to features of the batch.", _CHOICES)]
    return []


def _terms(config: Config, terms: Sequence[_Term]) -> tuple[str, str]:
    """The terms that the run lacks; with all of them, more training."""
    if config.method.method != "uni-code":
        return (
            "Compare with the preset recommended of uni-code, whose terms draw the modalities together.",
            "docs/sharing.md",
        )
    weaker = [term for term in terms if term.is_weaker(config)]
    if not weaker:
        return (
            "The terms for sharing are on. Train longer, and check that the modalities of a clip show the same events. "
            "After 1000 steps on talking-digits the overlap was 76 % for audio and video, 46 % with words.",
            _PRESETS,
        )
    tried = "; ".join(f"--{term.field} {term.shown} ({term.effect})" for term in weaker)
    return f"Try {tried}. Measured on talking-digits.", _CHOICES
