"""Word vectors of sentences from a frozen BERT; each sentence is encoded once and cached."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicode_fast.config import TextPadding
from unicode_fast.data.cache import check_ours
from unicode_fast.data.layouts.index import FeatureFiles
from unicode_fast.data.layouts.zip_pickle import unpickle_counts
from unicode_fast.data.lazy import LazyArray
from unicode_fast.data.store.checks import StoreError
from unicode_fast.errors import few
from unicode_fast.files.checked_torch import check_torch
from unicode_fast.files.optional import need
from unicode_fast.files.paths import cache_folder
from unicode_fast.files.tensor_files import count_values
from unicode_fast.files.untrusted import (
    BadFile,
    check_count,
    open_archive,
    open_file,
    read_bytes,
    read_json,
    read_member,
    read_npy,
)
from unicode_fast.files.writing import atomic_file

WORDS = 10
# Length of sentences in the released code's text package, including [CLS] and [SEP].
_LONGEST = 25
_CONTINUATION = "##"
_VERSION = 1
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "vocab.txt", "tokenizer.json")


class WordVectors:
    """Contextual vectors of the words of a sentence, the same as the `bert-embedding` package's defaults.

    Each word has the last layer's vector; a word of several tokens has the mean of its tokens' vectors. Sentences are
    cut after 25 tokens, including [CLS] and [SEP], whose vectors are dropped. The first ten words are kept.

    With a whitelist, a word is kept only if its vocabulary id is a key of it, as in the released code. A word of
    several tokens has no id and is dropped. That code's vocabulary has the ids of `bert-base-uncased`, except for
    special tokens.

    Args:
        model: `transformers` name or folder of a BERT and its vocabulary.
        whitelist: a pickled dict with vocabulary ids as keys, the released `cnt.pkl`; None keeps every word.
        cache: folder for vectors; None takes the package's cache folder.

    Raises:
        PickleError: the whitelist is no such pickle.
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
            StoreError: no word remains, or the model cannot be loaded.
            MissingPackageError: transformers is not installed.
            OSError: the cache folder cannot be written.
        """
        if sentence not in self._known:
            self._known[sentence] = self._kept(sentence)
        return self._known[sentence]

    def ids(self, sentence: str) -> np.ndarray:
        """(n,) int64 vocabulary ids of all words of a sentence, -1 for a word of several tokens.

        Raises:
            StoreError: the model cannot be loaded.
            MissingPackageError: transformers is not installed.
            OSError: the cache folder cannot be written.
        """
        return self._cached(sentence)[0]

    def features(self, sentences: Sequence[str], padding: TextPadding = "masked") -> FeatureFiles:
        """Features (clips, 10, E) of sentences, zeros after the last word; read when indexed.

        Args:
            sentences: one per clip.
            padding: "masked" adds lengths. "read" adds none, so all ten positions are valid: the word encoder of the
                released code reads the zeros without a mask.
        """
        lengths = LazyArray.by_clip(
            (len(sentences),), np.int64, lambda clip: np.int64(len(self.vectors(sentences[clip])))
        )
        return FeatureFiles(
            where=[f"sentence {sentence!r}" for sentence in sentences],
            read=lambda number: self.vectors(sentences[number]),
            numbers=np.arange(len(sentences)),
            positions=WORDS,
            fit="zeros",
            kind="words",
            lengths=lengths if padding == "masked" else None,
        )

    def _kept(self, sentence: str) -> np.ndarray:
        ids, vectors = self._cached(sentence)
        kept = np.ones(len(ids), bool) if self.allowed is None else np.array([_in(i, self.allowed) for i in ids], bool)
        if not kept.any():
            why = "" if self.allowed is None else " of the whitelist"
            raise StoreError(f"a sentence must have at least one word{why}, got {sentence!r}")
        return vectors[kept][:WORDS]

    def _cached(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        """Vocabulary ids (n,) int64, -1 for words of several tokens, and vectors (n, E) float32 of all words."""
        check_ours(self.cache)
        if self.cache.is_symlink() or (os.path.lexists(self.cache) and not self.cache.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, "cache must be a folder, not a link or file", str(self.cache))
        file = self.cache / f"{self._key(sentence)}.npz"
        with contextlib.suppress(OSError, BadFile):
            return _read_vectors(file)
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
        """The identity of the model: its name, and for a folder the size and time of change of its files."""
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
            if Path(self.model).is_dir():
                check_bert(Path(self.model))
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
            model, found = transformers.AutoModel.from_pretrained(
                self.model, trust_remote_code=False, output_loading_info=True
            )
            # The weights may lack parameters without effect on the last layer.
            lacking = sorted(name for name in found["missing_keys"] if not re.search("pooler|position_ids", name))
            if lacking:
                raise BadFile(f"its weights lack {few(lacking, room=80)}")
            return tokenizer, model.eval()
        # Damaged weights and vocabularies can raise any exception.
        except Exception as error:
            raise self._unusable("can load by name or from a folder", error) from error

    def _unusable(self, what: str, error: Exception) -> StoreError:
        """The StoreError for an error of transformers, with its first line."""
        why = [*str(error).strip().splitlines(), type(error).__name__][0]
        return StoreError(f"text_model must be a BERT that transformers {what}, got {self.model!r}: {why}")

    def _encode(self, sentence: str) -> tuple[np.ndarray, np.ndarray]:
        tokenizer, model = self._bert
        self.encoded += 1
        try:
            return _tokens_to_words(tokenizer, model, sentence)
        # A vocabulary that does not fit the weights can raise any exception.
        except Exception as error:
            raise self._unusable(f"can encode {sentence!r:.60} with", error) from error


def _tokens_to_words(tokenizer: Any, model: Any, sentence: str) -> tuple[np.ndarray, np.ndarray]:
    """The same as `WordVectors._cached`, without the cache."""
    import torch

    given = tokenizer(sentence, truncation=True, max_length=_LONGEST, return_tensors="pt")
    if given["input_ids"].shape[1] > _LONGEST:
        raise BadFile(f"its tokenizer must return at most {_LONGEST} tokens, got {given['input_ids'].shape[1]}")
    with torch.no_grad():
        states = model(**given).last_hidden_state[0].to(torch.float32).numpy()  # (tokens, E)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids: list[int] = []
    words: list[list[np.ndarray]] = []
    for number, state in zip(given["input_ids"][0].tolist(), states, strict=True):
        if number in special:
            continue
        if tokenizer.convert_ids_to_tokens(number).startswith(_CONTINUATION) and words:
            words[-1].append(state)
            ids[-1] = -1
        else:
            words.append([state])
            ids.append(-1 if number == tokenizer.unk_token_id else number)
    vectors = np.array([np.mean(tokens, 0) for tokens in words], np.float32).reshape(len(words), states.shape[1])
    return np.array(ids, np.int64), vectors


def _read_vectors(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The cached ids and vectors of a sentence.

    Raises:
        BadFile: the file holds other content, or is damaged.
        OSError: the file is missing.
    """
    found = []
    with open_file(file) as stream, open_archive(stream) as archive:
        for name in ("ids.npy", "vectors.npy"):
            data = read_member(archive, name)
            found.append(read_npy(io.BytesIO(data), len(data)))
    ids, vectors = found
    if ids.dtype != np.int64 or vectors.dtype != np.float32 or ids.ndim != 1 or vectors.ndim != 2:
        raise BadFile(f"it holds {ids.shape} {ids.dtype} and {vectors.shape} {vectors.dtype}")
    if len(ids) != len(vectors):
        raise BadFile(f"it holds {len(ids)} words and {len(vectors)} vectors")
    return ids, vectors


