"""The file formats of codes: NumPy's .npz, JSON lines and Parquet, with one row for each modality of a clip."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from typing import IO, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from unicode_fast.files.optional import need
from unicode_fast.files.untrusted import (
    BadFile,
    check_count,
    check_size,
    open_archive,
    parse_json,
    read_member,
    read_npy,
)

Format: TypeAlias = Literal["npz", "jsonl", "parquet"]
# In place of codes after the last position of a clip.
_PADDING = -1


class Row(NamedTuple):
    """The codes of one modality of a clip.

    Attributes:
        id: of the clip.
        split: of the clip.
        modality: its name.
        start_s: beginning of the clip in seconds of its file; None if unknown.
        codes: (T,) int64.
        vectors: (T, D) float32, the codewords; None where they are left out.
    """

    id: str
    split: str
    modality: str
    start_s: float | None
    codes: np.ndarray
    vectors: np.ndarray | None = None


def write_rows(file: IO[Any], form: Format, rows: Sequence[Row], sizes: Sequence[int]) -> None:
    """Write rows to an open file; the same rows give the same bytes.

    Args:
        file: open to write.
        form: of the file.
        rows: all with vectors, or none.
        sizes: of the codebooks, as `UniCode.code_sizes`; with several a row has the choice in each.
    """
    _WRITERS[form](file, rows, sizes)


def read_rows(data: bytes, form: Format) -> list[Row]:
    """The rows of a file.

    Raises:
        BadFile: the content is invalid.
        MissingPackageError: pyarrow is not installed.
    """
    try:
        return _READERS[form](data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise error if isinstance(error, BadFile) else BadFile(f"its rows are invalid: {error}") from error


def choices_of(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(T, codebooks) int64, the choice of each code in each codebook."""
    return np.stack(np.unravel_index(codes, tuple(sizes)), -1).astype(np.int64)


def _columns(rows: Sequence[Row], sizes: Sequence[int]) -> dict[str, list[Any]]:
    """Plain values by column."""
    columns: dict[str, list[Any]] = {
        "id": [row.id for row in rows],
        "split": [row.split for row in rows],
        "modality": [row.modality for row in rows],
        "start_s": [row.start_s for row in rows],
        "codes": [row.codes.tolist() for row in rows],
    }
    if len(sizes) > 1:
        columns["choices"] = [choices_of(row.codes, sizes).tolist() for row in rows]
    if rows and rows[0].vectors is not None:
        columns["vectors"] = [None if row.vectors is None else row.vectors.tolist() for row in rows]
    return columns


def _write_npz(file: IO[Any], rows: Sequence[Row], sizes: Sequence[int]) -> None:
    positions = max((len(row.codes) for row in rows), default=0)
    codes = np.full((len(rows), positions), _PADDING, np.int64)
    for place, row in enumerate(rows):
        codes[place, : len(row.codes)] = row.codes
    length = np.array([len(row.codes) for row in rows], np.int64)
    arrays: dict[str, np.ndarray] = {
        **{key: np.array([getattr(row, key) for row in rows], np.str_) for key in ("id", "split", "modality")},
        "start_s": np.array([math.nan if row.start_s is None else row.start_s for row in rows], np.float64),
        "length": length,
        "codes": codes,
    }
    if len(sizes) > 1:
        valid = codes != _PADDING
        arrays["choices"] = np.where(valid[..., None], choices_of(np.where(valid, codes, 0), sizes), _PADDING)
    if rows and rows[0].vectors is not None:
        arrays["vectors"] = np.zeros((*codes.shape, rows[0].vectors.shape[-1]), np.float32)
        for place, row in enumerate(rows):
            arrays["vectors"][place, : len(row.codes)] = row.vectors
    np.savez(file, **arrays)  # type: ignore[arg-type]


def _read_npz(data: bytes) -> list[Row]:
    with open_archive(io.BytesIO(data)) as archive:
        arrays = {}
        for name in archive.namelist():
            member = read_member(archive, name)
            arrays[name.removesuffix(".npy")] = read_npy(io.BytesIO(member), len(member))
    check_count(len(arrays["id"]), "rows")
    vectors = arrays.get("vectors")
    return [
        _row(
            arrays["id"][place], arrays["split"][place], arrays["modality"][place],
            None if math.isnan(arrays["start_s"][place]) else arrays["start_s"][place],
            arrays["codes"][place, : arrays["length"][place]],
            None if vectors is None else vectors[place, : arrays["length"][place]],
        )
        for place in range(len(arrays["id"]))
    ]  # fmt: skip


def _write_jsonl(file: IO[Any], rows: Sequence[Row], sizes: Sequence[int]) -> None:
    columns = _columns(rows, sizes)
    for place in range(len(rows)):
        line = json.dumps({key: values[place] for key, values in columns.items()})
        file.write(line.encode() + b"\n")


def _read_jsonl(data: bytes) -> list[Row]:
    lines = data.splitlines()
    check_count(len(lines), "rows")
    return [_of_values(parse_json(line)) for line in lines]


def _write_parquet(file: IO[Any], rows: Sequence[Row], sizes: Sequence[int]) -> None:
    arrow, parquet = need("pyarrow", "codes"), need("pyarrow.parquet", "codes")
    text, number = arrow.string(), arrow.list_(arrow.int64())
    kinds = {"id": text, "split": text, "modality": text, "start_s": arrow.float64(), "codes": number}
    kinds |= {"choices": arrow.list_(number), "vectors": arrow.list_(arrow.list_(arrow.float32()))}
    columns = _columns(rows, sizes)
    try:
        table = arrow.table({key: arrow.array(values, kinds[key]) for key, values in columns.items()})
    except UnicodeEncodeError as error:
        raise ValueError(f"ids must be valid text for format parquet, got {error.object!r}") from error
    parquet.write_table(table, file)


def _read_parquet(data: bytes) -> list[Row]:
    arrow, parquet = need("pyarrow", "codes"), need("pyarrow.parquet", "codes")
    try:
        described = parquet.ParquetFile(io.BytesIO(data))
        groups = [described.metadata.row_group(number) for number in range(described.metadata.num_row_groups)]
        check_size(sum(group.total_byte_size for group in groups))
        check_count(described.metadata.num_rows, "rows")
        return [_of_values(row) for row in described.read().to_pylist()]
    except (arrow.ArrowException, OSError) as error:
        raise BadFile(f"it is no Parquet file: {error}") from error


def _of_values(values: Any) -> Row:
    vectors = values.get("vectors")
    return _row(
        values["id"], values["split"], values["modality"], values["start_s"],
        np.array(values["codes"], np.int64), None if vectors is None else np.array(vectors, np.float32),
    )  # fmt: skip


def _row(id: str, split: str, modality: str, start_s: Any, codes: np.ndarray, vectors: np.ndarray | None) -> Row:
    if codes.ndim != 1 or not len(codes) or codes.dtype.kind != "i":
        raise ValueError(f"codes must be whole numbers of at least one position, got {codes.dtype} {codes.shape}")
    if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(codes)):
        raise ValueError(f"vectors must be one for each code, got {vectors.shape}")
    start = None if start_s is None else float(start_s)
    return Row(str(id), str(split), str(modality), start, codes.astype(np.int64), vectors)


_WRITERS: dict[Format, Callable[[IO[Any], Sequence[Row], Sequence[int]], None]] = {
    "npz": _write_npz,
    "jsonl": _write_jsonl,
    "parquet": _write_parquet,
}
_READERS: dict[Format, Callable[[bytes], list[Row]]] = {
    "npz": _read_npz,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
