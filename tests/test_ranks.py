"""MM-EMA with a batch split between ranks: the codebook of one rank with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Place, make_state, normal, places
from tolerances import FLOAT64

from unicode_fast import BatchShard, CodebookState, EmaConfig, codebook_update

RULES = {
    "paper": EmaConfig(reset_after=1, reset_unless="all"),
    "official": EmaConfig(update="sequential", smoothing="compounding", reset_after=1, reset_ema=False),
    "features": EmaConfig(smoothing="transient", reset_after=1, reset_source="feature"),
}
ROWS, CODEWORDS, WIDTH, STEPS = 23, 40, 6, 4


def new_state() -> CodebookState:
    return make_state(normal(CODEWORDS, WIDTH, dtype=torch.float64), 3)


def whole_batch(step: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    features = [normal(ROWS, WIDTH, seed=10 * step + m, dtype=torch.float64) for m in range(3)]
    index = [torch.arange(ROWS) * (m + 1) % 7 for m in range(3)]
    valid = [(torch.arange(ROWS) + m) % 5 != 0 for m in range(3)]
    return features, index, valid


def bounds(ranks: int, rank: int, even: bool) -> tuple[int, int]:
    """First and last row of a rank: equally many, or ever more."""
    if even:
        return rank * (ROWS // ranks), (rank + 1) * (ROWS // ranks)
    edges = [ROWS * r * r // (ranks * ranks) for r in range(ranks + 1)]
    return edges[rank], edges[rank + 1]


def count_collectives(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the collectives that are called from here on."""
    called: list[str] = []
    kinds = ("all_", "barrier", "broadcast", "gather", "reduce", "scatter", "send")
    for name in dir(dist):
        if name.startswith(kinds) and callable(function := getattr(dist, name)):

            def count(*arguments: object, name: str = name, function: Any = function, **options: object) -> object:
                called.append(name)
                return function(*arguments, **options)

            monkeypatch.setattr(dist, name, count)
    return called


def run_rank(rank: int, ranks: int, folder: str, rule: str, backend: str, options: tuple[bool, bool]) -> None:
    even, masked = options
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    state = new_state()
    called = count_collectives(pytest.MonkeyPatch())
    first, last = bounds(ranks, rank, even)
    for step in range(STEPS):
        features, index, valid = ([tensor[first:last] for tensor in tensors] for tensors in whole_batch(step))
        whole = ROWS // ranks * ranks if even else ROWS
        shard = BatchShard([first] * 3, [whole] * 3) if RULES[rule].reset_source == "feature" else None
        codebook_update(
            state, features, index, RULES[rule], valid=valid if masked else None, shard=shard, backend=backend
        )
    assert called == ["all_reduce"] * (STEPS if ranks > 1 else 0)
    torch.save(tuple(state), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_rank(rule: str, rows: int, backend: str, masked: bool) -> CodebookState:
    state = new_state()
    for step in range(STEPS):
        features, index, valid = ([tensor[:rows] for tensor in tensors] for tensors in whole_batch(step))
        codebook_update(state, features, index, RULES[rule], valid=valid if masked else None, backend=backend)
    return state


@places("codebook_update")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("ranks", "even", "masked"), [(1, True, True), (2, True, False), (2, True, True), (3, False, True)]
)
def test_ranks_end_with_the_codebook_of_one(
    place: Place, rule: str, ranks: int, even: bool, masked: bool, tmp_path: Path
) -> None:
    if place.device != "cpu":
        pytest.skip("gloo ranks of this test keep their tensors on the CPU")
    arguments = (ranks, str(tmp_path), rule, place.backend, (even, masked))
    mp.start_processes(run_rank, args=arguments, nprocs=ranks, start_method="fork")
    states = [CodebookState(*torch.load(tmp_path / f"{rank}.pt")) for rank in range(ranks)]
    truth = one_rank(rule, ROWS // ranks * ranks if even else ROWS, place.backend, masked)
    assert (truth.idle == 0).sum() > 3 * 7  # codewords beyond the seven that rows choose were reset
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))
    for name, found, expected in zip(CodebookState._fields, states[0], truth, strict=True):
        torch.testing.assert_close(found, expected, rtol=FLOAT64["rel"], atol=FLOAT64["abs"], msg=name)


@pytest.mark.parametrize(
    ("shard", "error", "message"),
    [
        (([0], [9]), TypeError, "shard must be a BatchShard or None, got tuple"),
        (BatchShard([0, 0], [9, 9]), ValueError, r"shard must hold the \[23, 23, 23\] rows of features, got first_row"),
        (BatchShard([0] * 3, [9] * 3), ValueError, r"got first_row \[0, 0, 0\], total_rows \[9, 9, 9\]"),
        (BatchShard([1] * 3, [23] * 3), ValueError, r"got first_row \[1, 1, 1\], total_rows \[23, 23, 23\]"),
    ],
)
def test_bad_shards(shard: object, error: type[Exception], message: str) -> None:
    features, index, _ = whole_batch(0)
    with pytest.raises(error, match=message):
        codebook_update(new_state(), features, index, RULES["paper"], shard=shard)  # type: ignore[arg-type]


def run_without_shard(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    features, index, _ = whole_batch(0)
    with pytest.raises(ValueError, match="shard must be a BatchShard where several ranks reset"):
        codebook_update(new_state(), features, index, RULES["features"])
    dist.destroy_process_group()


def test_ranks_that_draw_rows_must_know_where_theirs_stand(tmp_path: Path) -> None:
    mp.start_processes(run_without_shard, args=(str(tmp_path),), nprocs=2, start_method="fork")