# Configuration files of a model and its tokenizer; other files are not read, or hold words, such as vocab.json.
_CONFIGURATIONS = (
    "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# Fields that make transformers import code, read other files, or load a second model.
_ELSEWHERE = (
    "auto_map", "vocab_file", "tokenizer_file", "fast_tokenizer_files", "configuration_files", "transformers_weights",
    "quantization_config",
)  # fmt: skip
# Allowed values of other fields: no kernels from a hub, no dtype larger than the file's.
_ALLOWED = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation", "experts_implementation"), ("eager", "sdpa")),
    **dict.fromkeys(("dtype", "torch_dtype"), ("auto", "float32", "float16", "bfloat16")),
}
# BERT and its variants in transformers, with the prefix of their tokenizers' names. Each encoder is one model, runs no
# code from the folder, and allocates no more than its weights.
_BERTS = {
    "albert": "Albert", "bert": "Bert", "big_bird": "BigBird", "camembert": "Camembert", "convbert": "ConvBert",
    "data2vec-text": "Roberta", "deberta": "Deberta", "deberta-v2": "DebertaV2", "distilbert": "DistilBert",
    "electra": "Electra", "ernie": "Bert", "ibert": "Roberta", "megatron-bert": "Bert", "mobilebert": "MobileBert",
    "modernbert": "Bert", "mpnet": "MPNet", "nomic_bert": "Bert", "nystromformer": "Albert", "rembert": "RemBert",
    "roberta": "Roberta", "roberta-prelayernorm": "Roberta", "squeezebert": "SqueezeBert", "xlm-roberta": "XLMRoberta",
    "xlm-roberta-xl": "XLMRoberta",
}  # fmt: skip
_TOKENIZERS = {
    *(f"{name}Tokenizer{fast}" for name in _BERTS.values() for fast in ("", "Fast")),
    *("PreTrainedTokenizerFast", "TokenizersBackend"),
}
_MOST_LAYERS, _MOST_MODULES, _MOST_PLACES = 200, 10_000, 1 << 15
# Limit of the factor by which a tokenizer's normalizers lengthen a text, and the factor of a precompiled normalizer.
_MOST_GROWTH, _PRECOMPILED = 1024, 64
# Values of a model that its file may lack, such as those of a pooler, and additional bytes for another dtype.
_MORE_VALUES, _MORE_BYTES = 12 << 20, 100 << 20


