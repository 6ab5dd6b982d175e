"""Opening any data set by one text: a built-in name, a feature store's folder, or LAYOUT:ROOT."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from unicode_fast.config import DataConfig, TextPadding, modality_names
from unicode_fast.data import built_in, stream
from unicode_fast.data.dataset import Dataset
from unicode_fast.data.layouts import LAYOUTS, Request, find_layout
from unicode_fast.data.layouts.request import BERT
from unicode_fast.data.layouts.sources import Listing
from unicode_fast.data.store.checks import DamagedStoreError
from unicode_fast.data.store.read import Store, damages, open_store
from unicode_fast.data.store.write import MANIFEST
from unicode_fast.errors import UsageError
from unicode_fast.files.paths import expanded


def open_data(  # noqa: PLR0913 - what a data set is, and what reads its sentences
    spec: str,
    *,
    modalities: Collection[str] | None = None,
    text_model: str = BERT,
    text_whitelist: str = "",
    text_padding: TextPadding = "masked",
    progress: bool = True,
) -> Dataset:
    """Open a data set.

    Args:
        spec: the name of a built-in data set, made with its defaults; the folder of a feature store; or `LAYOUT:ROOT`,
            such as `ave:/data/AVE`, whose features are read from the published files when they are indexed; or
            `webdataset:FOLDER`, tar files that are read as a stream.
        modalities: of a layout, those that are wanted; it takes the ones it has, and needs the files of no other.
        text_model: what reads the sentences of a layout: a name or a folder that `transformers` knows.
        text_whitelist: a file with the ids of the words that are kept, as the released `cnt.pkl`; "" keeps all.
        text_padding: the zeros after a sentence's last word are "masked", or "read" as the released code does.
        progress: show a progress bar on standard error while a built-in data set is made.

    Raises:
        FileNotFoundError: it is none of these, or files are missing; the message names them.
        StoreError: contents are not what they must be; the file is named.
        ValueError: the layout has none of the modalities.
        MissingPackageError: a package that the layout needs is not installed.
        OSError: the cache folder cannot be written or the disk is full.
    """
    if spec in built_in.DATASETS:
        return built_in.load(spec, progress=progress)
    spec = expanded(spec)
    if spec.startswith(stream.SPEC):
        return stream.open_stream(spec.removeprefix(stream.SPEC))
    listing = list_data(spec, Request(modalities, text_model, text_whitelist, text_padding))
    if listing is not None:
        return listing.open()
    if not (Path(spec) / MANIFEST).exists():
        known = ", ".join(built_in.DATASETS)
        if (Path(spec) / "clips.csv").exists():
            raise FileNotFoundError(f"data in layout clips must be named clips:{spec}, got {spec!r}")
        if not Path(spec).exists() and os.sep in spec:
            raise FileNotFoundError(f"data must be there, got {spec!r}, where there is nothing")
        raise FileNotFoundError(
            f"data must be one of {known}, the folder of a feature store, which holds a {MANIFEST}, LAYOUT:ROOT or "
            f"{stream.SPEC}FOLDER, got {spec!r}"
        )
    return open_store(spec)


def verify(data: Dataset) -> None:
    """Compare the checksums of all files of a feature store, whatever was verified before, with a progress bar.

    Args:
        data: that is open.

    Raises:
        ValueError: it is no feature store.
        DamagedStoreError: a file is missing, cut short or changed.
    """
    if not isinstance(data, Store):
        raise ValueError(f"verify is about feature stores, which have checksums, got it beside {data.name!r}")
    with tqdm(desc="verifying", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for size, wrong in damages(data.path):
            if wrong:
                raise DamagedStoreError(wrong)
            bar.update(size)


def absolute(spec: str) -> str:
    """The same data set from whatever folder it is opened: a folder in it that is there, by its whole path.

    Args:
        spec: what `open_data` takes.
    """
    if spec in built_in.DATASETS:
        return spec
    layout, colon, folder = spec.partition(":")
    known = colon and (layout in LAYOUTS or spec.startswith(stream.SPEC))
    path = Path(expanded(folder if known else spec))
    if not path.exists():
        return spec
    return f"{layout}:{path.absolute()}" if known else str(path.absolute())


def list_data(spec: str, request: Request) -> Listing | None:
    """What a `LAYOUT:ROOT` lists, its features unread; None where the text is no such.

    Raises:
        FileNotFoundError: the root or one of its lists is missing, or there is neither such a layout nor a folder.
        StoreError: a list is not what it must be.
        ValueError: the layout has none of the modalities.
    """
    spec = expanded(spec)
    found = find_layout(spec)
    if found is None:
        name = spec.partition(":")[0]
        if ":" in spec and not Path(spec).exists():
            known = ", ".join([*LAYOUTS, "webdataset"])
            raise FileNotFoundError(f"layout of {spec!r} must be one of {known}, got {name!r}")
        return None
    listing = LAYOUTS[found[0]](found[1], request)
    if not all(parts and all(part.sources for part in parts) for parts in listing.parts.values()):
        wanted = "any" if request.modalities is None else ", ".join(request.modalities)
        raise UsageError(f"modalities must be some that {spec} has clips of, got {wanted}")
    return listing


def open_dataset(config: DataConfig, progress: bool = True) -> Dataset:
    """Open the data set that a configuration names.

    Args:
        config: `data` is what `open_data` takes; the fields on clips, `easy` and `data_seed` are for built-in data
            sets, those on text for layouts.
        progress: show a progress bar on standard error while a built-in data set is made.

    Raises:
        FileNotFoundError: as `open_data` says, whose other errors it raises too.
    """
    if config.data in built_in.DATASETS:
        clips = {"train": config.train_clips, "val": config.val_clips, "test": config.test_clips}
        return built_in.load(config.data, easy=config.easy, clips=clips, seed=config.data_seed, progress=progress)
    return open_data(
        config.data,
        modalities=modality_names(config.modalities) or None,
        text_model=config.text_model,
        text_whitelist=config.text_whitelist,
        text_padding=config.text_padding,
    )
