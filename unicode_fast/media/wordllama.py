"""Static word vectors of WordLlama, whose table and vocabulary are in a Python package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np

from unicode_fast.config import Modality
from unicode_fast.files.optional import MissingPackageError, need
from unicode_fast.media import networks
from unicode_fast.media.backbones import WINDOW_STEPS, Reads

_TABLE, _VOCABULARY = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
_TENSOR = "embedding.weight"


def words_of(caption: str) -> list[str]:
    """The words of a caption, without the marks around them."""
    return re.findall(r"\w+(?:['’-]\w+)*", caption)


class WordLlama:
    """Vectors of the first ten words of a caption: the mean over the tokens of each.

    The table is distilled from the token tables of Llama 2 and phi 3. It is read as data, without code of its package.

    Raises:
        MissingPackageError: the package is not installed.
    """

    name = "wordllama"
    reads: Reads = "caption"
    modality = Modality("words", (256,))
    rate = 0

    def __init__(self) -> None:
        found = importlib.util.find_spec("wordllama")
        if found is None or not found.submodule_search_locations:
            raise MissingPackageError(
                "package 'wordllama' must be installed to read captions: pip install 'unicode_fast[media]'"
            )
        folder = Path(found.submodule_search_locations[0])
        from safetensors.numpy import load_file

        self.weights_sha256 = networks.sha256_of(folder / _TABLE)
        self.table = load_file(folder / _TABLE)[_TENSOR]  # (32000, 256) float16
        self.tokenizer = need("tokenizers", "media").Tokenizer.from_file(str(folder / _VOCABULARY))

    def words(self, caption: str) -> list[str]:
        """The words of a caption; the first WINDOW_STEPS have vectors."""
        return words_of(caption)

    def __call__(self, given: str) -> np.ndarray:
        """A caption to (words, 256); none without words."""
        encoded = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in words_of(given)[:WINDOW_STEPS]]
        vectors = [self.table[ids].astype(np.float32).mean(0) for ids in encoded if ids]
        return np.stack(vectors) if vectors else np.zeros((0, 256), np.float32)
