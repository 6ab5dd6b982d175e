"""Clips streamed from tar files, for data sets larger than the local disk: WebDataset shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data.dataset import WHOLE, Batch, ClipSet, Dataset, check_batch_size, checked_dtype, gather
from unicode_fast.data.store.checks import (
    StoreError,
    check_array_values,
    check_name,
    check_names,
    check_present,
    check_split,
    check_values,
)
from unicode_fast.data.store.write import check_new, explained, make_parent
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import (
    TEXT_VARIABLE,
    UNPACKED_VARIABLE,
    BadFile,
    check_size,
    limit,
    open_file,
    parse_json,
    read_npy,
)
from unicode_fast.files.writing import atomic_folder, write_text

SPEC = "webdataset:"
INDEX = "shards.json"
CLIPS_PER_SHARD = 256
# Clips in the shuffle buffer.
SHUFFLE_CLIPS = 256
STREAMED = ("train", WHOLE)
# Clips of a streamed split in memory, for probes during training and for checks.
SAMPLE_CLIPS = 1000
_FORMAT = 1
_CHUNK_BYTES = 1 << 20


def write_shards(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    clips_per_shard: int = CLIPS_PER_SHARD,
    splits: Sequence[str] | None = None,
    progress: bool = True,
) -> list[str]:
    """Write the paired clips of a data set as tar files, and at the end an index, `shards.json`.

    Each clip has a key, and one `KEY.<array>.npy` for every array, such as `KEY.audio.npy` and `KEY.class.npy`.

    Args:
        dataset: a data set with paired modalities.
        folder: the folder to make; it must not exist, and appears complete.
        clips_per_shard: clips per tar file; each rank reads whole files, so files should be many more than ranks.
        splits: splits to write; None takes every split, but "all" only if no other divides it.
        progress: show a progress bar on standard error.

    Returns:
        The written splits.

    Raises:
        ValueError: a split is unknown or not paired, or `clips_per_shard` is below 1.
        StoreError: values are invalid; the message names the clip.
        FileExistsError: `folder` exists already.
        OSError: the folder cannot be written, or the disk is full.
        MissingPackageError: webdataset is not installed.
    """
    need("webdataset", "stream")
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be at least 1, got {clips_per_shard}")
    if splits is None:
        splits = [split for split in dataset.splits if split != WHOLE or not dataset.divided]
    chosen = {split: dataset.split(split) for split in splits}
    target = Path(folder).absolute()
    check_new(target)
    try:
        make_parent(target.parent)
        with atomic_folder(target) as root:
            _write(dataset, chosen, root, clips_per_shard, progress)
    except OSError as error:
        raise explained(error, target) from error
    return list(chosen)


def _write(dataset: Dataset, chosen: dict[str, ClipSet], root: Path, clips_per_shard: int, progress: bool) -> None:
    """Write the tar files of some splits and their index."""
    webdataset = need("webdataset", "stream")
    shards: dict[str, dict[str, int]] = {}
    with tqdm(total=sum(map(len, chosen.values())), desc="writing", unit="clip", disable=not progress) as bar:
        for split, clips in chosen.items():
            positions = {name: clips.arrays[name].shape[1] for name in clips.modalities}
            check_present(split, clips.arrays, clips.modalities)
            for number, start in enumerate(range(0, len(clips), clips_per_shard)):
                stop = min(start + clips_per_shard, len(clips))
                file = f"{split}-{number:06d}.tar"
                with webdataset.TarWriter(str(root / file), mtime=0.0) as writer:
                    for clip in range(start, stop):
                        writer.write({"__key__": f"{clip:09d}", **_encoded(split, clip, clips, positions)})
                        bar.update()
                shards.setdefault(split, {})[file] = stop - start
    described = {
        "format": _FORMAT,
        "name": dataset.name,
        "modalities": {
            name: {"kind": kind.kind, "shape": list(kind.shape)} for name, kind in dataset.modalities.items()
        },
        "classes": dataset.classes,
        "shards": shards,
    }
    if dataset.preprocessor is not None:
        described["preprocessor"] = dataset.preprocessor
    if lacking := {split: counts for split, clips in chosen.items() if (counts := clips.lacking())}:
        described["lacking"] = lacking
    write_text(root / INDEX, json.dumps(described, indent=1))


def _encoded(split: str, clip: int, clips: ClipSet, positions: dict[str, int]) -> dict[str, bytes]:
    """The bytes of every array of one clip; float16 features stay float16, others become float32."""
    found = {}
    for key, array in clips.arrays.items():
        chunk = np.asarray(array[clip : clip + 1])
        check_array_values(split, key, chunk, positions, len(clips.classes), clip)
        stream = io.BytesIO()
        wider = key in clips.modalities and chunk.dtype != np.float16
        np.save(stream, chunk[0].astype(np.float32) if wider else chunk[0], allow_pickle=False)
        found[f"{key}.npy"] = stream.getvalue()
    return found


class StreamedDataset(Dataset):
    """A data set in tar files, made by `open_stream`.

    `batches` streams the splits "train" and "all"; `split("train")` is its first thousand clips. Other splits are read
    into memory at first use.
    """

    shares_batches = False

    def __init__(self, root: str, index: dict[str, Any]) -> None:
        # Imported here because media writes stores.
        from unicode_fast.media.stored import checked_preprocessor

        modalities = {name: Modality(one["kind"], tuple(one["shape"])) for name, one in index["modalities"].items()}
        super().__init__(
            Path(root), index["name"], modalities, index["classes"], {split: () for split in index["shards"]}
        )
        self.root, self.index = root, index
        self.preprocessor = checked_preprocessor(index.get("preprocessor"), modalities, exactly=True)

    def clip_sets(self, split: str) -> tuple[ClipSet, ...]:
        """The clips of a split in memory; for a streamed split only its first thousand."""
        if not super().clip_sets(split):
            most = SAMPLE_CLIPS if split in STREAMED else None
            with self._indexed():
                self._clip_sets[split] = (_collect(self.clips_of(self.shards(split)), self, most, split),)
        return super().clip_sets(split)

    def batches(
        self,
        split: str,
        names: Iterable[str],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = True,
        dtype: torch.dtype | str = torch.float32,
    ) -> StreamBatches:
        """Shuffled batches of this rank, RANK of WORLD_SIZE in the environment: its share of the `batch_size` clips.

        Raises:
            ValueError: `drop_last` is False, so ranks would differ; `batch_size` is no multiple of the number of ranks;
                or as `StreamBatches`.
        """
        if not drop_last:
            raise ValueError("keep_last_batch must be False for a stream, because ranks need equal batches, got True")
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if batch_size % world:
            raise ValueError(f"batch_size of a stream must be a multiple of its {world} ranks, got {batch_size}")
        return StreamBatches(self, split, names, batch_size // world, seed=seed, dtype=dtype, rank=rank, world=world)

    def number(self, split: str) -> int:
        """Number of clips of a split, from the index.

        Raises:
            ValueError: the split is unknown.
        """
        return sum(self.shards(split).values())

    def lacking(self, split: str) -> dict[str, int]:
        """Number of clips of a split that lack a modality, from the index.

        Raises:
            ValueError: the split is unknown.
        """
        self.shards(split)
        return dict(self.index.get("lacking", {}).get(split, {}))

    def count(self, split: str, visit: Callable[[ClipSet], None] | None = None) -> int:
        """Read all clips of a split, a thousand at a time, and count them.

        Args:
            split: name of the split.
            visit: called with each thousand.

        Raises:
            StoreError: a clip is invalid, or the number of clips differs from the index.
        """
        found, samples = 0, self.clips_of(self.shards(split))
        expected = sum(self.index["shards"][split].values())
        while found < expected:
            with self._indexed():
                clips = _collect(samples, self, min(SAMPLE_CLIPS, expected - found), split)
                check_values(split, clips.arrays, clips.modalities, self.classes)
            if visit is not None:
                visit(clips)
            found += len(clips)
        next(samples, None)  # checks the end of the last file
        return found

    def shards(self, split: str) -> dict[str, int]:
        """The tar files of a split, with the number of clips in each.

        Raises:
            ValueError: the split is unknown.
        """
        if split not in self.index["shards"]:
            raise ValueError(f"split must be one of {list(self.index['shards'])}, got {split!r}")
        return self.index["shards"][split]

    def clips_of(self, shards: Mapping[str, int]) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each clip of some tar files, in order; "__clip__" is its number.

        Raises:
            StoreError: a file is damaged, or its number of clips differs from the index.
            OSError: a file cannot be opened.
        """
        first: tuple[str, dict[str, Any]] | None = None
        for file, expected in shards.items():
            place, found = f"{self.root}/{file}", 0
            for clip in _samples(place):
                found += 1
                if found > expected:
                    break
                # Strings may differ in length.
                forms = {key: (one.shape, one.dtype.kind if one.dtype.kind in "US" else one.dtype)
                         for key, one in clip.items()}  # fmt: skip
                first = first or (place, forms)
                if forms != first[1]:
                    key = next(key for key in {**forms, **first[1]} if forms.get(key) != first[1].get(key))
                    raise StoreError(
                        f"{place} must hold clips with the arrays and shapes of {first[0]}, got another {key!r} in "
                        f"clip {clip['__clip__']}"
                    )
                yield clip
            if found != expected:
                raise StoreError(f"{place} must hold the {expected} clips in {INDEX}, got {found}")

    @contextlib.contextmanager
    def _indexed(self) -> Iterator[None]:
        """Add the index's path to errors of clips and missing files."""
        where = f"{self.root}/{INDEX}"
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, f"{where} must list existing files, got a missing one", error.filename
            ) from error
        except StoreError as error:
            raise StoreError(f"{error}; its index is {where}") from error

    def __repr__(self) -> str:
        """Kind, name, folder and number of clips."""
        counts = ", ".join(f"{split}: {sum(shards.values())}" for split, shards in self.index["shards"].items())
        return f"{type(self).__name__}({self.name!r}, {self.root!r}, {counts})"

    def digest(self) -> str:
        """A checksum of the index."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()


class StreamBatches:
    """Batches from tar files in an order that depends on (seed, epoch, rank, world) alone.

    The files of an epoch are shuffled and divided among the ranks; the clips of a rank are shuffled in a buffer. Every
    rank has the same number of batches in every epoch, given by the smallest files that a rank can get. Batches should
    be read in order; a step out of order reads its epoch from the start.

    Args:
        data: a data set from `open_stream`.
        split: its split.
        names: modalities in order.
        batch_size: B of this rank.
        seed: any integer >= 0.
        dtype: dtype of features and labels.
        rank: rank of this process.
        world: number of ranks.
        shuffle_clips: size of the shuffle buffer.

    Raises:
        ValueError: files are fewer than ranks, or clips fewer than a batch; or a number is out of range.
    """

    def __init__(  # noqa: PLR0913 - the arguments of `Batches`, and the rank
        self,
        data: StreamedDataset,
        split: str,
        names: Iterable[str],
        batch_size: int,
        *,
        seed: int = 0,
        dtype: torch.dtype | str = torch.float32,
        rank: int = 0,
        world: int = 1,
        shuffle_clips: int = SHUFFLE_CLIPS,
    ) -> None:
        check_batch_size(batch_size)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in [0, {world}), got {rank}")
        self.data, self.names, self.batch_size, self.seed = data, list(names), batch_size, seed
        self.dtype, self.rank, self.world, self.shuffle_clips = checked_dtype(dtype), rank, world, shuffle_clips
        self.split, self.shards = split, data.shards(split)
        if len(self.shards) < world:
            raise ValueError(
                f"shards of split {split!r} must be at least one for each of {world} ranks, got {len(self.shards)}"
            )
        smallest = sorted(self.shards.values())[: len(self.shards) // world]
        self.steps_per_epoch = sum(smallest) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"clips must be at least one batch of {batch_size} for each of {world} ranks, got {sum(smallest)}"
            )
        self._next = -1
        self._clips: Iterator[dict[str, np.ndarray]] = iter(())

    def size(self, step: int) -> int:
        """Number of clips of all ranks in the batch at this global step."""
        return self.batch_size * self.world

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """The clips' own names or numbers, of this rank alone."""
        return batch.id

    def batch(self, step: int, own: slice = slice(None), *, keep_halves: bool = False) -> Batch:
        """The batch of this rank at this global step, counted from 0 over all epochs; `own` is always all of it."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        if step != self._next or place == 0:
            self._clips = self._epoch(epoch)
            for _ in range(place * self.batch_size):
                next(self._clips)
        self._next = step + 1
        found = _collect(self._clips, self.data, self.batch_size, self.split).restrict(self.names)
        return gather(found, np.arange(self.batch_size), self.dtype, keep_halves=keep_halves)

    def _epoch(self, epoch: int) -> Iterator[dict[str, np.ndarray]]:
        """This rank's clips of an epoch."""
        webdataset = need("webdataset", "stream")
        draws = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.shards))
        files = list(self.shards)
        mine = [files[number] for number in np.argsort(draws, kind="stable")[self.rank :: self.world]]
        # One rank may get all the smallest files; `steps_per_epoch` ends every rank after that many batches.
        drawing = random.Random(f"{self.seed} {epoch} {self.rank} {self.world}")
        shuffle = webdataset.shuffle(self.shuffle_clips, initial=self.shuffle_clips, rng=drawing)
        return iter(shuffle(self.data.clips_of({file: self.shards[file] for file in mine})))


