"""Folders of codes: shards, and codes.json with what they are of; written shard by shard and published whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from unicode_fast.codes.digests import codebook_digest, model_digest
from unicode_fast.codes.formats import Format, Row, read_rows, write_rows
from unicode_fast.codes.sources import Skipped, Source
from unicode_fast.data.store.write import check_new
from unicode_fast.errors import few
from unicode_fast.files.locks import alone
from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import UNPACKED_VARIABLE, BadFile, read_bytes, read_json
from unicode_fast.files.writing import atomic_file, publish, remove, remove_unfinished, write_json
from unicode_fast.modules.model import UniCode
from unicode_fast.modules.wrapped import unwrapped_unicode
from unicode_fast.version import __version__

FORMAT = 1
INDEX = "codes.json"
CLIPS_PER_SHARD = 4096
_PLAN, _LOCK, _SHARDS = "plan.json", ".lock", "codes"


class CodesError(RuntimeError):
    """A folder of codes is missing, damaged, of another model, or begun with other settings."""


@dataclass(frozen=True)
class CodesFolder:
    """A folder of codes.

    Attributes:
        path: of the folder.
        header: content of codes.json.
        rows: the codes of each modality of each clip, in the order of the data; empty if they were not read.
    """

    path: Path
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)


def encode_to_folder(
    model: UniCode,
    source: Source,
    folder: str | os.PathLike[str],
    form: Format = "npz",
    *,
    clips_per_shard: int = CLIPS_PER_SHARD,
    progress: bool = True,
) -> CodesFolder:
    """Encode clips or files and write their codes as a folder of shards.

    Each clip is encoded by `UniCode.encode_clip`, so its codes do not depend on the other clips. Shards are written to
    the folder `.<name>.encoding` beside `folder`. After an interruption the same call keeps the finished shards, and
    the bytes of the folder are those of a call without interruption.

    Args:
        model: in any mode.
        source: clips of a data set, or media files.
        folder: to make; it must not exist.
        form: of the shards: npz, jsonl or parquet.
        clips_per_shard: clips or files whose codes a shard has.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the format is unknown, or a size is below 1.
        CodesError: an interrupted call had other settings, or nothing can be encoded.
        FileExistsError: `folder` exists.
        InUse: another process writes the same folder.
        MissingPackageError: pyarrow is not installed.
        OSError: the folder cannot be written, or the disk is full; finished shards are kept.
    """
    model, target = unwrapped_unicode(model), Path(folder).absolute()
    if form not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {form!r}")
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be at least 1, got {clips_per_shard}")
    if form == "parquet":
        need("pyarrow", "codes")
    check_new(target)
    work = target.with_name(f".{target.name}.encoding")
    (work / _SHARDS).mkdir(parents=True, exist_ok=True)
    with alone(work / _LOCK, f"encoding of {target}"):
        remove_unfinished(work)
        remove_unfinished(work / _SHARDS)
        plan = _plan(model, source, form, clips_per_shard)
        _begin(work, plan)
        header = {**plan, **_counts(_encode(model, source, work, plan, progress))}
        if not header["clips"]:
            skipped = [f"{one['id']}: {one['reason']}" for one in header["skipped"]]
            raise CodesError(f"data must have a clip that can be encoded, got none; {few(skipped)}".removesuffix("; "))
        write_json(work / _SHARDS / INDEX, header)
        publish(work / _SHARDS, target)
        remove(work)
    return CodesFolder(target, header)


def _plan(model: UniCode, source: Source, form: Format, clips_per_shard: int) -> dict[str, Any]:
    """The settings that the bytes depend on."""
    return {
        "format": FORMAT,
        "files": form,
        "codebook_sha256": codebook_digest(model),
        "model_sha256": model_digest(model),
        "method": model.config.method.method,
        "code_sizes": list(model.code_sizes),
        "width": sum(book.shape[1] for book in model.codebooks),
        "modalities": {
            name: {"kind": kind.kind, "shape": list(kind.shape)}
            for name, kind in model.modalities.items()
            if name in source.modalities
        },
        **source.described,
        "vectors": source.vectors,
        "clips_per_shard": clips_per_shard,
        "preprocessor": model.preprocessor,
        "device": model.device.type,
        "versions": {"unicode_fast": __version__, "torch": torch.__version__},
    }


def _begin(work: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with that of the interrupted call."""
    file = work / _PLAN
    if not file.exists():
        write_json(file, plan)
        return
    try:
        before = read_json(file)
        changed = [name for name in plan if before.get(name) != plan[name]]
    except (BadFile, AttributeError) as error:
        raise CodesError(f"{file} is damaged: {error}; delete {work} to start again") from error
    if changed:
        raise CodesError(
            f"{work} holds an interrupted encoding with other {', '.join(changed)}, {changed[0]} "
            f"{before.get(changed[0])!r:.80} instead of {plan[changed[0]]!r:.80}; repeat its command, or delete the "
            "folder to start again"
        )


