"""PreparedCodebook: the bits of a plain codebook, operands computed once for each version, none of an earlier one."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from cases import NEAREST_CASES, ON_HOST, Place, make_state, normal, places
from compare import assert_all_close, assert_close
from tolerances import EXACT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unicode_fast import CodebookState, EmaConfig, PreparedCodebook, codebook_update, nearest_codeword


class Makings(TorchDispatchMode):
    """Counts the computations of operands, and the searches that compute their own."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.in_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_reference")
        self.made += name == "codebook_operands"
        self.in_calls += name == "nearest_codeword" and (len(args) < 3 or args[2] is None)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def makings() -> Iterator[Makings]:
    with Makings() as counter:
        yield counter


def new_state(device: str = "cpu") -> CodebookState:
    return make_state(normal(7, 5).to(device), 1)


def assert_same_bits(features: Tensor, prepared: PreparedCodebook, backend: str | None = None) -> None:
    plain = nearest_codeword(features, prepared.codebook.clone(), backend=backend)
    found = nearest_codeword(features, prepared, backend=backend)
    for tensor, truth in zip(found, plain, strict=True):
        assert tensor.dtype == truth.dtype
        assert torch.equal(tensor.nan_to_num(), truth.nan_to_num())
        assert torch.equal(tensor.isnan(), truth.isnan())


@places("nearest_codeword")
@pytest.mark.parametrize("name", NEAREST_CASES)
def test_same_bits(name: str, place: Place) -> None:
    features, codebook = NEAREST_CASES[name]()
    prepared = PreparedCodebook(codebook.to(place.device))
    for rows in (features, features[:1]):
        assert_same_bits(rows.to(place.device), prepared, place.backend)


@places("nearest_codeword")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("codewords", "width"), [(1, 1), (1, 4096), (257, 65), (300, 4096)])
def test_same_bits_at_all_sizes(codewords: int, width: int, dtype: torch.dtype, place: Place) -> None:
    features, codebook = normal(9, width, dtype=dtype), normal(codewords, width, seed=1)
    for kind in {dtype, torch.float32, torch.float64}:
        assert_same_bits(
            features.to(place.device), PreparedCodebook(codebook.to(place.device, kind)), backend=place.backend
        )


@places("nearest_codeword")
def test_many_and_few_rows_share_operands(place: Place) -> None:
    """On GPUs the number of rows decides the layout that a search reads."""
    prepared = PreparedCodebook(normal(600, 64, seed=1).to(place.device))
    many = 3_000 if ON_HOST else 30_000
    features = normal(many, 64).to(place.device)
    with Makings() as counter:
        for rows in (1, 100, many):
            assert_same_bits(features[:rows], prepared, place.backend)
    assert counter.made == 1


@places("nearest_codeword")
def test_what_is_not_finite_stays_defined(place: Place) -> None:
    codebook = normal(5, 3)
    codebook[2, 1] = float("nan")
    features = torch.stack([codebook[0], torch.full((3,), float("inf")), codebook[2]])
    assert_same_bits(features.to(place.device), PreparedCodebook(codebook.to(place.device)), place.backend)


def test_made_once_for_a_frozen_codebook(makings: Makings) -> None:
    prepared = PreparedCodebook(normal(7, 5))
    assert makings.made == 0
    for seed in range(4):
        nearest_codeword(normal(6, 5, seed=seed), prepared)
    assert (makings.made, makings.in_calls) == (1, 0)


def test_the_update_makes_what_the_next_search_needs(makings: Makings) -> None:
    state = new_state()
    prepared = PreparedCodebook(state.codebook)
    for step in range(1, 4):
        features = normal(6, 5, seed=step)
        index = nearest_codeword(features, prepared).index
        assert makings.made == step
        codebook_update(state, [features], [index], EmaConfig(reset_after=1), prepared=prepared)
        assert makings.made == step + 1
    assert makings.in_calls == 0


def without_prepared(codebook: Tensor) -> None:
    state = new_state()._replace(codebook=codebook)
    codebook_update(state, [-3 * normal(7, 5)], [torch.arange(7)], EmaConfig(decay=0.0))


def in_inference_mode(codebook: Tensor) -> None:
    with torch.inference_mode():
        codebook.mul_(-3)