def open_stream(root: str) -> StreamedDataset:
    """Open a folder, or a URL of http or https, with `shards.json` and its tar files.

    Raises:
        FileNotFoundError: the index is missing.
        ValueError: `root` is another kind of URL.
        StoreError: the index is invalid.
        MissingPackageError: webdataset is not installed.
        OSError: the index cannot be fetched.
    """
    need("webdataset", "stream")
    _check_root(root)
    place = f"{root.rstrip('/')}/{INDEX}"
    try:
        with _opened(place) as stream:
            data = _exactly(stream, limit(TEXT_VARIABLE) + 1, short=True)
        check_size(len(data), TEXT_VARIABLE)
        index = parse_json(data)
        _check_index(index)
        return StreamedDataset(root.rstrip("/"), index)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, f"data must be a folder with an index {INDEX}", root) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise StoreError(f"{place} must be an index of write_shards, but cannot be read: {what}") from error


def _check_root(root: str) -> None:
    """Raise ValueError if the root is another kind of URL, such as pipe:COMMAND."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", root)
    if scheme and not _is_url(root) and not Path(root).is_dir():
        raise ValueError(f"{SPEC} must be followed by a folder, http:// or https://, got {scheme[0]!r}")


def _is_url(place: str) -> bool:
    return place.lower().startswith(("http://", "https://"))


def _check_index(index: Any) -> None:
    """Raise unless every entry of an index has a valid type, and its files are in the same folder."""
    if index["format"] != _FORMAT:
        raise BadFile(f"format must be {_FORMAT}, got {index['format']!r:.80}")
    check_names({name: Modality(one["kind"], one["shape"]) for name, one in index["modalities"].items()}, [])
    for name, kind in (("name", str), ("classes", list)):
        if type(index[name]) is not kind:
            raise BadFile(f"{name} must be a {kind.__name__}, got {type(index[name]).__name__}")
    check_names({"any": Modality("vector", (1,))}, index["classes"])
    for split, files in index["shards"].items():
        check_name("a split", split, "_.")
        if type(files) is not dict or not all(type(count) is int and 0 < count < 1 << 40 for count in files.values()):
            raise BadFile(f"files of split {split!r} must have positive numbers of clips, got {files!r:.80}")
        wrong = [file for file in files if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar", file)]
        if wrong:
            raise BadFile(f"files of split {split!r} must have plain names that end in .tar, got {wrong[0][:80]!r}")
    for split, counts in index.get("lacking", {}).items():
        if not all(name in index["modalities"] and type(count) is int and count > 0 for name, count in counts.items()):
            raise BadFile(f"lacking clips of split {split!r} must be positive numbers by modality, got {counts!r:.80}")


@contextlib.contextmanager
def _opened(place: str) -> Iterator[IO[bytes]]:
    """A file or a URL of http or https, open for one read; no other program is called."""
    if not _is_url(place):
        with open_file(place) as file:
            yield file
        return
    opener = urllib.request.OpenerDirector()
    # Without handlers of local files and ftp, because a server could redirect to them.
    for handler in _HANDLERS:
        opener.add_handler(handler())
    for attempt in range(_ATTEMPTS):
        try:
            response = opener.open(place, timeout=_TIMEOUT)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 0)
            if code == 404:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), place) from error
            if attempt + 1 == _ATTEMPTS or 400 <= code < 500:
                raise OSError(errno.EIO, f"the URL must be available, got: {error}", place) from error
            time.sleep(_PAUSE)
    try:
        with response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        raise OSError(errno.EIO, f"the URL must be readable to its end, got: {error}", place) from error


_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)
_ATTEMPTS, _PAUSE, _TIMEOUT = 5, 2.0, 60.0


def _samples(place: str) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each clip of a tar file, as in `StreamedDataset.clips_of`."""
    try:
        with _opened(place) as stream:
            for key, files in itertools.groupby(_members(stream), lambda member: member[0].partition(".")[0]):
                yield _decoded(key, files, place)
    except BadFile as error:
        raise StoreError(f"{place} must be a whole tar file, but cannot be read: {error}") from error


