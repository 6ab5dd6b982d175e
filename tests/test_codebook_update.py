"""codebook_update: hand-written steps, an independent oracle for every rule, reset, masks, and its random numbers."""

from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import product

import numpy as np
import pytest
import tolerances
import torch
from cases import Place, generator, make_state, normal, places
from compare import assert_close, to_float64
from numpy.typing import NDArray
from tolerances import AFFINE_FORM, EXACT, MANY_ROWS
from torch import Tensor

from unicode_fast.ops import CodebookState, EmaConfig, ResetDraws, codebook_update
from unicode_fast.reference.codebook_update import CodebookBatch, codebook_statistics_reference, split_statistics

Array = NDArray[np.float64]
NAN = float("nan")
# The rule of the released code.
OFFICIAL = EmaConfig(update="sequential", smoothing="compounding", reset_ema=False)
UPDATES = list(product(("joint", "sequential"), ("none", "transient", "compounding")))


def on(device: str, *lists: list) -> list[list]:
    return [[tensor.to(device) for tensor in tensors] for tensors in lists]


def random_batch(modalities: int, rows: int, width: int, codewords: int) -> tuple[list[Tensor], list[Tensor]]:
    features = [normal(rows, width, seed=10 + m, dtype=torch.float64) for m in range(modalities)]
    index = [torch.randint(codewords, (rows,), generator=generator(20 + m)) for m in range(modalities)]
    return features, index


class Oracle:
    """The update of a state, row by row and codeword by codeword, in float64 NumPy."""

    def __init__(self, state: CodebookState) -> None:
        self.codebook, self.count, self.sum = (to_float64(tensor).copy() for tensor in state[:3])
        self.idle = state.idle.cpu().numpy().copy()

    def update(
        self,
        features: list[Array],
        index: list[NDArray[np.int64]],
        rule: EmaConfig,
        partners: list[Array] | None = None,
        valid: list[NDArray[np.bool_]] | None = None,
    ) -> None:
        modalities, codewords = self.idle.shape
        valid = valid or [np.ones(len(rows), dtype=bool) for rows in features]
        counts, sums = np.zeros((modalities, codewords)), np.zeros((modalities, *self.codebook.shape))
        for m in range(modalities):
            for row in range(len(features[m])):
                if not valid[m][row]:
                    continue
                mixed = features[m][row]
                if partners is not None:
                    mixed = rule.own_weight * mixed + (1 - rule.own_weight) * partners[m][row]
                elif rule.own_weight < 1:
                    others = [features[o][row] for o in range(modalities) if o != m and valid[o][row]]
                    if others:
                        mixed = rule.own_weight * mixed + (1 - rule.own_weight) * np.mean(others, axis=0)
                counts[m, index[m][row]] += 1
                sums[m, index[m][row]] += mixed
        if rule.update == "joint":
            self._ema(counts.sum(axis=0), sums.sum(axis=0), rule)
        else:
            for m in range(modalities):
                self._ema(counts[m], sums[m], rule)
        self.idle = np.where(counts > 0, 0, self.idle + 1)

    def _ema(self, count: Array, total: Array, rule: EmaConfig) -> None:
        self.count = rule.decay * self.count + (1 - rule.decay) * count
        self.sum = rule.decay * self.sum + (1 - rule.decay) * total
        number = self.count.sum()
        smoothed = self.count
        if rule.smoothing != "none":
            smoothed = (self.count + rule.epsilon) / (number + len(self.count) * rule.epsilon) * number
        if rule.smoothing == "compounding":
            self.count = smoothed
        for k in range(len(self.count)):
            if rule.update == "sequential" or smoothed[k] > 0:
                self.codebook[k] = self.sum[k] / smoothed[k]


def assert_state(state: CodebookState, oracle: Oracle, tolerance: tolerances.Tolerance) -> None:
    assert_close(state.ema_count, oracle.count, tolerance, "ema_count")
    assert_close(state.ema_sum, oracle.sum, tolerance, "ema_sum")
    assert_close(state.codebook, oracle.codebook, tolerance, "codebook")
    assert state.idle.tolist() == oracle.idle.tolist()