def compiled_update(codebook: Tensor) -> None:
    torch._dynamo.reset()
    torch.compile(without_prepared, backend="aot_eager")(codebook)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "copy": lambda codebook: codebook.copy_(normal(7, 5, seed=9)),
    "element": lambda codebook: codebook[2].neg_(),
    "alias": lambda codebook: codebook.detach().mul_(-3),
    "update": without_prepared,
    "inference mode": in_inference_mode,
    "compiled update": compiled_update,
    "set": lambda codebook: codebook.set_(normal(7, 5, seed=9)),
    "other memory": lambda codebook: setattr(codebook, "data", normal(7, 5, seed=9)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale_operands_are_not_used(change: str) -> None:
    prepared, features = PreparedCodebook(normal(7, 5)), normal(30, 5, seed=1)
    before = nearest_codeword(features, prepared).squared_distance
    CHANGES[change](prepared.codebook)
    assert not torch.equal(nearest_codeword(features, prepared).squared_distance, before)
    assert_same_bits(features, prepared)


def test_a_backend_does_not_read_what_another_made(makings: Makings) -> None:
    Place("nearest_codeword", "cpu", "cpp").skip_unless_usable()
    prepared, features = PreparedCodebook(normal(7, 5)), normal(30, 5, seed=1)
    for made, backend in enumerate(("reference", "cpp", "reference", "cpp"), start=1):
        assert_same_bits(features, prepared, backend)
        assert makings.made == made


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_make_their_own(copied: Callable[[PreparedCodebook], PreparedCodebook]) -> None:
    prepared, features = PreparedCodebook(normal(7, 5)), normal(30, 5, seed=1)
    nearest_codeword(features, prepared)
    other = copied(prepared)
    other.codebook.mul_(-3)
    assert_same_bits(features, other)
    assert_same_bits(features, prepared)


def test_a_codebook_without_a_counter() -> None:
    with torch.inference_mode():
        prepared = PreparedCodebook(normal(7, 5))
        features = normal(30, 5, seed=1)
        for _ in range(2):
            assert_same_bits(features, prepared)
            prepared.codebook.mul_(-3)


def test_made_in_inference_mode_used_outside() -> None:
    state, features = new_state(), normal(30, 5, seed=1)
    prepared = PreparedCodebook(state.codebook)
    with torch.inference_mode():
        assert_same_bits(features, prepared)
    codebook_update(state, [features], [torch.arange(30) % 7], EmaConfig(), prepared=prepared)
    assert_same_bits(features, prepared)


def test_a_compiled_step_leaves_nothing_stale() -> None:
    def step(state: CodebookState, prepared: PreparedCodebook, features: Tensor) -> Tensor:
        index = nearest_codeword(features, prepared).index
        codebook_update(state, [features], [index], EmaConfig(), prepared=prepared)
        return index

    torch._dynamo.reset()
    state = new_state()
    prepared, features = PreparedCodebook(state.codebook), normal(30, 5, seed=1)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_same_bits(features, prepared)
        compiled(state, prepared, features)
    assert_same_bits(features, prepared)


def test_the_module_makes_operands_once_a_version(makings: Makings) -> None:
    model = tiny.model()
    features = tiny.batch(model)
    codebook = model.codebook
    semantic = {name: normal(2, 5, codebook.codebook.shape[1], seed=len(name)) for name in features}
    for _ in range(3):
        codebook.quantise(semantic)
    assert makings.made == 1
    index = {name: quantised.index for name, quantised in codebook.quantise(semantic).items()}
    codebook.update(semantic, index)
    codebook.quantise(semantic)
    assert (makings.made, makings.in_calls) == (2, 0)
    codebook.initialise(-codebook.codebook)
    codebook.quantise(semantic)
    assert makings.made == 3
    codebook.load_state_dict({name: tensor.clone() for name, tensor in codebook.state_dict().items()})
    codebook.quantise(semantic)
    assert makings.made == 4
    codebook.to(torch.float64)
    codebook.quantise(semantic)
    assert (makings.made, makings.in_calls) == (5, 0)


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        ([1.0], TypeError, "codebook must be a tensor, got list"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "codebook must be float64, float32, .*, got int64"),
        (torch.zeros(4), ValueError, r"codebook must have shape \(M, D\), M and D at least 1, got \(4,\)"),
        (torch.zeros(0, 4), ValueError, r"codebook must have shape \(M, D\), M and D at least 1, got \(0, 4\)"),
    ],
)
def test_bad_codebooks(codebook: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PreparedCodebook(codebook)


@pytest.mark.parametrize(
    ("prepared", "error", "message"),
    [
        (normal(7, 5), TypeError, "prepared must be a PreparedCodebook or None, got Tensor"),
        (PreparedCodebook(normal(7, 5)), ValueError, "prepared must hold state.codebook, got another tensor"),
    ],
)
def test_updates_take_the_prepared_form_of_their_codebook(prepared: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        codebook_update(new_state(), [normal(6, 5)], [torch.arange(6)], EmaConfig(), prepared=prepared)


def test_operands_that_do_not_fit_are_refused() -> None:
    Place("nearest_codeword", "cpu", "cpp").skip_unless_usable()
    operators, short = torch.ops.unicode_fast, torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="operands must be at least .* bytes beside the codebook, got 8"):
        operators.nearest_codeword(normal(6, 5), normal(7, 5), short)
    with pytest.raises(ValueError, match="operands must be at least .* bytes beside the codebook, got 8"):
        operators.codebook_operands(normal(7, 5), short)


class Stream:
    """A stand-in that writes down what is called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def record_event(self) -> str:
        self.calls.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.calls.append(f"{self.name} waits for {event}")


def test_another_stream_waits_for_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events, with stand-ins for streams: each version once recorded, no event inside a capture."""
    calls: list[str] = []
    streams = {name: Stream(name, calls) for name in "AB"}
    current, captured = ["A"], [False]
    monkeypatch.setattr(PreparedCodebook, "_stream", lambda self: streams[current[0]])
    monkeypatch.setattr(PreparedCodebook, "_captured", lambda self: captured[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: calls.append(f"memory kept for {stream.name}"))
    state, features = new_state(), normal(30, 5, seed=1)
    prepared = PreparedCodebook(state.codebook)

    def search_on(name: str) -> list[str]:
        calls.clear()
        current[0] = name
        nearest_codeword(features, prepared)
        return calls.copy()

    waits = ["B waits for event of A", "memory kept for B"]
    assert [search_on(name) for name in "ABBA"] == [["A records"], waits, waits, []]
    state.codebook.mul_(-3)
    assert [search_on(name) for name in "BB"] == [["B records"], []]
    current[0] = "A"
    codebook_update(state, [features], [torch.arange(30) % 7], EmaConfig(), prepared=prepared)
    assert search_on("B") == waits
    captured[0] = True
    assert search_on("B") == []
    prepared.refresh()
    assert calls == []
    captured[0] = False
    assert search_on("A") == ["A records"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_a_search_on_another_stream_reads_finished_operands() -> None:
    prepared, features = PreparedCodebook(normal(600, 64).to("cuda")), normal(3_000, 64, seed=1).to("cuda")
    nearest_codeword(features, prepared)
    prepared.codebook.mul_(-3)
    plain = nearest_codeword(features, prepared.codebook.clone())
    torch.cuda.synchronize()
    making, reading = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(making):
        torch.cuda._sleep(200_000_000)
        prepared.refresh()
    with torch.cuda.stream(reading):
        found = nearest_codeword(features, prepared)
    torch.cuda.synchronize()
    assert_all_close(found, plain, EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_a_capture_reads_operands_made_before_it() -> None:
    """On one stream, where a wait for the event would end the capture."""
    state, rows = new_state("cuda"), normal(30, 5, seed=1).to("cuda")
    prepared, stream, graph = PreparedCodebook(state.codebook), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        index = nearest_codeword(rows, prepared).index
        codebook_update(state, [rows], [index], EmaConfig(), prepared=prepared)
    with torch.cuda.graph(graph, stream=stream), Makings() as counter:
        found = nearest_codeword(rows, prepared)
    assert (counter.made, counter.in_calls) == (0, 0)
    graph.replay()
    assert_all_close(found, nearest_codeword(rows, state.codebook.clone()), EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("updated", [True, False])
def test_replays_search_the_codebook_as_it_is(updated: bool) -> None:
    """Captured searches with and without captured updates, and searches between replays."""

    def step(state: CodebookState, codebook: Tensor | PreparedCodebook, rows: Tensor) -> Tensor:
        found = nearest_codeword(rows, codebook)
        prepared = codebook if isinstance(codebook, PreparedCodebook) else None
        if updated:
            codebook_update(state, [rows], [found.index], EmaConfig(reset_after=1), prepared=prepared)
        return found.squared_distance

    captured, plain = new_state("cuda"), new_state("cuda")
    prepared = PreparedCodebook(captured.codebook)
    rows = normal(30, 5, seed=1).to("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(captured, prepared, rows)
        step(plain, plain.codebook, rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), Makings() as counter:
        found = step(captured, prepared, rows)
    assert (counter.made, counter.in_calls) == ((1, 0) if updated else (0, 1))
    for seed in range(4):
        batch = normal(30, 5, seed=seed).to("cuda")
        rows.copy_(batch)
        graph.replay()
        assert_close(found, step(plain, plain.codebook, batch), EXACT)
        assert_same_bits(batch, prepared)
        if not updated:
            for state in (captured, plain):
                state.codebook.mul_(-2)
    assert_all_close(captured, plain, EXACT)
