"""Tables and links in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def grid(
    corner: Sequence[str], heads: Iterable[str], lines: Iterable[tuple[Sequence[str], Mapping[str, str]]]
) -> list[list[str]]:
    """Heading and lines of a table, with a dash where a line has nothing in a column.

    Args:
        corner: headings of the first columns.
        heads: headings of the others; one that is there twice is one column.
        lines: first cells and the others, by heading, of each line.
    """
    columns = list(dict.fromkeys(heads))
    return [[*corner, *columns], *([*first, *(cells.get(head, "-") for head in columns)] for first, cells in lines)]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def linked(text: str, file: str) -> str:
    """A picture in Markdown; a link to a PDF, which pages do not show."""
    return f"{'' if file.endswith('.pdf') else '!'}[{text}]({file})"
