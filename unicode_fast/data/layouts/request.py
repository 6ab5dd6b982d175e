"""The options of a layout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicode_fast.config import TextPadding
from unicode_fast.data.layouts.index import FeatureFiles
from unicode_fast.files.paths import expanded

if TYPE_CHECKING:
    from unicode_fast.data.text import WordVectors

BERT = "bert-base-uncased"


@dataclass(frozen=True)
class Request:
    """Modalities to read, and options for sentences.

    Attributes:
        modalities: names; modalities that the layout lacks are ignored. None takes all.
        text_model: a `transformers` model name or folder.
        text_whitelist: the released `cnt.pkl`, or "" to keep all words.
        text_padding: "masked" masks the zeros after a sentence's last word, "read" treats them as words.
    """

    modalities: Collection[str] | None = None
    text_model: str = BERT
    text_whitelist: str = ""
    text_padding: TextPadding = "masked"

    def includes(self, name: str) -> bool:
        """Whether a modality is requested."""
        return self.modalities is None or name in self.modalities

    def words(self, sentences: Sequence[str]) -> FeatureFiles:
        """Word vectors of sentences."""
        from unicode_fast.data.text import WordVectors

        vectors: WordVectors = WordVectors(expanded(self.text_model), expanded(self.text_whitelist) or None)
        return vectors.features(sentences, self.text_padding)