def _encode(model: UniCode, source: Source, work: Path, plan: dict[str, Any], progress: bool) -> list[dict[str, Any]]:
    """Encode the shards that are not finished; returns the entries of all."""
    size, form = plan["clips_per_shard"], plan["files"]
    shards = [(start, min(start + size, len(source))) for start in range(0, len(source), size)]
    names = [f"codes-{number:05d}.{form}" for number in range(len(shards))]
    entries = [_finished(work, name) for name in names]
    done = sum(stop - start for (start, stop), entry in zip(shards, entries, strict=True) if entry is not None)
    with tqdm(
        total=len(source),
        initial=done,
        desc="encoding",
        unit=source.unit,
        disable=not progress,
        dynamic_ncols=True,
    ) as bar:
        for number, units in enumerate(shards):
            if entries[number] is None:
                entry = _write_shard(model, source, units, work / _SHARDS / names[number], plan, bar)
                write_json(work / f"{names[number]}.json", entry)
                entries[number] = entry
    return [entry for entry in entries if entry is not None]


def _write_shard(
    model: UniCode, source: Source, units: tuple[int, int], file: Path, plan: dict[str, Any], bar: tqdm
) -> dict[str, Any]:
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for found in source.rows(model, *units):
        if isinstance(found, Skipped):
            skipped.append(found)
        else:
            rows += found
        bar.update()
    with atomic_file(file) as opened:
        write_rows(opened, plan["files"], rows, plan["code_sizes"])
    data = file.read_bytes()
    return {
        "file": file.name,
        "rows": len(rows),
        "clips": len({(row.split, row.id) for row in rows}),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "skipped": [one._asdict() for one in skipped],
    }


def _finished(work: Path, name: str) -> dict[str, Any] | None:
    """The entry of a shard that an interrupted call has finished; None if there is none, or it was damaged since."""
    try:
        entry = json.loads((work / f"{name}.json").read_bytes())
        whole = hashlib.sha256((work / _SHARDS / name).read_bytes()).hexdigest() == entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if whole else None


def _counts(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = ("file", "rows", "clips", "bytes", "sha256")
    return {
        "clips": sum(entry["clips"] for entry in entries),
        "rows": sum(entry["rows"] for entry in entries),
        "skipped": [one for entry in entries for one in entry["skipped"]],
        "shards": [{key: entry[key] for key in kept} for entry in entries],
    }


def read_codes(folder: str | os.PathLike[str]) -> CodesFolder:
    """Read a folder of codes; checksums, sizes and the range of codes are compared.

    Args:
        folder: of `unicode-fast encode`.

    Raises:
        CodesError: the folder is missing or damaged, or of a newer version; the message names the file.
        MissingPackageError: the shards are Parquet, and pyarrow is not installed.
    """
    path = Path(folder)
    file, rows = path / INDEX, list[Row]()
    try:
        header = read_json(file)
        if header["format"] != FORMAT or header["files"] not in get_args(Format):
            raise BadFile(f"it must be of format {FORMAT}, got {header['format']!r:.40} of {header['files']!r:.40}")
        most = 1
        for size in header["code_sizes"]:
            most *= size
        for entry in header["shards"]:
            file = path / Path(entry["file"]).name
            data = read_bytes(file, UNPACKED_VARIABLE)
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise BadFile(f"its checksum differs from {INDEX}")
            found = read_rows(data, header["files"])
            if any(row.codes.min() < 0 or row.codes.max() >= most for row in found):
                raise BadFile(f"its codes must be in [0, {most})")
            rows += found
    except FileNotFoundError as error:
        raise CodesError(f"codes must be a folder of `encode` with {file.name}, got {str(folder)!r}") from error
    except (BadFile, KeyError, TypeError, AttributeError) as error:
        raise CodesError(f"codes file {file} is damaged: {error}") from error
    return CodesFolder(path, header, rows)
