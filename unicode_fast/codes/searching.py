"""Search across modalities: clips of one modality by the codes of a sentence, a file, or a clip of another modality."""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from unicode_fast.codes.digests import model_digest
from unicode_fast.codes.files import backbones_of, encode_features, encode_file
from unicode_fast.codes.folder import CodesError, CodesFolder
from unicode_fast.codes.sources import encoded_clips, modalities_of, splits_of
from unicode_fast.data import ClipSet, Dataset, Store, built_in
from unicode_fast.data.cache import check_ours
from unicode_fast.data.layouts import has_sentences
from unicode_fast.data.talking_digits.sentences import LONGEST, sentence_vectors
from unicode_fast.data.text import WordVectors
from unicode_fast.errors import one_line, say
from unicode_fast.files.paths import cache_folder
from unicode_fast.files.tensor_files import read_tensors, write_tensors
from unicode_fast.files.untrusted import BadFile
from unicode_fast.media.backbones import WINDOW_STEPS
from unicode_fast.media.captions import SUFFIXES
from unicode_fast.modules.model import UniCode
from unicode_fast.modules.wrapped import unwrapped_unicode
from unicode_fast.tasks.metrics.ranking import cosine
from unicode_fast.tasks.retrieval import mean_over_positions

# Before the name of a clip, as a query.
ID = "id:"
# Clips whose codewords are in memory together.
_CHUNK_CLIPS = 512
# Names of clips that are compared with a misspelt one.
_COMPARED = 10_000
# Names of arrays with the words of a clip, by whom: `extract`, built-in data.
_CAPTIONS = ("caption", "text.sentence")


class Hit(NamedTuple):
    """A clip that a search has found.

    Attributes:
        rank: from 1.
        score: cosine similarity with the query.
        id: of the clip.
        split: of the clip.
        file: path relative to the folder of the media; None if unknown.
        start_s: beginning in seconds of the file; None if unknown.
        caption: words of the clip; None if unknown.
    """

    rank: int
    score: float
    id: str
    split: str
    file: str | None
    start_s: float | None
    caption: str | None


