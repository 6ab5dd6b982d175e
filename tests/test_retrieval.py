"""Ranks with ties, by hand and over every order; transfer of heads to other modalities."""

import itertools
import math
import tracemalloc
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from look_up import NAMES, LookUp
from task_tolerances import LEARNED, RATIO

from unicode_fast.config import Modality
from unicode_fast.data import ClipSet
from unicode_fast.tasks import EncodedDataset, Retrieval
from unicode_fast.tasks.metrics.ranking import DEPTHS, cosine, equal_rows, rank_by_cosine, rank_queries
from unicode_fast.tasks.retrieval import RetrievalRule, symmetric_info_nce

CLASSES, POSITIONS = 5, 6
COUNTS = {"train": 150, "val": 60, "test": 60}
RULE = RetrievalRule(steps=60, batch_size=50, judged_every=20)


class PairedStore:
    """Two codes identify a clip. With `private`, modalities have separate codes: code 5 m + k means k in modality m."""

    def __init__(self, names: tuple[str, ...] = NAMES, *, private: bool = False) -> None:
        self.modalities = {name: Modality("vector", (1,)) for name in names}
        self.name, self.classes = "paired", [str(number) for number in range(CLASSES)]
        self.splits = list(COUNTS)
        self.private = private

    def clips(self, split: str, modality: str) -> ClipSet:
        clips, generator = COUNTS[split], np.random.default_rng(self.splits.index(split))
        digits = generator.integers(CLASSES, size=(clips, 2))
        change = generator.integers(1, POSITIONS, (clips, 1))
        meaning = np.where(np.arange(POSITIONS) < change, digits[:, :1], digits[:, 1:])
        arrays: dict[str, np.ndarray] = {"class": digits[:, 0]}
        for number, name in enumerate(self.modalities):
            own = meaning + CLASSES * number if self.private else meaning
            arrays[name] = own[..., None].astype(np.float32)
        return ClipSet(arrays, self.modalities, self.classes, np.arange(clips))