def check_bert(folder: Path) -> None:
    """Raise BadFile if a folder could make `transformers` do more than load the BERT in it."""
    check_folder(folder, _BERTS, "BERT or a variant, such as roberta", _TOKENIZERS)


def check_folder(folder: Path, types: Collection[str], what: str, tokenizers: Collection[str] | None = None) -> None:
    """Raise BadFile if a model's folder could make `transformers` do more than load the model in it.

    Args:
        folder: the model's.
        types: allowed values of `model_type`.
        what: these models, for the message.
        tokenizers: allowed classes of tokenizers; None where no tokenizer is loaded.
    """
    files = [file for file in sorted(folder.iterdir()) if not file.is_dir()]
    shards: set[str] = set()
    for file in files:
        # No file may block its reader, as a pipe would.
        open_file(file).close()
        if file.name == "adapter_config.json":
            raise BadFile(f"it must be one model, got {file.name} of another")
        if file.name in _CONFIGURATIONS or file.name.endswith(".index.json"):
            shards |= _check_json(file, types, what, tokenizers)
        elif file.suffix == ".json":
            read_json(file)
        if file.suffix == ".txt":
            check_count(read_bytes(file).count(b"\n"), f"lines in {file.name}")
    total = values = 0
    for file in files:
        if file.name.startswith(("model", "pytorch_model")) or file.name in shards:
            size = file.stat().st_size
            if file.suffix == ".safetensors":
                total, values = total + size, values + count_values(file)
            elif file.suffix == ".bin" or file.name in shards:
                with open_file(file) as stream:
                    total, values = total + size, values + check_torch(stream, size)
    _check_numbers(read_json(folder / "config.json"))
    _check_model(folder, total, values)