@places("codebook_update")
def test_hand_written_joint(place: Place) -> None:
    state = make_state(torch.tensor([[2.0], [4.0], [6.0]], dtype=torch.float64, device=place.device), 2)
    features = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [11.0]])]
    index = [torch.tensor([0, 0]), torch.tensor([0, 1])]
    rule = EmaConfig(decay=0.5, own_weight=0.75)
    codebook_update(state, *on(place.device, features, index), rule, backend=place.backend)
    # Own and partner 3/4 : 1/4. Codeword 0 gets 3/4+5/4, 9/4+11/4 and 15/4+1/4: 2 + 5 + 4; codeword 1 gets 33/4+3/4.
    assert_close(state.ema_count, np.array([2.0, 1.0, 0.5]), EXACT)  # (1 + 3)/2, (1 + 1)/2, 1/2
    assert_close(state.ema_sum, np.array([[6.5], [6.5], [3.0]]), EXACT)  # (2 + 11)/2, (4 + 9)/2, 6/2
    assert_close(state.codebook, np.array([[3.25], [6.5], [6.0]]), EXACT)
    assert state.idle.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert state.step.item() == 1


@places("codebook_update")
def test_hand_written_sequential(place: Place) -> None:
    state = make_state(torch.tensor([[2.0], [4.0]], dtype=torch.float64, device=place.device), 2)
    features, index = [torch.tensor([[1.0]]), torch.tensor([[3.0]])], [torch.tensor([0]), torch.tensor([1])]
    rule = EmaConfig(decay=0.5, own_weight=1.0, update="sequential")
    codebook_update(state, *on(place.device, features, index), rule, backend=place.backend)
    # First modality: counts 1, 1/2 and sums 3/2, 2; then the second: counts 1/2, 3/4 and sums 3/4, 5/2.
    assert_close(state.ema_count, np.array([0.5, 0.75]), EXACT)
    assert_close(state.ema_sum, np.array([[0.75], [2.5]]), EXACT)
    assert_close(state.codebook, np.array([[1.5], [10 / 3]]), tolerances.codebook_update(torch.float64))


@places("codebook_update")
@pytest.mark.parametrize("smoothing", ["transient", "compounding"])
def test_hand_written_smoothing(smoothing: str, place: Place) -> None:
    state = make_state(torch.tensor([[1.0], [3.0]], dtype=torch.float64, device=place.device), 1)
    rule = EmaConfig(decay=0.5, smoothing=smoothing, epsilon=0.5)  # type: ignore[arg-type]
    rows = on(place.device, [torch.full((3, 1), 5.0)], [torch.tensor([0, 0, 0])])
    codebook_update(state, *rows, rule, backend=place.backend)
    # Counts (1 + 3)/2 = 2 and 1/2, their sum 5/2; smoothed 5/2 (2 + 1/2)/(5/2 + 1) = 25/14 and 5/2 * 1/(7/2) = 5/7.
    tolerance = tolerances.codebook_update(torch.float64)
    kept = np.array([25 / 14, 5 / 7]) if smoothing == "compounding" else np.array([2.0, 0.5])
    assert_close(state.ema_count, kept, tolerance)
    assert_close(state.codebook, np.array([[8 / (25 / 14)], [1.5 / (5 / 7)]]), tolerance)


@places("codebook_update")
def test_hand_written_partners_that_are_not_valid(place: Place) -> None:
    features = [torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [NAN], [NAN]]), torch.tensor([[5.0]] * 3)]
    index = [torch.tensor([0, 1, 2]), torch.tensor([0, 99, -7]), torch.tensor([0, 1, 99])]
    valid = [torch.tensor([True, True, True]), torch.tensor([True, False, False]), torch.tensor([True, True, False])]
    state = make_state(torch.zeros(3, 1, dtype=torch.float64, device=place.device), 3)
    features, index, valid = on(place.device, features, index, valid)
    codebook_update(state, features, index, EmaConfig(decay=0.0), valid=valid, backend=place.backend)
    # Row 0: 1/2 + 2, 3/2 + 3/2, 5/2 + 1. Row 1, two of them: 1 + 5/2, 5/2 + 1. Row 2, alone: 4.
    assert_close(state.ema_sum, np.array([[9.0], [7.0], [4.0]]), EXACT)
    assert state.ema_count.tolist() == [3, 2, 1]
    assert state.idle.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 1]]