class Gallery:
    """The clips of a data set with one modality, to be searched.

    A clip's vector is the mean of its codewords, as in the retrieval without a head of `tasks`.

    Args:
        model: whose codes are compared.
        dataset: no stream.
        modality: of the clips.
        splits: whose clips are searched; None for all.
        codes: a folder of `encode` with the codes of these clips; None encodes them. Codes of a feature store are kept
            in the cache folder, so that the next search does not encode.
        progress: show a progress bar on standard error while clips are encoded.

    Attributes:
        vectors: (n, D) float32.

    Raises:
        ValueError: a split or the modality is unknown, or no clip has the modality.
        CodesError: the folder of codes is of another model, or lacks a clip.
    """

    def __init__(  # noqa: PLR0913 - what is searched, and where its codes come from
        self,
        model: UniCode,
        dataset: Dataset,
        modality: str,
        *,
        splits: Sequence[str] | None = None,
        codes: CodesFolder | None = None,
        progress: bool = True,
    ) -> None:
        model = unwrapped_unicode(model)
        modalities_of(model, dataset.modalities, [modality], "in")
        self.members: list[tuple[str, ClipSet, int]] = []
        found = [np.zeros((0, sum(book.shape[1] for book in model.codebooks)), np.float32)]
        for split in splits_of(dataset, splits):
            if any(modality in clips.modalities for clips in dataset.clip_sets(split)):
                clips = dataset.clips(split, modality)
                index, length = _codes_of(_Wanted(model, dataset, split, modality, codes, progress))
                there = np.flatnonzero(length)
                found.append(_means(model, index[there], length[there]))
                self.members += [(split, clips, int(number)) for number in there]
        if not self.members:
            raise ValueError(f"in must be a modality of a clip in the searched splits, got {modality!r}")
        self.vectors = np.concatenate(found)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.members)

    def nearest(self, query: np.ndarray, top: int = 10) -> list[Hit]:
        """The clips of the highest cosine similarity with a vector; of equal ones those that come first in the data.

        Args:
            query: (D,), as `embed_query` gives.
            top: number of clips.

        Raises:
            ValueError: `top` is below 1.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        similarity = cosine(query[None], self.vectors)[0]
        order = np.argsort(-similarity, kind="stable")[:top]
        return [self._hit(rank, int(place), float(similarity[place])) for rank, place in enumerate(order, 1)]

    def _hit(self, rank: int, place: int, score: float) -> Hit:
        split, clips, number = self.members[place]
        captions = [str(clips.arrays[key][number]) for key in _CAPTIONS if key in clips.arrays]
        file, start = clips.arrays.get("file"), clips.arrays.get("start")
        return Hit(
            rank,
            score,
            str(clips.id[number]),
            split,
            None if file is None else str(file[number]),
            None if start is None else float(start[number]),
            captions[0] if captions else None,
        )


def search(  # noqa: PLR0913 - the query, and what is searched
    model: UniCode,
    dataset: Dataset,
    query: str,
    modality: str,
    *,
    top: int = 10,
    source: str | None = None,
    splits: Sequence[str] | None = None,
    codes: CodesFolder | None = None,
    progress: bool = True,
) -> list[Hit]:
    """Find the clips whose codes are nearest to those of a query.

    For many queries make a `Gallery` once, and call its `nearest` with the result of `embed_query`.

    Args:
        model: whose codes are compared.
        dataset: whose clips are searched.
        query: as in `embed_query`.
        modality: in which clips are searched.
        top: number of clips.
        source: modality of the query, as in `embed_query`.
        splits: as in `Gallery`.
        codes: as in `Gallery`.
        progress: as in `Gallery`.

    Raises:
        As `Gallery` and `embed_query`.
    """
    vector = embed_query(model, dataset, query, modality, source=source, splits=splits)
    return Gallery(model, dataset, modality, splits=splits, codes=codes, progress=progress).nearest(vector, top)


def embed_query(  # noqa: PLR0913 - the query, and what it is compared with
    model: UniCode,
    dataset: Dataset,
    query: str,
    modality: str,
    *,
    source: str | None = None,
    splits: Sequence[str] | None = None,
) -> np.ndarray:
    """The vector of a query, (D,) float32, of length 1.

    Each modality of the query is the mean of its codewords, over all windows of a file. Several are averaged after each
    has been brought to length 1.

    Args:
        model: whose codes are compared.
        dataset: whose clips are searched.
        query: `id:CLIP`, a clip of the data; a media file; or else a sentence.
        modality: in which clips are searched.
        source: modality of the query; None takes all that the query has, without the searched one if it has others.
        splits: in which a clip of the data is looked up; None for all.

    Raises:
        ValueError: the clip is unknown or in several splits, or the query has no modality that the model can read.
        FileNotFoundError: the query is named as a media file, and does not exist.
        MediaError: the file cannot be decoded.
        MissingPackageError: a package is not installed.
    """
    model = unwrapped_unicode(model)
    if source is not None and source not in model.names:
        raise ValueError(f"from must be one of {', '.join(model.names)}, got {source!r}")
    if not query.strip():
        raise ValueError("query must be a sentence, a media file or id:CLIP, got an empty text")
    names = list(model.names) if source is None else [source]
    if query.startswith(ID):
        found = _of_clip(model, dataset, query.removeprefix(ID), names, splits_of(dataset, splits))
    elif Path(query).is_file():
        found = _of_file(model, query, names)
    elif Path(query).suffix.lower() in SUFFIXES and len(query.split()) == 1:
        raise FileNotFoundError(f"query must be an existing file, got {query!r}")
    else:
        found = _of_sentence(model, query, names)
    if not found:
        raise ValueError(f"query must have modality {' or '.join(names)}, got none in {query!r}")
    if source is None and len(found) > 1:
        found.pop(modality, None)
    units = [_unit(_means(model, codes[None], np.array([len(codes)]))[0]) for codes in found.values()]
    return _unit(np.mean(units, 0))


def _unit(vector: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vector)
    return (vector / norm if norm > 0 else vector).astype(np.float32)


def _of_clip(
    model: UniCode, dataset: Dataset, id: str, names: Sequence[str], splits: Sequence[str]
) -> dict[str, np.ndarray]:
    """Codes of a clip of the data, (T,) by modality."""
    found: dict[str, np.ndarray] = {}
    there, known = list[str](), list[str]()
    for split in splits:
        for clips in dataset.clip_sets(split):
            ids = clips.id.astype(str)
            known += ids.tolist()
            places = np.flatnonzero(ids == id)[:1]
            there += [split] * len(places)
            for name in names:
                if len(places) and name in clips.modalities:
                    codes = next(encoded_clips(model, clips, name, places))[1]
                    if codes is not None:
                        found[name] = codes.index.cpu().numpy()
    if len(set(there)) > 1:
        raise ValueError(f"query must name a clip of one split, {id!r} is in {', '.join(there)}; splits chooses one")
    if not there:
        near = difflib.get_close_matches(id, known[:_COMPARED], 1)
        meant = f", is {near[0]!r} meant?" if near else ""
        raise ValueError(f"query must name a clip of {', '.join(splits)}, got {id!r}{meant}")
    return found


def _of_file(model: UniCode, file: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Codes of all windows of a media file, by modality."""
    clips = encode_file(model, file, names=names)
    return {
        name: np.concatenate([clip.codes[name].index.cpu().numpy() for clip in clips if name in clip.codes])
        for name in names
        if any(name in clip.codes for clip in clips)
    }


