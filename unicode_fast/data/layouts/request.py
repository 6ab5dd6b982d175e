"""What is asked of a layout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicode_fast.config import TextPadding
from unicode_fast.data.layouts.sources import Source
from unicode_fast.files.paths import expanded

if TYPE_CHECKING:
    from unicode_fast.data.text import WordVectors

BERT = "bert-base-uncased"


@dataclass(frozen=True)
class Request:
    """Which modalities are wanted, and what reads sentences.

    Attributes:
        modalities: names, of which the layout takes those it has; None wants all.
        text_model: a name or a folder that `transformers` knows.
        text_whitelist: the released `cnt.pkl`, or "" to keep all words.
        text_padding: whether the zeros after a sentence's last word are masked, or read as words are.
    """

    modalities: Collection[str] | None = None
    text_model: str = BERT
    text_whitelist: str = ""
    text_padding: TextPadding = "masked"

    def wants(self, name: str) -> bool:
        """Whether a modality is wanted."""
        return self.modalities is None or name in self.modalities

    def words(self, sentences: Sequence[str]) -> Source:
        """Word vectors of sentences."""
        from unicode_fast.data.text import WordVectors

        vectors: WordVectors = WordVectors(expanded(self.text_model), expanded(self.text_whitelist) or None)
        return vectors.source(sentences, self.text_padding)
