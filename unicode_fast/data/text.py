"""Word vectors of sentences by a frozen BERT, each sentence encoded once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.config import TextPadding
from unicode_fast.data.cache import cache_folder
from unicode_fast.data.files import need
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.sources import Source
from unicode_fast.data.store_checks import StoreError
from unicode_fast.data.zip_pickle import unpickle_counts
from unicode_fast.writing import atomic_file

WORDS = 10
# As the released code's text package cuts sentences, [CLS] and [SEP] included.
_LONGEST = 25
_PIECE = "##"
_VERSION = 1
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "vocab.txt", "tokenizer.json")


class WordVectors:
    """Contextual vectors of the words of a sentence, as the `bert-embedding` package gives them by default.

    The last layer's vector of each word; a word that BERT's vocabulary has only in pieces gets the mean of its pieces.
    Sentences are cut after 25 pieces, [CLS] and [SEP] among them, which have no vectors of their own. The first ten
    words are kept.

    With a whitelist, words are kept only where their id in the vocabulary is one of its keys, as the released code
    does; a word in pieces has no id and is dropped. That code's vocabulary has the ids of `bert-base-uncased`, but for
    special tokens.

    Args:
        model: a name or a folder that `transformers` loads a BERT and its vocabulary from.
        whitelist: a pickled dict whose keys are vocabulary ids, the released `cnt.pkl`; None keeps every word.
        cache: folder to keep vectors in; None takes the package's cache folder.

    Raises:
        PickleError: the whitelist is another pickle.
        OSError: the whitelist cannot be read.
    """

    def __init__(
        self,
        model: str,
        whitelist: str | os.PathLike[str] | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model = model
        self.allowed = None if whitelist is None else frozenset(unpickle_counts(Path(whitelist)))
        self.cache = (Path(cache) if cache is not None else cache_folder()) / "word-vectors"
        self.encoded = 0
        self._known: dict[str, np.ndarray] = {}

    def vectors(self, sentence: str) -> np.ndarray:
        """(n, E) float32 vectors of the first words of a sentence, n in 1..10.

        Raises:
            StoreError: no word is left, or the model cannot be loaded.
            MissingPackageError: transformers is not installed.
            OSError: the cache folder cannot be written.
        """
        if sentence not in self._known:
            self._known[sentence] = self._kept(sentence)
        return self._known[sentence]

    def source(self, sentences: Sequence[str], padding: TextPadding = "masked") -> Source:
        """Features (clips, 10, E) of sentences, zeros after the last word; read when indexed.

        Args:
            sentences: of the clips.
            padding: "masked" gives their lengths too; "read" gives none, so that all ten steps count, as in the
                released code, whose word encoder reads the zeros and is not masked.
        """
        lengths = LazyArray.by_clip(
            (len(sentences),), np.int64, lambda clip: np.int64(len(self.vectors(sentences[clip])))
        )
        return Source(
            where=[f"sentence {sentence!r}" for sentence in sentences],
            read=lambda number: self.vectors(sentences[number]),
            numbers=np.arange(len(sentences)),
            steps=WORDS,
            fit="zeros",
            kind="words",
            lengths=lengths if padding == "masked" else None,
        )

    def _kept(self, sentence: str) -> np.ndarray:
        ids, vectors = self._cached(sentence)
        kept = np.ones(len(ids), bool) if self.allowed is None else np.array([_in(i, self.allowed) for i in ids], bool)
        if not kept.any():
            why = "" if self.allowed is None else " that the whitelist keeps"
            raise StoreError(f"a sentence must have at least one word{why}, got {sentence!r}")
        return vectors[kept][:WORDS]

    def _cached(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        """Vocabulary ids, -1 for words in pieces, (n,) int64, and vectors (n, E) float32 of all words."""
        file = self.cache / f"{self._key(sentence)}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            with np.load(file, allow_pickle=False) as found:
                return found["ids"], found["vectors"]
        ids, vectors = self._encode(sentence)
        content = io.BytesIO()
        np.savez(content, ids=ids, vectors=vectors)
        with atomic_file(file) as stream:
            stream.write(content.getvalue())
        return ids, vectors

    def _key(self, sentence: str) -> str:
        return hashlib.sha256(f"{_VERSION}\n{self._model_key}\n{sentence}".encode()).hexdigest()[:32]

    @functools.cached_property
    def _model_key(self) -> str:
        """Tells one model from another: its name, and for a folder the size and time of change of its files."""
        folder = Path(self.model)
        if not folder.is_dir():
            return self.model
        states = {file.name: file.stat() for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))}
        listed = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states.items()]
        return "\n".join([str(folder.resolve()), *listed])

    @functools.cached_property
    def _bert(self) -> tuple[Any, Any]:
        """The tokeniser and the model, in evaluation mode."""
        transformers = need("transformers", "text")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
            return tokenizer, transformers.AutoModel.from_pretrained(self.model).eval()
        except (OSError, ValueError) as error:
            raise StoreError(
                f"text_model must be a BERT that transformers can load, by name or from a folder, got {self.model!r}: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error

    def _encode(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        import torch

        tokenizer, model = self._bert
        self.encoded += 1
        given = tokenizer(sentence, truncation=True, max_length=_LONGEST, return_tensors="pt")
        with torch.no_grad():
            states = model(**given).last_hidden_state[0].to(torch.float32).numpy()  # (pieces, E)
        special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        ids: list[int] = []
        words: list[list[np.ndarray]] = []
        for number, state in zip(given["input_ids"][0].tolist(), states, strict=True):
            if number in special:
                continue
            if tokenizer.convert_ids_to_tokens(number).startswith(_PIECE) and words:
                words[-1].append(state)
                ids[-1] = -1
            else:
                words.append([state])
                ids.append(-1 if number == tokenizer.unk_token_id else number)
        vectors = np.array([np.mean(pieces, 0) for pieces in words], np.float32).reshape(len(words), states.shape[1])
        return np.array(ids, np.int64), vectors


def _in(number: int, allowed: frozenset[int]) -> bool:
    return number > 0 and int(number) in allowed