@places("codebook_update")
@pytest.mark.parametrize(("update", "smoothing"), UPDATES)
@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("given_partners", [False, True], ids=["aligned", "partners"])
def test_against_oracle(update: str, smoothing: str, modalities: int, given_partners: bool, place: Place) -> None:
    """Five steps with masks; each also in float32, whose state is rounded once for each step."""
    rule = EmaConfig(decay=0.9, own_weight=0.6, update=update, smoothing=smoothing)  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.float32):
        state = make_state(normal(11, 7, dtype=dtype).to(place.device), modalities)
        for step in range(5):
            oracle = Oracle(state)
            features = [normal(23, 7, seed=100 * step + m, dtype=dtype) for m in range(modalities)]
            index = [torch.randint(11, (23,), generator=generator(200 * step + m)) for m in range(modalities)]
            valid = [torch.rand(23, generator=generator(300 * step + m)) < 0.8 for m in range(modalities)]
            partners = [normal(23, 7, seed=400 * step + m, dtype=dtype) for m in range(modalities)]
            for rows, partner, mask in zip(features, partners, valid, strict=True):
                rows[~mask], partner[~mask] = NAN, NAN
            arrays = [[tensor.numpy() for tensor in tensors] for tensors in (index, valid)]
            exact = [[to_float64(tensor) for tensor in tensors] for tensors in (features, partners)]
            oracle.update(exact[0], arrays[0], rule, exact[1] if given_partners else None, arrays[1])
            features, index, valid, partners = on(place.device, features, index, valid, partners)
            chosen = partners if given_partners else None
            codebook_update(state, features, index, rule, partners=chosen, valid=valid, backend=place.backend)
            assert_state(state, oracle, tolerances.codebook_update(dtype))
        assert state.step.item() == 5


@pytest.mark.parametrize("smoothing", ["none", "transient", "compounding"])
@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_affine_form_equals_the_loop(smoothing: str, modalities: int) -> None:
    """The formulas of the reference's docstring, from the statistics, against the sequential loop of the oracle."""
    rule = EmaConfig(update="sequential", smoothing=smoothing, own_weight=1.0)  # type: ignore[arg-type]
    state = make_state(normal(13, 6, dtype=torch.float64), modalities, count=0.7)
    features, index = random_batch(modalities, 40, 6, 13)
    oracle = Oracle(state)
    oracle.update([rows.numpy() for rows in features], [codes.numpy() for codes in index], rule)
    statistics = split_statistics(
        codebook_statistics_reference(state, CodebookBatch(features, index, [], []), rule, None), state, rule
    )
    decay, codewords = rule.decay, state.codebook.shape[0]
    ema_sum = decay**modalities * state.ema_sum + (1 - decay) * statistics.mixed_sum
    epsilon = rule.epsilon if smoothing == "compounding" else 0.0
    total, scales = state.ema_count.sum(), []
    for row_count in statistics.row_count:
        total = decay * total + (1 - decay) * row_count
        scales.append(total / (total + codewords * epsilon))
    ema_count = decay**modalities * torch.stack(scales).prod() * state.ema_count
    for m, counts in enumerate(statistics.codeword_count):
        scale = torch.stack(scales[m:]).prod()
        ema_count = ema_count + decay ** (modalities - 1 - m) * scale * ((1 - decay) * counts + epsilon)
    assert_close(ema_sum, oracle.sum, AFFINE_FORM, "ema_sum")
    assert_close(ema_count, oracle.count, AFFINE_FORM, "ema_count")


def test_affine_weights_of_mixed_rows() -> None:
    """With partners at the same place the sums of later modalities weigh more, by the decay, in one scatter."""
    rule = EmaConfig(update="sequential", decay=0.5)
    state = make_state(torch.zeros(1, 1, dtype=torch.float64), 2)
    batch = CodebookBatch([torch.tensor([[4.0]]), torch.tensor([[8.0]])], [torch.tensor([0])] * 2, [], [])
    statistics = split_statistics(codebook_statistics_reference(state, batch, rule, None), state, rule)
    assert statistics.mixed_sum.item() == 0.5 * 6 + 6


def test_ranks_add_their_statistics() -> None:
    """The buffers of two halves of a batch add up to the buffer of the whole batch."""
    state = make_state(normal(9, 4, dtype=torch.float64), 3)
    features, index = random_batch(3, 30, 4, 9)
    valid = [torch.rand(30, generator=generator(m)) < 0.7 for m in range(3)]
    for rule in (EmaConfig(), OFFICIAL):
        whole = codebook_statistics_reference(state, CodebookBatch(features, index, [], valid), rule, None)
        total = torch.zeros_like(whole)
        for rows in (slice(0, 13), slice(13, 30)):
            half = [[tensor[rows] for tensor in tensors] for tensors in (features, index, valid)]
            total += codebook_statistics_reference(state, CodebookBatch(half[0], half[1], [], half[2]), rule, None)
        assert_close(total, whole, tolerances.codebook_update(torch.float64))