def _decoded(key: str, files: Iterable[tuple[str, bytes]], place: str) -> dict[str, np.ndarray]:
    """The arrays of one clip."""
    if not re.fullmatch(r"[0-9]{1,18}", key):
        raise BadFile(f"its clips must have numbers as keys, got {key[:80]!r}")
    arrays = {"__clip__": np.array(int(key))}
    for name, data in files:
        array = name.partition(".")[2]
        if not array.endswith(".npy"):
            continue
        try:
            if array.removesuffix(".npy") in arrays:
                raise BadFile("it occurs twice")
            arrays[array.removesuffix(".npy")] = read_npy(io.BytesIO(data), len(data))
        except BadFile as error:
            where = f"{array} of clip {key} in {place}"
            raise StoreError(f"{where} must be a .npy file of numbers, but cannot be read: {error}") from error
    return arrays


def _members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each plain file in a tar; nothing is extracted to disk.

    Raises:
        BadFile: the tar is damaged, or has a member that is a link, a device, sparse, or larger than a limit.
    """
    longer: dict[str, str] = {}
    while True:
        block = _exactly(stream, _BLOCK)
        if not block.strip(b"\0"):
            return
        if _number(block[148:156]) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
            raise BadFile("the checksum of a header differs")
        kind, size = block[156:157], _number(block[124:136])
        if "size" in longer:
            size = _number(longer["size"].encode(), 10)
        check_size(size, TEXT_VARIABLE if kind in b"xL" else UNPACKED_VARIABLE)
        if kind not in _KINDS or any(name.startswith("GNU.sparse") for name in longer):
            raise BadFile(f"it has a member of type {kind.decode('latin1')!r}, which is no plain file")
        data = _exactly(stream, size)
        _exactly(stream, -size % _BLOCK)
        if kind == b"x":
            longer = _extended(data)
        elif kind == b"L":
            longer = {"path": data.rstrip(b"\0").decode("utf-8", "replace")}
        else:
            above = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
            name = b"/".join(filter(None, (above, block[:100].split(b"\0")[0]))).decode("utf-8", "replace")
            name, longer = longer.get("path", name), {}
            if kind != b"5":
                yield name, data


# Plain files of old and new tars, folders, and headers with a longer name for the next member.
_BLOCK, _KINDS = 512, (b"0", b"\0", b"5", b"x", b"L")


def _number(field: bytes, base: int = 8) -> int:
    text = field.strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+" if base == 8 else rb"[0-9]{1,18}", text):
        raise BadFile("a number in a header is invalid")
    return int(text, base)


def _extended(data: bytes) -> dict[str, str]:
    """The used records of an extended header; a record consists of its length, a name, "=", a value and a line end."""
    found, place = {}, 0
    while place < len(data):
        record = re.compile(rb"([0-9]{1,8}) ([^=\n]*)=").match(data, place)
        end = place + int(record[1]) if record else 0
        if record is None or not record.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise BadFile("an extended header is damaged")
        name = record[2].decode("utf-8", "replace")
        if name in ("path", "size") or name.startswith("GNU.sparse"):
            found[name] = data[record.end() : end - 1].decode("utf-8", "replace")
        place = end
    return found


def _exactly(stream: IO[bytes], count: int, short: bool = False) -> bytes:
    """Exactly `count` bytes of a stream; fewer only with `short`."""
    chunks, rest = [], count
    while rest and (chunk := stream.read(min(rest, _CHUNK_BYTES))):
        chunks.append(chunk)
        rest -= len(chunk)
    if rest and not short:
        raise BadFile("it is cut short")
    return b"".join(chunks)


def _collect(clips: Iterator[dict[str, np.ndarray]], data: Dataset, count: int | None, split: str) -> ClipSet:
    """The next clips in memory, or all if `count` is None."""
    found = list(itertools.islice(clips, count))
    if not found:
        raise StoreError(f"split {split!r} must hold at least one clip, got none")
    arrays = {key: np.stack([clip[key] for clip in found]) for key in found[0]}
    index = arrays.pop("__clip__").astype(np.int64)
    check_split(split, arrays, data.modalities, data.classes)
    return ClipSet(arrays, data.modalities, data.classes, index)
