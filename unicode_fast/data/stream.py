"""Clips in tar files that are read as a stream, for sets that no disk at hand holds: WebDataset shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from unicode_fast.config import Modality
from unicode_fast.data.batches import Batch, check_batch_size, checked_dtype, gather
from unicode_fast.data.dataset import WHOLE, ClipSet, Dataset
from unicode_fast.data.files import need
from unicode_fast.data.store_checks import StoreError, check_array_values, check_split, check_values
from unicode_fast.data.store_write import check_new, explained, make_parent
from unicode_fast.writing import atomic_folder, write_text

SPEC = "webdataset:"
INDEX = "shards.json"
CLIPS_PER_SHARD = 256
# Clips that wait in memory to be drawn from.
SHUFFLE_CLIPS = 256
STREAMED = ("train", WHOLE)
# Of a split that is streamed, what is held in memory to look at and to train the quick probes on.
SAMPLE_CLIPS = 1000
_FORMAT = 1


def write_shards(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    clips_per_shard: int = CLIPS_PER_SHARD,
    splits: Sequence[str] | None = None,
    progress: bool = True,
) -> None:
    """Write the paired clips of a data set as tar files, with an index `shards.json`, which comes last.

    Each clip has a key, and one `KEY.<array>.npy` for every array, such as `KEY.audio.npy` and `KEY.class.npy`.

    Args:
        dataset: whose modalities are paired.
        folder: to make; it must not exist. It appears when all is written.
        clips_per_shard: of a tar file; ranks take whole files, so there should be many times more files than ranks.
        splits: which ones; None takes all, but for "all" where others divide it.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: a split is unknown, or has clips of their own in each modality, or the number is below 1.
        StoreError: the values are not what they must be; the clip is named.
        FileExistsError: `folder` exists already.
        OSError: it cannot be written, or the disk is full.
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


def _write(dataset: Dataset, chosen: dict[str, ClipSet], root: Path, clips_per_shard: int, progress: bool) -> None:
    """The tar files of some splits and their index."""
    webdataset = need("webdataset", "stream")
    shards: dict[str, dict[str, int]] = {}
    with tqdm(total=sum(map(len, chosen.values())), desc="writing", unit="clip", disable=not progress) as bar:
        for split, clips in chosen.items():
            steps = {name: clips.arrays[name].shape[1] for name in clips.modalities}
            for number, start in enumerate(range(0, len(clips), clips_per_shard)):
                stop = min(start + clips_per_shard, len(clips))
                file = f"{split}-{number:06d}.tar"
                with webdataset.TarWriter(str(root / file), mtime=0.0) as writer:
                    for clip in range(start, stop):
                        writer.write({"__key__": f"{clip:09d}", **_encoded(split, clip, clips, steps)})
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
    write_text(root / INDEX, json.dumps(described, indent=1))


def _encoded(split: str, clip: int, clips: ClipSet, steps: dict[str, int]) -> dict[str, bytes]:
    """The bytes of every array of one clip, features in float32, or float16 where they are."""
    found = {}
    for key, array in clips.arrays.items():
        piece = np.asarray(array[clip : clip + 1])
        check_array_values(split, key, piece, steps, len(clips.classes), clip)
        stream = io.BytesIO()
        wider = key in clips.modalities and piece.dtype != np.float16
        np.save(stream, piece[0].astype(np.float32) if wider else piece[0], allow_pickle=False)
        found[f"{key}.npy"] = stream.getvalue()
    return found