@places("codebook_update")
def test_unused_codewords(place: Place) -> None:
    """Counts that start at 0: the joint update keeps an unchosen codeword, the released update moves it far away."""
    codebook = normal(3, 2, dtype=torch.float64).to(place.device)
    rows = on(place.device, [torch.ones(4, 2)], [torch.tensor([0, 0, 1, 0])])
    joint = make_state(codebook, 1, count=0.0)
    codebook_update(joint, *rows, EmaConfig(), backend=place.backend)
    assert torch.equal(joint.codebook[2], codebook[2])
    official, oracle = make_state(codebook, 1, count=0.0), Oracle(make_state(codebook, 1, count=0.0))
    codebook_update(official, *rows, OFFICIAL, backend=place.backend)
    oracle.update([np.ones((4, 2))], [np.array([0, 0, 1, 0])], OFFICIAL)
    assert_state(official, oracle, tolerances.codebook_update(torch.float64))
    assert (official.codebook[2].abs() > 1e4 * codebook[2].abs()).all()


@places("codebook_update")
@pytest.mark.parametrize("rows", [0, 1, 97])
@pytest.mark.parametrize("source", ["codeword", "feature"])
@pytest.mark.parametrize("codewords", [1, 2, 101])
def test_sizes(rows: int, source: str, codewords: int, place: Place) -> None:
    rule = EmaConfig(reset_after=1, reset_source=source)  # type: ignore[arg-type]
    state = make_state(normal(codewords, 5, dtype=torch.float64).to(place.device), 2)
    oracle = Oracle(state)
    features, index = random_batch(2, rows, 5, codewords)
    oracle.update([tensor.numpy() for tensor in features], [tensor.numpy() for tensor in index], rule)
    codebook_update(state, *on(place.device, features, index), rule, backend=place.backend)
    assert_state(state, oracle, tolerances.codebook_update(torch.float64))


@places("codebook_update")
def test_no_valid_row(place: Place) -> None:
    state = make_state(normal(4, 3).to(place.device), 2, idle=7)
    features, index = on(place.device, [torch.full((5, 3), NAN)] * 2, [torch.full((5,), 99)] * 2)
    valid = [torch.zeros(5, dtype=torch.bool, device=place.device)] * 2
    rule = EmaConfig(reset_after=3, reset_source="feature")
    before = state.codebook.clone()
    codebook_update(state, features, index, rule, valid=valid, backend=place.backend)
    assert_close(state.codebook, before, tolerances.codebook_update(torch.float32))
    assert state.idle.tolist() == [[8] * 4] * 2


@places("codebook_update")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype: torch.dtype, place: Place) -> None:
    """Half-precision rows with a float32 codebook have the result of the same numbers in float32, autocast or not."""
    features, index = random_batch(2, 50, 6, 8)
    halves = [rows.to(dtype).to(place.device) for rows in features]
    index = [codes.to(place.device) for codes in index]
    expected, state = (make_state(normal(8, 6).to(place.device), 2) for _ in range(2))
    codebook_update(expected, [rows.float() for rows in halves], index, EmaConfig(), backend=place.backend)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        codebook_update(state, halves, index, EmaConfig(), backend=place.backend)
    for tensor, truth in zip(state, expected, strict=True):
        assert tensor.dtype == truth.dtype
        assert_close(tensor, truth, tolerances.codebook_update(torch.float32) if place.device == "cuda" else EXACT)


@places("codebook_update")
def test_repeatable(place: Place) -> None:
    features, index = random_batch(3, 400, 16, 20)
    rows = on(place.device, features, index)
    states = [make_state(normal(20, 16).to(place.device), 3) for _ in range(3)]
    for state in states:
        codebook_update(state, *rows, EmaConfig(reset_after=1, reset_source="feature"), backend=place.backend)
    assert all(torch.equal(a, b) for state in states[1:] for a, b in zip(state, states[0], strict=True))


