"""Tables and links in Markdown."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Column = TypeVar("Column", bound=Hashable)


def grid(
    corner: Sequence[str], heads: Iterable[Column], lines: Iterable[tuple[Sequence[str], Mapping[Column, str]]]
) -> list[list[str]]:
    """Heading and lines of a table, with a dash for each missing cell.

    Args:
        corner: headings of the first columns.
        heads: the other columns; their text is the heading, and duplicates are one column.
        lines: the first cells of each line, and its other cells by column.
    """
    columns = list(dict.fromkeys(heads))
    shown = ([*first, *(cells.get(column, "-") for column in columns)] for first, cells in lines)
    return [[*corner, *map(str, columns)], *shown]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, numbers right-aligned."""
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def linked(text: str, file: str) -> str:
    """A picture in Markdown; a PDF is a link, because pages cannot display it."""
    return f"{'' if file.endswith('.pdf') else '!'}[{text}]({file})"
