"""Open any data set by one string: a built-in name, a feature store's folder, or LAYOUT:ROOT."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from unicode_fast.config import DataConfig, TextPadding, modality_names
from unicode_fast.data import built_in, stream
from unicode_fast.data.dataset import Dataset
from unicode_fast.data.layouts import LAYOUTS, Request, find_layout
from unicode_fast.data.layouts.index import DatasetIndex
from unicode_fast.data.layouts.request import BERT
from unicode_fast.data.store.checks import DamagedStoreError
from unicode_fast.data.store.read import Store, damages, open_store
from unicode_fast.data.store.write import MANIFEST
from unicode_fast.errors import UsageError
from unicode_fast.files.paths import expanded


def open_data(  # noqa: PLR0913 - options of data sets and of their sentences
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
        spec: a built-in data set's name; a feature store's folder; `LAYOUT:ROOT`, such as `ave:/data/AVE`; or
            `webdataset:FOLDER`. A built-in data set is made with its defaults. A layout's features are read from the
            original files when they are indexed. WebDataset's tar files are read as a stream.
        modalities: modalities of a layout. Names that the layout lacks are ignored; files of other modalities may be
            missing.
        text_model: encoder of a layout's sentences: a `transformers` model name or folder.
        text_whitelist: file with the ids of the words to keep, such as the released `cnt.pkl`; "" keeps all.
        text_padding: the zeros after a sentence's last word are "masked", or "read" as in the released code.
        progress: show a progress bar on standard error while a built-in data set is made.

    Raises:
        FileNotFoundError: `spec` is none of these, or files are missing; the message names them.
        StoreError: a file has invalid contents; the message names it.
        ValueError: the layout has none of the modalities.
        MissingPackageError: a package that the layout needs is not installed.
        OSError: the cache folder cannot be written or the disk is full.
    """
    if spec in built_in.DATASETS:
        return built_in.load(spec, progress=progress)
    spec = expanded(spec)
    if spec.startswith(stream.SPEC):
        return stream.open_stream(spec.removeprefix(stream.SPEC))
    index = list_data(spec, Request(modalities, text_model, text_whitelist, text_padding))
    if index is not None:
        return index.open()
    if not (Path(spec) / MANIFEST).exists():
        known = ", ".join(built_in.DATASETS)
        if (Path(spec) / "clips.csv").exists():
            raise FileNotFoundError(f"data in layout clips must be given as clips:{spec}, got {spec!r}")
        if not Path(spec).exists() and os.sep in spec:
            raise FileNotFoundError(f"data must be an existing folder, got {spec!r}")
        raise FileNotFoundError(
            f"data must be one of {known}, a feature store's folder with its {MANIFEST}, LAYOUT:ROOT or "
            f"{stream.SPEC}FOLDER, got {spec!r}"
        )
    return open_store(spec)


def verify(data: Dataset) -> None:
    """Compare the checksums of all files of a feature store, even if verified before; show a progress bar.

    Args:
        data: an open data set.

    Raises:
        ValueError: `data` is no feature store.
        DamagedStoreError: a file is missing, cut short or changed.
    """
    if not isinstance(data, Store):
        raise ValueError(f"data must be a feature store, which has checksums, got {data.name!r}")
    with tqdm(desc="verifying", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for size, wrong in damages(data.path):
            if wrong:
                raise DamagedStoreError(wrong)
            bar.update(size)


def absolute(spec: str) -> str:
    """The same data set with an absolute path, if its folder exists.

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


def list_data(spec: str, request: Request) -> DatasetIndex | None:
    """The clips of a `LAYOUT:ROOT`, features unread; None if `spec` names no layout.

    Raises:
        FileNotFoundError: the root or one of its lists is missing, or `spec` is neither a layout nor a folder.
        StoreError: a list has invalid contents.
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
    index = LAYOUTS[found[0]](found[1], request)
    if not all(tables and all(table.features for table in tables) for tables in index.tables.values()):
        requested = "any" if request.modalities is None else ", ".join(request.modalities)
        raise UsageError(f"modalities must include one with clips in {spec}, got {requested}")
    return index


def open_dataset(config: DataConfig, progress: bool = True) -> Dataset:
    """Open the data set of a configuration.

    Args:
        config: `data` is the `spec` of `open_data`; fields on clips, `easy` and `data_seed` apply to built-in data
            sets, those on text to layouts.
        progress: show a progress bar on standard error while a built-in data set is made.

    Raises:
        FileNotFoundError: as `open_data`.
        StoreError: as `open_data`.
        ValueError: as `open_data`.
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