@places("codebook_update")
@pytest.mark.parametrize(("rows", "codewords"), [(40, 30), (17_000, 1000)], ids=["few", "many"])
@pytest.mark.parametrize("source", ["codeword", "feature"])
def test_one_call_equals_two_operators(rows: int, codewords: int, source: str, place: Place) -> None:
    """The update of one rank and that of ranks, whose statistics and application are two operators."""
    rule = EmaConfig(
        update="sequential",
        smoothing="compounding",
        reset_after=6,
        reset_unless="all",
        reset_source=source,  # type: ignore[arg-type]
        reset_active_within=20,
    )
    features, index = random_batch(2, rows, 6, codewords)
    idle = torch.randint(12, (2, codewords), generator=generator(3))
    first, second = (
        make_state(normal(codewords, 6).to(place.device), 2)._replace(idle=idle.clone().to(place.device))
        for _ in range(2)
    )
    features, index = on(place.device, features, index)
    codebook_update(first, features, index, rule, backend=place.backend)
    suffix = "_reference" if place.backend == "reference" else ""
    operators = [getattr(torch.ops.unicode_fast, f"codebook_{half}{suffix}") for half in ("statistics", "apply")]
    shard = ([0, 0], [rows, rows])
    buffer = operators[0](second.codebook, second.step, features, index, [], [], None, *shard, False, *astuple(rule))
    operators[1](*second, buffer, None, None, *astuple(rule))
    for tensor, truth in zip(first, second, strict=True):
        assert_close(tensor, truth, tolerances.codebook_update(torch.float32) if place.device == "cuda" else EXACT)


@places("codebook_update")
def test_rows_may_be_the_codebook(place: Place) -> None:
    """Rows and codebook in the same memory: the rows are read as they were before the update."""
    first, second = (make_state(normal(9, 4).to(place.device), 1) for _ in range(2))
    index = torch.arange(9, device=place.device).flip(0)
    codebook_update(first, [first.codebook.clone()], [index], EmaConfig(), backend=place.backend)
    codebook_update(second, [second.codebook], [index], EmaConfig(), backend=place.backend)
    for tensor, truth in zip(second, first, strict=True):
        assert_close(tensor, truth, tolerances.codebook_update(torch.float32) if place.device == "cuda" else EXACT)