def test_ranks_by_hand() -> None:
    similarity = np.array([[0.9, 0.5, 0.5, 0.1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    relevant = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]) > 0
    ranking = rank_queries(similarity, relevant)
    # One above and one tied: second or third. Four tied: anywhere. The best relevant one is third.
    assert ranking.rank.tolist() == [2.5, 2.5, 3.0]
    assert ranking.recall[1].tolist() == [0.0, 0.25, 0.0]
    assert ranking.recall[5].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", range(10))
def test_ranks_are_means_over_all_orders_of_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    similarity = generator.integers(3, size=(1, 7)).astype(float)
    relevant = generator.random((1, 7)) < 0.4
    relevant[0, generator.integers(7)] = True
    ranking = rank_queries(similarity, relevant)
    ranks = []
    for order in itertools.permutations(range(7)):
        listed = sorted(order, key=lambda item: -similarity[0, item])
        ranks.append(1 + next(place for place, item in enumerate(listed) if relevant[0, item]))
    assert ranking.rank[0] == pytest.approx(np.mean(ranks), rel=RATIO.relative)
    for depth in DEPTHS:
        share = np.mean(np.array(ranks) <= depth)
        assert ranking.recall[depth][0] == pytest.approx(share, rel=RATIO.relative, abs=RATIO.absolute)


def test_copies_tie_exactly() -> None:
    generator = np.random.default_rng(0)
    distinct = generator.normal(size=(30, 17)).astype(np.float32)
    rows = distinct[generator.integers(30, size=300)]
    similarity = cosine(rows, rows)
    same = (rows[:, None] == rows).all(-1)
    assert all(len(set(similarity[0, same[number]])) == 1 for number in range(300))
    found, place = equal_rows(rows)
    assert np.array_equal(found[place], rows)
    assert cosine(np.zeros((1, 3)), np.ones((2, 3))).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("rows", [1, 7, 64, None])
def test_chunks_of_queries_rank_as_all_at_once(rows: int | None) -> None:
    """Copies on both sides give ties."""
    generator = np.random.default_rng(1)
    queries, gallery = (
        generator.normal(size=(25, 9)).astype(np.float32)[generator.integers(25, size=90)] for _ in "ab"
    )
    labels = generator.integers(4, size=90)
    for given, relevant in ((None, np.eye(90, dtype=bool)), (labels, labels[:, None] == labels)):
        whole, chunks = (
            rank_queries(cosine(queries, gallery), relevant),
            rank_by_cosine(queries, gallery, given, rows),
        )
        assert np.array_equal(whole.rank, chunks.rank)
        assert all(np.array_equal(whole.recall[depth], chunks.recall[depth]) for depth in DEPTHS)


def test_memory_of_chunks() -> None:
    clips, rows = 2000, 50
    vectors = np.random.default_rng(0).normal(size=(clips, 4))
    tracemalloc.start()
    rank_by_cosine(vectors, vectors, rows=rows)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 8 * rows * clips < peak_bytes < 8 * clips * clips / 4


def test_info_nce_by_hand() -> None:
    similarity = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    rows = [math.log(math.exp(2) + 1) - 2, math.log(2)]
    columns = [math.log(math.exp(2) + math.e) - 2, math.log(1 + math.e) - 1]
    assert float(symmetric_info_nce(similarity, 0.5)) == pytest.approx(sum(rows + columns) / 4)


def test_a_head_transfers_to_an_untrained_modality() -> None:
    """Two digits and their times identify a clip, so that most pairs are first; chance is 10 of 60."""
    row = Retrieval(EncodedDataset(LookUp(), PairedStore()), rule=RULE).row("audio", "video")
    assert (row.task, row.anchor, row.chance) == ("retrieval", "text", 10 / 60)
    assert min(row.score, row.same_modality) > LEARNED
    assert row.score == row.metrics["video->text R@10"].value
    assert row.interval is not None and row.interval[0] <= row.score <= row.interval[1]
    assert row.same_interval is not None and row.same_interval[0] <= row.same_modality <= row.same_interval[1]
    for which in ("video->text", "text->video", "video->text of the class", "untrained audio->video"):
        assert {f"{which} {measure}" for measure in ("R@1", "R@5", "R@10", "median rank")} <= set(row.metrics)


def test_heads_are_trained_on_training_pairs_and_chosen_on_validation_pairs() -> None:
    """Without test clips the head is the same; without training or validation clips there is none."""

    class Some(PairedStore):
        hidden = ""

        def clips(self, split: str, modality: str) -> ClipSet:
            if split == self.hidden:
                raise LookupError(split)
            return super().clips(split, modality)

    heads = []
    for hidden in ("", "test"):
        store = Some()
        store.hidden = hidden
        heads.append(Retrieval(EncodedDataset(LookUp(), store), rule=RULE).head("audio", "text").state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    for hidden in ("train", "val"):
        store = Some()
        store.hidden = hidden
        with pytest.raises(LookupError, match=hidden):
            Retrieval(EncodedDataset(LookUp(), store), rule=RULE).head("audio", "text")


def test_separate_codes_do_not_transfer() -> None:
    row = Retrieval(EncodedDataset(LookUp(), PairedStore(private=True)), rule=RULE).row("audio", "video")
    assert row.same_modality > LEARNED
    assert row.score < 2 * row.chance


def test_an_anchor_that_the_model_does_not_encode() -> None:
    """The paper's protocol: pre-trained on two modalities, the third is embedded by its features."""

    class TwoModalities(LookUp):
        def __init__(self) -> None:
            super().__init__()
            self.names = ("video", "text")

        def encode(
            self, name: str, features: torch.Tensor, mask: torch.Tensor | None = None, *, dropout: bool = False
        ) -> object:
            assert name in self.names
            return super().encode(name, features, mask)

    measured = Retrieval(EncodedDataset(TwoModalities(), PairedStore()), rule=RULE)
    row = measured.row("text", "video")
    assert row.anchor == "audio"
    # The mean of a clip's code numbers has less information than its codes, but some.
    assert row.score > 2 * row.chance
    assert measured.embedding("train", "audio").mean() == pytest.approx(0, abs=1e-6)


def test_without_a_third_modality_embeddings_are_compared_untrained() -> None:
    measured = Retrieval(EncodedDataset(LookUp(), PairedStore(("audio", "video"))), rule=RULE)
    row = measured.row("audio", "video")
    assert row.anchor is None and row.score > LEARNED
    expected = cosine(measured.embedding("test", "audio"), measured.embedding("test", "video"))
    assert np.array_equal(cosine(*measured.vectors("audio", "video", None)), expected)
    assert "audio->video R@10" in row.metrics and not any("untrained" in name for name in row.metrics)


def test_the_official_reading_has_the_published_measures() -> None:
    measured = Retrieval(EncodedDataset(LookUp(), PairedStore()), rule=RULE)
    row, held_out = measured.row("audio", "video", "official"), measured.row("audio", "video")
    assert row.protocol == "official" and row.score == held_out.score
    assert measured.row("audio", "video", "sound") == held_out
    assert {name.rpartition(" ")[2] for name in row.metrics} == {"R@5", "R@10"}


def test_rows_repeat_and_leave_random_numbers_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    rows = [Retrieval(EncodedDataset(LookUp(), PairedStore()), seed, RULE).row("text", "audio") for seed in (0, 0, 1)]
    assert rows[0] == rows[1] and rows[0] != rows[2]
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.get_num_threads() == before[2]


def test_bad_requests_are_refused() -> None:
    measured = Retrieval(EncodedDataset(LookUp(), PairedStore()), rule=RULE)
    with pytest.raises(ValueError, match="anchor must be one of text, got 'smell'"):
        measured.row("audio", "video", anchor="smell")
    with pytest.raises(ValueError, match="relevant must mark an item for each query, got none for query 1"):
        rank_queries(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="similarity and relevant must have one shape"):
        rank_queries(np.zeros((2, 2)), np.zeros((2, 3), bool))

    class Unpaired(PairedStore):
        def clips(self, split: str, modality: str) -> ClipSet:
            clips = super().clips(split, modality)
            return clips.select(np.arange(len(clips) - (modality == "text")))

    with pytest.raises(ValueError, match="clips of 'video' and 'text' must be paired, got unpaired clips in split"):
        Retrieval(EncodedDataset(LookUp(), Unpaired()), rule=RULE).row("audio", "video")


def test_modalities_of_the_paired_store_are_equal() -> None:
    store = PairedStore()
    features: Mapping[str, np.ndarray] = store.clips("test", "audio").features
    assert all(np.array_equal(features["audio"], features[name]) for name in NAMES)