def _check_json(file: Path, types: Collection[str], what: str, tokenizers: Collection[str] | None) -> set[str]:
    """Check a configuration file of a model or tokenizer; return the names of its weight files."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise BadFile(f"{file.name} in it must be a JSON object, got {type(content).__name__}")
    refused = [name for name in _ELSEWHERE if content.get(name) is not None]
    refused += [name for name, allowed in _ALLOWED.items() if content.get(name) not in (None, *allowed)]
    if refused:
        raise BadFile(
            f"{refused[0]} in its {file.name} must not run code, read other files or take memory, got "
            f"{content[refused[0]]!r:.40}"
        )
    for name, known in (("model_type", types), ("tokenizer_class", tokenizers)):
        value = content.get(name)
        if known is not None and value is not None and (type(value) is not str or value not in known):
            raise BadFile(f"{name} in its {file.name} must be that of {what}, got {value!r:.40}")
    shards = content.get("weight_map", {})
    if not isinstance(shards, dict) or any(type(one) is not str or Path(one).name != one for one in shards.values()):
        raise BadFile(f"weight_map in its {file.name} must name files of the folder")
    if _growth(content.get("normalizer")) > _MOST_GROWTH:
        raise BadFile(f"normalizer in its {file.name} must lengthen texts by a factor of at most {_MOST_GROWTH}")
    return set(shards.values())


def _growth(normalizer: Any) -> int:
    """Upper bound of the factor by which a tokenizer's normalizer lengthens a text."""
    if not isinstance(normalizer, dict):
        return 1
    most = 2 * _MOST_GROWTH
    several = normalizer.get("normalizers")
    if isinstance(several, list):
        # Bounded at each normalizer, because a list can have thousands.
        return functools.reduce(lambda growth, one: min(growth * _growth(one), most), several, 1)
    added = [normalizer.get(name) for name in ("content", "prepend")]
    charsmap = normalizer.get("precompiled_charsmap")
    if isinstance(charsmap, str):
        data = base64.b64decode(charsmap)
        # A trie, and NUL-terminated texts.
        longest = max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")))
        return _PRECOMPILED if longest <= _PRECOMPILED else most
    return 1 + sum(len(text.encode()) for text in added if isinstance(text, str))


def _check_numbers(config: dict[str, Any]) -> None:
    """Raise BadFile if a number of a configuration is too large for a model."""
    for name, value in config.items():
        most = _MOST_LAYERS if "layer" in name else 1 << 10 if name.startswith(("num_", "n_")) else 1 << 20
        most = _MOST_PLACES if "position" in name else most
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and abs(number) > most and name != "vocab_size":
                raise BadFile(f"{name} in its config.json must be at most {most}, got {number!s:.40}")


def _check_model(folder: Path, total: int, values: int) -> None:
    """Raise BadFile if a configuration's model is much larger than its weights; nothing is allocated.

    Args:
        folder: the model's folder, with a checked configuration.
        total: bytes of its weights.
        values: number of values of its weights.
    """
    import torch
    from torch.nn.modules.module import register_module_module_registration_hook

    transformers = need("transformers", "text")
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    problem = BadFile(f"its config.json must be of a model with {total} bytes of weights, got a larger one")
    if getattr(config, "sinusoidal_pos_embds", False):
        # transformers builds this table from Python numbers.
        check_count(config.hidden_size * config.max_position_embeddings, "values of its position table")
    modules = itertools.count()

    def count(*_: Any) -> None:
        if next(modules) > _MOST_MODULES:
            raise problem

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config, trust_remote_code=False)
    finally:
        hook.remove()
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    dtype = getattr(config, "dtype", None)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 0
    if parameters > values + _MORE_VALUES or parameters * size > total + _MORE_BYTES:
        raise problem


def _in(number: int, allowed: frozenset[int]) -> bool:
    return number > 0 and int(number) in allowed