def test_threads_change_nothing(set_threads: Callable[[int], None]) -> None:
    Place("codebook_update", "cpu", "cpp").skip_unless_usable()
    features, index = random_batch(3, 400, 160, 300)
    states = [make_state(normal(300, 160), 3) for _ in range(2)]
    for threads, state in zip((1, 3), states, strict=True):
        set_threads(threads)
        codebook_update(state, features, index, EmaConfig(reset_after=1), backend="cpp")
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@places("codebook_update")
@pytest.mark.parametrize(
    ("rows", "codewords", "width"), [((5000, 3000), 20, 130), ((30_000, 29_001), 300, 3)], ids=["scanned", "sorted"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_many_rows(rows: tuple[int, int], codewords: int, width: int, masked: bool, place: Place) -> None:
    """Long lists of rows, some codewords without any and one with half of them; CUDA sorts the larger batch first."""
    features = [normal(n, width, seed=m) for m, n in enumerate(rows)]
    index = [torch.randint(codewords - 5, (n,), generator=generator(m)) for m, n in enumerate(rows)]
    for codes in index:
        codes[::2] = 7
    partners = [normal(n, width, seed=m) for m, n in enumerate(rows, 5)]
    valid = [
        torch.rand(n, generator=generator(m)) < 0.8 if masked else torch.ones(n, dtype=torch.bool)
        for m, n in enumerate(rows, 9)
    ]
    for numbers, codes, mask in zip(features, index, valid, strict=True):
        numbers[~mask], codes[~mask] = NAN, -1
    rule = EmaConfig(own_weight=0.75, update="sequential", reset_after=1, reset_source="feature")
    state = make_state(normal(codewords, width, dtype=torch.float64).to(place.device), 2, idle=5)
    counts, sums = to_float64(state.ema_count), to_float64(state.ema_sum)
    for numbers, partner, codes, mask in zip(features, partners, index, valid, strict=True):
        mixed = rule.own_weight * to_float64(numbers[mask]) + (1 - rule.own_weight) * to_float64(partner[mask])
        chosen = codes[mask].numpy()
        counts = rule.decay * counts + (1 - rule.decay) * np.bincount(chosen, minlength=codewords)
        batch_sums = np.stack([np.bincount(chosen, column, codewords) for column in mixed.T], axis=1)
        sums = rule.decay * sums + (1 - rule.decay) * batch_sums
    features, partners, index, valid = on(place.device, features, partners, index, valid)
    masks = valid if masked else None
    codebook_update(state, features, index, rule, partners=partners, valid=masks, backend=place.backend)
    used = slice(0, codewords - 5)
    assert_close(state.ema_count[used], counts[used], MANY_ROWS, "ema_count")
    assert_close(state.ema_sum[used], sums[used], MANY_ROWS, "ema_sum")
    assert_close(state.codebook[used], (sums / counts[:, None])[used], MANY_ROWS, "codebook")
    assert state.idle.tolist() == [[0] * codewords] * 2
    everything = np.concatenate([to_float64(numbers) for numbers in features])
    for reset in to_float64(state.codebook[codewords - 5 :]):
        assert (everything == reset).all(axis=1).any()


@places("codebook_update")
def test_lengths_may_differ(place: Place) -> None:
    rule = EmaConfig(own_weight=1.0)
    state = make_state(normal(5, 3, dtype=torch.float64).to(place.device), 2)
    features = [normal(4, 3, dtype=torch.float64), normal(9, 3, seed=1, dtype=torch.float64)]
    index = [torch.arange(4), torch.arange(9) % 5]
    oracle = Oracle(state)
    oracle.update([rows.numpy() for rows in features], [codes.numpy() for codes in index], rule)
    valid = [None, torch.ones(9, dtype=torch.bool, device=place.device)]
    codebook_update(state, *on(place.device, features, index), rule, valid=valid, backend=place.backend)
    assert_state(state, oracle, tolerances.codebook_update(torch.float64))


def idle_state(device: str, idle: list[list[int]]) -> CodebookState:
    codewords = len(idle[0])
    codebook = torch.arange(codewords, dtype=torch.float64, device=device)[:, None].expand(codewords, 2)
    return make_state(codebook, len(idle))._replace(idle=torch.tensor(idle, device=device))


def draws(device: str, choice: list[float], noise: float = 0.0) -> ResetDraws:
    given = torch.tensor(choice, dtype=torch.float64, device=device)
    return ResetDraws(given, torch.full((len(choice), 2), noise, dtype=torch.float64, device=device))


@places("codebook_update")
def test_reset_from_codewords(place: Place) -> None:
    """Active are 0, 2 and 5 (idle 0, 2 and 3 after the step); 1 and 3 are dead; 4 is neither; 6 was never chosen."""
    state = idle_state(place.device, [[0, 9, 4, 7, 4, 2, -2], [5, 8, 1, 9, 5, 6, -2]])
    rule = EmaConfig(reset_after=6, reset_active_within=4, reset_noise=0.25)
    features, index = on(place.device, [torch.zeros(1, 2)] * 2, [torch.tensor([0])] * 2)
    given = draws(place.device, [0.0, 0.34, 0.0, 0.999, 0.0, 0.0, 0.0], noise=-0.5)
    codebook_update(state, features, index, replace(rule, own_weight=1.0), draws=given, backend=place.backend)
    # Codeword 0 was 0 and got zeros. Codeword 1 becomes the second active one, 3 the third, each with -1/8 of noise.
    assert_close(state.codebook[:, 0], np.array([0, 2 - 0.125, 2, 5 - 0.125, 4, 5, 6]), AFFINE_FORM)
    assert state.idle.tolist() == [[0, 0, 5, 0, 5, 3, -1], [0, 0, 2, 0, 6, 7, -1]]
    assert_close(state.ema_count, np.array([1.01, 1, 0.99, 1, 0.99, 0.99, 0.99]), AFFINE_FORM)
    assert_close(state.ema_sum[1], np.array([1.875, 1.875]), AFFINE_FORM)


@places("codebook_update")
@pytest.mark.parametrize(("unless", "reset"), [("any", [False, False, True]), ("all", [False, True, True])])
def test_reset_unless(unless: str, reset: list[bool], place: Place) -> None:
    """Codeword 1 was chosen lately by one modality, 2 by none; 300 idle batches keep a codeword, 301 do not."""
    state = idle_state(place.device, [[299, 300, 300], [0, 5, 300]])
    rule = EmaConfig(reset_unless=unless, reset_source="feature", own_weight=1.0)  # type: ignore[arg-type]
    features, index = on(place.device, [torch.full((2, 2), 50.0)] * 2, [torch.tensor([0, 0])] * 2)
    index[0] = torch.zeros(2, dtype=torch.int64, device=place.device)
    codebook_update(state, features, index, rule, backend=place.backend)
    assert (state.codebook[:, 0] == 50).tolist() == reset
    assert (state.idle == 0).all(dim=0).tolist() == [True, *reset[1:]]


@places("codebook_update")
def test_nothing_active_nothing_reset(place: Place) -> None:
    state = idle_state(place.device, [[500, 600, 700]])
    before = state.codebook.clone()
    empty = on(place.device, [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.int64)])
    codebook_update(state, *empty, EmaConfig(), backend=place.backend)
    assert_close(state.codebook, before, AFFINE_FORM)
    assert state.idle.tolist() == [[501, 601, 701]]


@places("codebook_update")
@pytest.mark.parametrize("reset_ema", [True, False])
def test_reset_lasts_with_ema(reset_ema: bool, place: Place) -> None:
    """Without its EMA state a reset codeword that is not chosen falls back to its old vector one step later."""
    state = idle_state(place.device, [[0, 400]])
    rule = EmaConfig(reset_ema=reset_ema, reset_noise=0.0)
    rows = on(place.device, [torch.zeros(1, 2)], [torch.tensor([0])])
    codebook_update(state, *rows, rule, backend=place.backend)
    assert_close(state.codebook[1], np.zeros(2), AFFINE_FORM)
    codebook_update(state, *rows, rule, backend=place.backend)
    assert_close(state.codebook[1], np.full(2, 0.0 if reset_ema else 1.0), AFFINE_FORM)


@places("codebook_update")
def test_never_reset(place: Place) -> None:
    state = idle_state(place.device, [[0, 10**6]])
    rows = on(place.device, [torch.zeros(1, 2)], [torch.tensor([0])])
    codebook_update(state, *rows, EmaConfig(reset_after=0), backend=place.backend)
    assert state.idle.tolist() == [[0, 10**6 + 1]]


@places("codebook_update")
def test_official_idle_counter_over_many_batches(place: Place) -> None:
    """One counter from -1 on, reset by any modality, as in the released code, against the minimum of ours."""
    state = make_state(normal(12, 2, dtype=torch.float64).to(place.device), 2, count=1.0, idle=-1)
    rule = replace(OFFICIAL, reset_after=4, reset_active_within=2)
    official = np.full(12, -1)
    for step in range(30):
        index = [torch.randint(0, 4 + step % 9, (3,), generator=generator(7 * step + m)) for m in range(2)]
        features, codes = on(place.device, [torch.zeros(3, 2)] * 2, index)
        codebook_update(state, features, codes, rule, backend=place.backend)
        official += 1
        official[torch.cat(index).numpy()] = 0
        active = np.any((official >= 0) & (official < 2))
        official[(official > 4) & active] = 0
        assert state.idle.amin(dim=0).tolist() == official.tolist()


@places("codebook_update")
def test_draws_of_active_codewords_are_uniform(place: Place) -> None:
    """900 dead codewords choose among 4 active ones, with noise that is uniform in (-1/1024, 1/1024)."""
    state = idle_state(place.device, [[999] * 900 + [5] * 4])
    rows = on(place.device, [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.int64)])
    codebook_update(state, *rows, EmaConfig(seed=3), backend=place.backend)
    reset = to_float64(state.codebook[:900])
    source = np.rint(reset[:, 0])
    noise = (reset - source[:, None]) * 1024
    assert np.all(np.isin(source, [900, 901, 902, 903]))
    assert np.abs(noise).max() <= 1
    for number in np.unique(source, return_counts=True)[1]:
        assert abs(number - 225) < tolerances.STANDARD_ERRORS * np.sqrt(900 * 1 / 4 * 3 / 4)
    assert_uniform((noise + 1) / 2)


