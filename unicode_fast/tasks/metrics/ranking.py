"""Ranks of relevant items in a gallery, in expectation over a random order of ties."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DEPTHS = (1, 5, 10)
# Similarities in memory at a time: 32 MiB.
_CHUNK_VALUES = 1 << 22


class Ranking(NamedTuple):
    """Recall and rank of n queries.

    Attributes:
        recall: by depth K, (n,) probability that a relevant item is among the first K.
        rank: (n,) expected rank of the best relevant item, from 1.
    """

    recall: dict[int, np.ndarray]
    rank: np.ndarray


def rank_queries(similarity: np.ndarray, relevant: np.ndarray) -> Ranking:
    """Recall and rank of each query by descending similarity.

    Items of equal similarity are in random order. Let b items be above the best relevant similarity, and t items at it,
    of which r are relevant. The first K items hold no relevant one with probability prod over j < K - b of
    (t - r - j) / (t - j). The expected rank is b + (t + 1) / (r + 1).

    Args:
        similarity: (n, gallery); rows of equal items must be equal bit for bit, see `equal_rows`.
        relevant: (n, gallery) bool, at least one in each row.

    Raises:
        ValueError: shapes differ, or a query has no relevant item.
    """
    if similarity.shape != relevant.shape or similarity.ndim != 2 or not similarity.size:
        raise ValueError(
            f"similarity and relevant must have one shape (queries, gallery), got {similarity.shape} and "
            f"{relevant.shape}"
        )
    if not relevant.any(1).all():
        raise ValueError(f"relevant must mark an item for each query, got none for query {relevant.any(1).argmin()}")
    best = np.where(relevant, similarity, -np.inf).max(1, keepdims=True)
    above = (similarity > best).sum(1)
    level = similarity == best
    tied, right = level.sum(1), (level & relevant).sum(1)
    recall = {}
    for depth in DEPTHS:
        missed = np.ones(len(similarity))
        for taken in range(depth):
            wrong, left = np.maximum(tied - right - taken, 0), np.maximum(tied - taken, 1)
            missed = np.where(taken < depth - above, missed * wrong / left, missed)
        recall[depth] = np.where(above < depth, 1 - missed, 0.0)
    return Ranking(recall, above + (tied + 1) / (right + 1))


def rank_by_cosine(
    queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray | None = None, rows: int | None = None
) -> Ranking:
    """`rank_queries` of `cosine(queries, gallery)`, computed for some queries at a time.

    Args:
        queries: (n, D).
        gallery: (n, D), the paired item of each query.
        labels: (n,); items with the query's label are relevant. None makes only the query's own item relevant.
        rows: queries at a time, with n similarities each; None fills 32 MiB.

    Memory:
        (rows, n) float64 and a few masks of that shape.
    """
    labels = np.arange(len(queries)) if labels is None else labels
    rows = max(1, _CHUNK_VALUES // len(gallery)) if rows is None else rows
    distinct, column = equal_rows(gallery)
    unit = _unit(distinct).T
    found = []
    for start in range(0, len(queries), rows):
        chunk = slice(start, start + rows)
        found.append(rank_queries((_unit(queries[chunk]) @ unit)[:, column], labels[chunk, None] == labels))
    recall = {depth: np.concatenate([each.recall[depth] for each in found]) for depth in DEPTHS}
    return Ranking(recall, np.concatenate([each.rank for each in found]))


def equal_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and the number of each row among them.

    A matrix product may round equal rows differently by their place. Similarities are therefore computed for distinct
    rows and gathered, so that copies of one sentence tie.

    Args:
        rows: (n, D).

    Returns:
        (u, D) distinct rows and (n,) numbers in [0, u).
    """
    distinct, place = np.unique(rows, axis=0, return_inverse=True)
    return distinct, place.reshape(-1)


def cosine(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(n, gallery) float64 cosine similarity, the same number for all copies of a row; 0 for a vector of zeros."""
    (left, row), (right, column) = equal_rows(queries), equal_rows(gallery)
    return (_unit(left) @ _unit(right).T)[np.ix_(row, column)]


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1)