class StreamedDataset(Dataset):
    """A data set in tar files, made by `open_stream`.

    Its splits train and all are streamed by `batches`; `split("train")` is its first thousand clips. Other splits are
    read whole when they are first asked for.
    """

    shares_batches = False

    def __init__(self, root: str, index: dict[str, Any]) -> None:
        modalities = {name: Modality(one["kind"], tuple(one["shape"])) for name, one in index["modalities"].items()}
        super().__init__(
            Path(root), index["name"], modalities, index["classes"], {split: () for split in index["shards"]}
        )
        self.root, self.index = root, index

    def parts(self, split: str) -> tuple[ClipSet, ...]:
        """The clips of a split in memory; of train those of the first files alone."""
        if not super().parts(split):
            urls = shard_urls(self.root, self.index, split)
            limit = SAMPLE_CLIPS if split in STREAMED else None
            self._parts[split] = (_collect(_samples(urls), self, limit, split),)
        return super().parts(split)

    def batches(
        self,
        split: str,
        names: Iterable[str],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = True,
        dtype: torch.dtype | str = torch.float32,
    ) -> StreamBatches:
        """Shuffled batches of this rank, RANK of WORLD_SIZE in the environment, its share of `batch_size` clips.

        Raises:
            ValueError: `drop_last` is False: ranks would differ; `batch_size` is no multiple of the number of ranks;
                or as `StreamBatches`.
        """
        if not drop_last:
            raise ValueError("keep_last_batch must be False for a stream, whose ranks have equal batches, got True")
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if batch_size % world:
            raise ValueError(f"batch_size of a stream must be a multiple of its {world} ranks, got {batch_size}")
        return StreamBatches(self, split, names, batch_size // world, seed=seed, dtype=dtype, rank=rank, world=world)

    def count(self, split: str) -> int:
        """Read all clips of a split, a thousand at a time, and count them.

        Raises:
            StoreError: a clip is not what it must be, or the files hold another number of clips than the index says.
        """
        found, clips = 0, _samples(shard_urls(self.root, self.index, split))
        wanted = sum(self.index["shards"][split].values())
        while found < wanted:
            part = _collect(clips, self, min(SAMPLE_CLIPS, wanted - found), split)
            check_values(split, part.arrays, part.modalities, self.classes)
            found += len(part)
        if next(clips, None) is not None:
            raise StoreError(f"files of split {split!r} must hold the {wanted} clips that the index lists, got more")
        return found

    def digest(self) -> str:
        """A checksum of the index."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()


class StreamBatches:
    """Batches from tar files in an order that depends on (seed, epoch, rank, world) alone.

    The files of an epoch are shuffled and dealt out to the ranks; the clips of a rank pass through a buffer from which
    they are drawn. Every rank has the same number of batches in every epoch: as many as the smallest files that a rank
    can get are good for. Batches are meant to be asked for in order; another step reads its epoch from the start.

    Args:
        data: what `open_stream` returns.
        split: of it.
        names: modalities in order.
        batch_size: B of this rank.
        seed: any integer >= 0.
        dtype: of features and labels.
        rank: of this process.
        world: number of ranks.
        shuffle_clips: size of the buffer.

    Raises:
        ValueError: there are fewer files than ranks, or fewer clips than a batch; or a number is out of range.
    """

    def __init__(  # noqa: PLR0913 - as `Batches`, and the rank
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
        self.split, self.urls = split, shard_urls(data.root, data.index, split)
        if len(self.urls) < world:
            raise ValueError(
                f"shards of split {split!r} must be at least one for each of {world} ranks, got {len(self.urls)}"
            )
        smallest = sorted(data.index["shards"][split].values())[: len(self.urls) // world]
        self.steps_per_epoch = sum(smallest) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"clips must be at least one batch of {batch_size} for each of {world} ranks, got {sum(smallest)}"
            )
        self._next = -1
        self._clips: Iterator[dict[str, np.ndarray]] = iter(())

    def size(self, step: int) -> int:
        """Number of clips in the batch at this global step, those of all ranks."""
        return self.batch_size * self.world

    def ids(self, step: int, batch: Batch) -> np.ndarray:
        """Those of this rank: the others read theirs by themselves."""
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
        if len(found) < self.batch_size:
            raise StoreError(
                f"files of split {self.split!r} in {self.data.root} must hold the clips that {INDEX} lists, got fewer"
            )
        return gather(found, np.arange(self.batch_size), self.dtype, keep_halves=keep_halves)

    def _epoch(self, epoch: int) -> Iterator[dict[str, np.ndarray]]:
        """This rank's clips of an epoch."""
        webdataset = need("webdataset", "stream")
        draws = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(len(self.urls))
        mine = [self.urls[number] for number in np.argsort(draws, kind="stable")[self.rank :: self.world]]
        # The smallest files can be dealt to one rank, so all ranks stop at what that one has.
        drawing = random.Random(f"{self.seed} {epoch} {self.rank} {self.world}")
        shuffle = webdataset.shuffle(self.shuffle_clips, initial=self.shuffle_clips, rng=drawing)
        return iter(shuffle(_samples(mine)))


def shard_urls(root: str, index: dict[str, Any], split: str) -> list[str]:
    """The places of the tar files of a split.

    Raises:
        ValueError: there is no such split.
    """
    if split not in index["shards"]:
        raise ValueError(f"split must be one of {list(index['shards'])}, got {split!r}")
    return [f"{root}/{file}" for file in index["shards"][split]]


def open_stream(root: str) -> StreamedDataset:
    """A folder, or a URL that `webdataset` opens, below which are `shards.json` and the tar files that it lists.

    Raises:
        FileNotFoundError: there is no index.
        StoreError: the index is not what it must be.
        MissingPackageError: webdataset is not installed.
    """
    webdataset = need("webdataset", "stream")
    place = f"{root.rstrip('/')}/{INDEX}"
    try:
        with webdataset.gopen(place) as stream:
            index = json.loads(stream.read())
        if index["format"] != _FORMAT:
            raise StoreError(f"format in {place} must be {_FORMAT}, got {index['format']!r}")
        return StreamedDataset(root.rstrip("/"), index)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"data must be a folder with an index {INDEX}", root) from error
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{place} must be the index that write_shards makes, got: {error!r}") from error


def _samples(urls: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each clip of some tar files, in order; "__clip__" is its number."""
    samples = need("webdataset", "stream").tariterators.tarfile_samples
    for url in urls:
        try:
            for sample in samples(iter([{"url": url}])):
                yield _decoded(sample)
        except tarfile.TarError as error:
            raise StoreError(f"{url} must be a whole tar file, but cannot be read: {error.args[0]}") from error


def _decoded(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of one clip."""
    arrays = {"__clip__": np.array(int(sample["__key__"]))}
    for key, data in sample.items():
        if key.endswith(".npy"):
            try:
                arrays[key.removesuffix(".npy")] = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError) as error:
                where = f"{key} of clip {sample['__key__']} in {sample['__url__']}"
                raise StoreError(f"{where} must be a .npy file of numbers, but cannot be read: {error}") from error
    return arrays


def _collect(clips: Iterator[dict[str, np.ndarray]], data: Dataset, count: int | None, split: str) -> ClipSet:
    """The next clips in memory, all where `count` is None."""
    found = list(itertools.islice(clips, count))
    if not found:
        raise StoreError(f"split {split!r} must hold at least one clip, got none")
    try:
        arrays = {key: np.stack([clip[key] for clip in found]) for key in found[0]}
    except (KeyError, ValueError) as error:
        raise StoreError(f"clips of split {split!r} must have the same arrays and shapes: {error!r}") from error
    index = arrays.pop("__clip__").astype(np.int64)
    check_split(split, arrays, data.modalities, data.classes)
    return ClipSet(arrays, data.modalities, data.classes, index)