@places("codebook_update")
def test_draws_of_rows_are_uniform_over_valid_rows(place: Place) -> None:
    """2000 dead codewords and 20 rows of two modalities, half of them masked and holding NaN."""
    state = idle_state(place.device, [[999] * 2000] * 2)
    valid = torch.arange(10) % 2 == 0
    values = torch.arange(10.0)[:, None].expand(10, 2)
    features = [torch.where(valid[:, None], values, NAN), torch.where(valid[:, None], values + 10, NAN)]
    lists = on(place.device, features, [torch.zeros(10, dtype=torch.int64)] * 2, [valid] * 2)
    features, index, masks = lists
    rule = EmaConfig(reset_source="feature", own_weight=1.0)
    codebook_update(state, features, index, rule, valid=masks, backend=place.backend)
    chosen, number = np.unique(to_float64(state.codebook[1:]), return_counts=True)
    reset = to_float64((state.idle == 0).all(dim=0)[1:])
    # A codeword fails to find a valid row in 8 attempts with probability 2^-8.
    assert abs(1999 - reset.sum() - 1999 / 256) < tolerances.STANDARD_ERRORS * np.sqrt(1999 / 256)
    rows = dict(zip(chosen, number / 2, strict=True))
    for row in [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]:
        assert abs(rows[row] - 199) < tolerances.STANDARD_ERRORS * np.sqrt(1999 * 0.1 * 0.9)