def _of_sentence(model: UniCode, sentence: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Codes of the words of a sentence, by modality."""
    vectors = _word_vectors(model, sentence, names)
    if not vectors:
        raise ValueError(
            f"query must be id:CLIP or a media file, because {' and '.join(names)} of this model "
            f"{'reads' if len(names) == 1 else 'read'} no sentences, got {sentence!r}"
        )
    return {name: found.index.cpu().numpy() for name, found in encode_features(model, vectors).items()}


def _word_vectors(model: UniCode, sentence: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """(words, E) by modality, as the features of the model's training data were made; {} where that is unknown."""
    data, words = model.config.data, sentence.split()
    if model.preprocessor is not None:
        readers = [name for name, one in model.preprocessor["modalities"].items() if one["reads"] == "caption"]
        found = {}
        for name, backbone in backbones_of(model, [name for name in readers if name in names]).items():
            _check_words(backbone.words(sentence) if hasattr(backbone, "words") else words, WINDOW_STEPS)
            found[name] = backbone(sentence)
        if any(len(one) == 0 for one in found.values()):
            raise ValueError(f"query must have a word that the text backbone knows, got {sentence!r}")
        return found
    kinds = [name for name in names if model.modalities[name].kind == "words"]
    if data.data in built_in.DATASETS:
        _check_words(words, LONGEST)
        return {name: sentence_vectors([words])[0][0, : len(words)] for name in kinds}
    if has_sentences(data.data):
        vectors = WordVectors(data.text_model, data.text_whitelist or None).vectors(sentence)
        unread = LONGEST - len(vectors) if data.text_padding == "read" else 0
        return {name: np.pad(vectors, ((0, unread), (0, 0))) for name in kinds}
    return {}


def _check_words(words: Sequence[str], most: int) -> None:
    if len(words) > most:
        raise ValueError(f"query must have at most {most} words, got {len(words)}")


def _means(model: UniCode, index: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(n, D) float32 mean codewords of clips with codes (n, T) and at least one valid position each."""
    found = [np.zeros((0, sum(book.shape[1] for book in model.codebooks)), np.float32)]
    for start in range(0, len(index), _CHUNK_CLIPS):
        chunk = slice(start, start + _CHUNK_CLIPS)
        vectors = model.vectors(torch.from_numpy(index[chunk]).to(model.device)).cpu().numpy()
        found.append(mean_over_positions(vectors, np.arange(index.shape[1]) < length[chunk, None]))
    return np.concatenate(found)


class _Wanted(NamedTuple):
    """The codes of one modality of a split."""

    model: UniCode
    dataset: Dataset
    split: str
    modality: str
    folder: CodesFolder | None
    progress: bool


def _codes_of(wanted: _Wanted) -> tuple[np.ndarray, np.ndarray]:
    """Codes (n, T) int64, 0 after the last position, and their lengths (n,): from a folder, the cache, or encoded."""
    clips = wanted.dataset.clips(wanted.split, wanted.modality)
    if wanted.folder is not None:
        return _of_folder(wanted, clips, wanted.folder)
    if not isinstance(wanted.dataset, Store):
        # Without checksums of the features, nothing tells whether codes are still theirs.
        return _encoded(wanted, clips)
    key = {
        "model": model_digest(wanted.model),
        "data": wanted.dataset.digest(),
        "split": wanted.split,
        "modality": wanted.modality,
        "torch": torch.__version__,
        "device": wanted.model.device.type,
    }
    folder = cache_folder() / "codes"
    check_ours(folder)
    file = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    try:
        content, tensors = read_tensors(file)
        index, length = tensors["index"].numpy(), tensors["length"].numpy()
        _check_codes(wanted, clips, index, length)
        if content != key:
            raise BadFile("it is of other codes")
        return index, length
    except FileNotFoundError:
        pass
    except (BadFile, KeyError) as error:
        say(one_line(f"note: making cache file {file} again: {error}"), sys.stderr)
    index, length = _encoded(wanted, clips)
    write_tensors(file, {"index": torch.from_numpy(index), "length": torch.from_numpy(length)}, key)
    return index, length


def _check_codes(wanted: _Wanted, clips: ClipSet, index: np.ndarray, length: np.ndarray) -> None:
    if index.dtype != np.int64 or length.dtype != np.int64 or index.ndim != 2 or length.shape != (len(clips),):
        raise BadFile("it must have codes (n, T) and lengths (n,) int64")
    codes = wanted.model.codewords
    if len(index) != len(clips) or not np.array_equal(length, clips.lengths[wanted.modality]):
        raise BadFile("it has other clips")
    if index.shape[1] < length.max(initial=0) or index.min(initial=0) < 0 or index.max(initial=0) >= codes:
        raise BadFile(f"its codes must be in [0, {codes})")


def _encoded(wanted: _Wanted, clips: ClipSet) -> tuple[np.ndarray, np.ndarray]:
    length = np.array(clips.lengths[wanted.modality], np.int64)
    index = np.zeros((len(clips), int(length.max(initial=1))), np.int64)
    found = encoded_clips(wanted.model, clips, wanted.modality, np.arange(len(clips)))
    described = f"encoding {wanted.modality} of {wanted.split}"
    for number, codes in tqdm(
        found, described, len(clips), unit="clip", disable=not wanted.progress, dynamic_ncols=True
    ):
        if codes is not None:
            index[number, : length[number]] = codes.index.cpu().numpy()
    return index, length


def _of_folder(wanted: _Wanted, clips: ClipSet, folder: CodesFolder) -> tuple[np.ndarray, np.ndarray]:
    if folder.header.get("model_sha256") != model_digest(wanted.model):
        raise CodesError(f"codes must be of the model that searches, {folder.path} has those of another one")
    rows: Mapping[str, np.ndarray] = {
        row.id: row.codes for row in folder.rows if (row.split, row.modality) == (wanted.split, wanted.modality)
    }
    length = np.array(clips.lengths[wanted.modality], np.int64)
    index = np.zeros((len(clips), int(length.max(initial=1))), np.int64)
    for number, id in enumerate(clips.id.astype(str)):
        if length[number]:
            codes = rows.get(str(id), np.empty(0, np.int64))
            if len(codes) != length[number]:
                raise CodesError(
                    f"codes must have {wanted.modality!r} of clip {str(id)!r} of split {wanted.split!r} with "
                    f"{length[number]} positions, {folder.path} has {len(codes)}"
                )
            index[number, : len(codes)] = codes
    return index, length