@places("codebook_update")
def test_injected_row(place: Place) -> None:
    state = idle_state(place.device, [[0, 400, 400, 400]])
    features = torch.tensor([[10.0, 11.0], [20.0, 21.0], [30.0, 31.0]], dtype=torch.float64)
    rows = on(place.device, [features], [torch.zeros(3, dtype=torch.int64)])
    given = draws(place.device, [0.5, 0.0, 0.34, 0.99])
    codebook_update(state, *rows, EmaConfig(reset_source="feature"), draws=given, backend=place.backend)
    assert state.codebook[1:].tolist() == [[10, 11], [20, 21], [30, 31]]
    assert state.ema_sum[1:].tolist() == [[10, 11], [20, 21], [30, 31]]


def assert_uniform(numbers: Array) -> None:
    """Mean, variance and neighbours' correlation of numbers that should be independent and uniform in [0, 1)."""
    numbers = numbers.reshape(-1)
    allowed = tolerances.STANDARD_ERRORS / np.sqrt(len(numbers))
    assert numbers.min() >= 0
    assert numbers.max() <= 1
    assert abs(numbers.mean() - 1 / 2) < allowed * np.sqrt(1 / 12)
    assert abs(np.square(numbers - 1 / 2).mean() - 1 / 12) < allowed * np.sqrt(1 / 180)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < allowed


@places("codebook_update")
def test_steps_and_seeds_draw_differently(place: Place) -> None:
    def reset(seed: int, step: int) -> Tensor:
        state = idle_state(place.device, [[999] * 300 + [5] * 20])
        state = state._replace(step=torch.tensor(step, device=place.device))
        rows = on(place.device, [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.int64)])
        codebook_update(state, *rows, EmaConfig(seed=seed), backend=place.backend)
        return state.codebook[:300, 0]

    assert torch.equal(reset(1, 5), reset(1, 5))
    for seed, step in ((2, 5), (1, 6), (-1, 5)):
        same = (reset(1, 5).round() == reset(seed, step).round()).double().mean().item()
        assert abs(same - 1 / 20) < tolerances.STANDARD_ERRORS * np.sqrt(0.05 * 0.95 / 300)


@places("codebook_update")
@pytest.mark.parametrize("source", ["codeword", "feature"])
def test_draws_outside_their_range_pick_the_first_or_the_last(place: Place, source: str) -> None:
    rule = EmaConfig(reset_after=1, reset_source=source, reset_noise=0.0)
    results = []
    for choice in ([-0.5, 7.0, NAN], [0.0, 1 - 2**-53, 0.0]):
        state = make_state(normal(6, 4).to(place.device), 1, idle=5)
        features, index = [normal(9, 4, seed=1).to(place.device)], [torch.arange(9, device=place.device) % 3]
        draws = ResetDraws(torch.tensor(choice * 2, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64))
        moved = ResetDraws(*(x.to(place.device) for x in draws))
        codebook_update(state, features, index, rule, draws=moved, backend=place.backend)
        results.append(state.codebook)
    assert_close(results[0], results[1], EXACT)


@places("codebook_update")
def test_autograd_sees_that_the_codebook_changed(place: Place) -> None:
    state = make_state(normal(6, 4).to(place.device), 1)
    factor = torch.ones(6, 4, device=place.device, requires_grad=True)
    product = (factor * state.codebook).sum()
    features, index = [normal(9, 4, seed=1).to(place.device)], [torch.arange(9, device=place.device) % 3]
    codebook_update(state, features, index, EmaConfig(), backend=place.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
