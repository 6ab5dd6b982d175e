"""Contenders: `python benchmarks/contenders.py search published ours search published faiss` prints JSON for each.

`bench_search.py` calls it. faiss has a process of its own, because two OpenMP runtimes distort each other's times. All
other contenders share one, because its start takes longer than most measurements.
"""

import argparse
import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest import mock

import numpy as np
import torch
from measurement import origin, times_of
from original import OriginalQuantiser, PlainQuantiser
from shapes import COLLAPSED_SHAPES, DISTINCT, SEARCH_SHAPES, SHAPES, SPREAD, UPDATE_SHAPES
from torch import Tensor

from unicode_fast import CodebookState, EmaConfig, codebook_update, commitment_loss, nearest_codeword
from unicode_fast.reference import nearest_codeword_reference

Output = TypeVar("Output")
THREADS = torch.get_num_threads()
# A call is repeated this often and for this long, but beyond the longest time only FEWEST_REPEATS times.
LEAST_REPEATS, LEAST_SECONDS, FEWEST_REPEATS = 50, 0.1, 5
LONGEST_SECONDS = {"cpu": 2.0, "cuda": 1.0}
WARM_UP_SECONDS = 0.5


class Contender(NamedTuple):
    """A contender.

    Attributes:
        make: from the problem to the timed function, which returns the chosen codewords, (N,).
        module: that must be installed; "" for none.
        devices: where it runs.
        alone: in a process of its own.
    """

    make: Callable[..., Callable[[], Tensor]]
    module: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    alone: bool = False

    def obstacle(self, device: str) -> str:
        """The reason why it cannot run here; empty where it can."""
        if device not in self.devices:
            return f"does not run on {device}"
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return ""


def addmm(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    norms = codebook.square().sum(1)
    return lambda: torch.addmm(norms, features, codebook.T, alpha=-2).min(1).indices


def compiled(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    @torch.compile
    def search(x: Tensor, e: Tensor) -> Tensor:
        return torch.addmm(e.square().sum(1), x, e.T, alpha=-2).min(1).indices

    return lambda: search(features, codebook)


def faiss(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = features.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def vector_quantize(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from vector_quantize_pytorch import VectorQuantize

    peer = VectorQuantize(dim=codebook.shape[1], codebook_size=codebook.shape[0]).to(features.device).eval()
    peer._codebook.embed.data.copy_(codebook[None])
    return torch.no_grad()(lambda: peer(features[None])[1][0])


def flash_kmeans(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    squared = features.square().sum(-1)[None]
    return lambda: euclid_assign_triton(features[None], codebook[None], squared)[0]


def with_mma(features: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    def search() -> Tensor:
        # The patch ends with the call, so the caller's choice, which may leave out a failed kernel, is restored.
        with mock.patch.dict(os.environ, {"UNICODE_FAST_MAIN_LOOP": "mma"}):
            return nearest_codeword(features, codebook).index

    return search


SEARCH = {
    "ours": Contender(lambda x, e: lambda: nearest_codeword(x, e).index),
    "ours with mma.sync": Contender(with_mma, devices=("cuda",)),
    "reference": Contender(lambda x, e: lambda: nearest_codeword(x, e, backend="reference").index),
    "torch addmm+min": Contender(addmm),
    "torch addmm+min compiled": Contender(compiled, devices=("cuda",)),
    "torch cdist+argmin": Contender(lambda x, e: lambda: torch.cdist(x, e).argmin(1)),
    "faiss": Contender(faiss, "faiss", ("cpu",), alone=True),
    "vector-quantize-pytorch": Contender(vector_quantize, "vector_quantize_pytorch"),
    "flash-kmeans": Contender(flash_kmeans, "flash_kmeans", ("cuda",)),
}


def new_state(codebook: Tensor, modalities: int) -> CodebookState:
    """A codebook in which each codeword has the count 1."""
    codewords, device = codebook.shape[0], codebook.device
    return CodebookState(
        codebook.clone(),
        torch.ones(codewords, device=device),
        codebook.clone(),
        torch.zeros(modalities, codewords, dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def step_of(state: CodebookState, features: list[Tensor], backend: str | None = None) -> Callable[[], Tensor]:
    """Search, commitment with its gradient, update and reset of a training step of the recommended preset."""
    rule = EmaConfig(smoothing="transient", reset_after=30, reset_source="feature")
    rows = [x.clone().requires_grad_() for x in features]
    weights = torch.full((len(rows), len(rows)), 0.25 / (len(rows) - 1), device=state.codebook.device)
    weights = weights.fill_diagonal_(0.5) / state.codebook.shape[1]

    def step() -> Tensor:
        joined = torch.cat([x.detach() for x in rows])
        index = nearest_codeword(joined, state.codebook, backend=backend).index
        chosen = index.split([len(x) for x in rows])
        loss = commitment_loss(torch.stack(rows), torch.stack(chosen), state.codebook, weights, backend=backend)
        loss.sum().backward()
        codebook_update(state, rows, list(chosen), rule, backend=backend)
        return index

    return step


def update_of(state: CodebookState, features: list[Tensor]) -> Callable[[], Tensor]:
    """Search and update alone, of one modality."""
    rule = EmaConfig(own_weight=1.0, reset_after=0)

    def step() -> Tensor:
        index = nearest_codeword(features[0], state.codebook).index
        codebook_update(state, features, [index], rule)
        return index

    return step


def replayed(
    make: Callable[..., Callable[[], Tensor]], features: list[Tensor], codebook: Tensor
) -> Callable[[], Tensor]:
    """A step in a CUDA graph."""
    state = new_state(codebook, len(features))
    start = [tensor.clone() for tensor in state]
    replay = captured(make(state, features))
    for tensor, value in zip(state, start, strict=True):
        tensor.copy_(value)
    return replay


def captured(call: Callable[[], Output]) -> Callable[[], Output]:
    """The call in a CUDA graph, whose time is that of the GPU alone."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Output:
        graph.replay()
        return found

    return replay


def plain_update(features: list[Tensor], codebook: Tensor) -> Callable[[], Tensor]:
    state, decay = new_state(codebook, 1), 0.99

    def step() -> Tensor:
        index = torch.addmm(state.codebook.square().sum(1), features[0], state.codebook.T, alpha=-2).min(1).indices
        sums = torch.zeros_like(state.codebook).index_add_(0, index, features[0])
        state.ema_count.mul_(decay).add_(torch.bincount(index, minlength=len(codebook)), alpha=1 - decay)
        state.ema_sum.mul_(decay).add_(sums, alpha=1 - decay)
        state.codebook.copy_(state.ema_sum / state.ema_count[:, None])
        return index

    return step


STEP = {
    "ours": Contender(lambda x, e: step_of(new_state(e, len(x)), x)),
    "ours in a CUDA graph": Contender(lambda x, e: replayed(step_of, x, e), devices=("cuda",)),
    "reference": Contender(lambda x, e: step_of(new_state(e, len(x)), x, "reference")),
    "plain float32 torch": Contender(lambda x, e: PlainQuantiser(e, len(x)).step_on(x)),
    "the original's loops": Contender(lambda x, e: OriginalQuantiser(e, len(x)).step_on(x), devices=("cpu",)),
}
UPDATE = {
    "ours": Contender(lambda x, e: update_of(new_state(e, 1), x)),
    "ours in a CUDA graph": Contender(lambda x, e: replayed(update_of, x, e), devices=("cuda",)),
    "torch addmm+min and index_add": Contender(plain_update),
}
# Ours with a codebook of distinct random codewords.
RANDOM = "ours, random codewords"
COLLAPSED = {"ours": SEARCH["ours"], RANDOM: SEARCH["ours"]}
PROBLEMS = {"search": SEARCH, "update": UPDATE, "step": STEP, "repeated": COLLAPSED, "clustered": COLLAPSED}


@functools.lru_cache(maxsize=2)
def inputs(problem: str, shape: str, device: str) -> tuple[list[Tensor], Tensor]:
    """Rows of each modality, one for a search, and the codebook; normal numbers, equal on machines of one kind.

    They are drawn on the device, because a CPU takes seconds for the sizes of a GPU. All contenders of a shape share
    them. The codewords of "repeated" and "clustered" are DISTINCT vectors, and equal or near to these.
    """
    generator = torch.Generator(device).manual_seed(0)
    if problem != "step":
        rows, codewords, width = SEARCH_SHAPES[shape]
        sizes = [rows]
    else:
        clips, positions, modalities, codewords, width = SHAPES[shape]
        sizes = [clips * positions] * modalities
    features = [torch.randn(number, width, generator=generator, device=device) for number in sizes]
    codebook = torch.randn(codewords, width, generator=generator, device=device)
    if problem in ("repeated", "clustered"):
        spread = SPREAD * torch.randn(codewords, width, generator=generator, device=device)
        centres = codebook[torch.arange(codewords, device=device) % DISTINCT]
        codebook = centres if problem == "repeated" else centres + spread
    return features, codebook


def nearest_in_float64(features: Tensor, codebook: Tensor) -> Tensor:
    """The nearest codeword by float64 differences, (N,).

    The expanded square decides all rows but those with a second codeword within its rounding error, 4 (D + 4) 2^-53 of
    the largest square that the norms allow.
    """
    codes = codebook.double()
    norms = codes.square().sum(1)
    found = []
    for rows in features.split(max(1, 2**22 // len(codes))):
        exact = rows.double()
        scores = torch.addmm(norms, exact, codes.T, alpha=-2)
        best = scores.min(1)
        slack = (exact.norm(dim=1) + norms.max().sqrt()).square() * (4 * (codes.shape[1] + 4) * 2.0**-53)
        index = best.indices
        # A row that holds NaN has no codeword within the slack.
        doubtful = (scores <= (best.values + slack)[:, None]).sum(1) != 1
        if doubtful.any():
            index[doubtful] = nearest_codeword_reference(rows[doubtful], codebook)[0]
        found.append(index)
    return torch.cat(found)


@functools.lru_cache(maxsize=2)
def truth(problem: str, shape: str, device: str, folder: Path | None) -> Tensor:
    """The nearest codewords of a problem's rows, kept in a folder for other processes."""
    features, codebook = inputs(problem, shape, device)
    # An update has the inputs of a search.
    path = None if folder is None else folder / f"{problem.replace('update', 'search')}, {shape}.npy"
    if path is None or not path.exists():
        found = nearest_in_float64(torch.cat(features), codebook)
        if path is not None:
            np.save(path, found.cpu().numpy())
        return found
    return torch.from_numpy(np.load(path)).to(device)


def wrong_rows(found: Tensor, features: Tensor, codebook: Tensor) -> tuple[int, int]:
    """Number of rows whose codeword is not the nearest by float64 differences, and number of rows."""
    return int((found.to(features.device) != nearest_in_float64(features, codebook)).sum()), len(features)


def milliseconds(call: Callable[[], Tensor], device: str) -> list[float]:
    """Times of calls after a warm-up of at most three; on a GPU each with a flushed cache."""
    started = time.perf_counter()
    for _ in range(3):
        call()
        if time.perf_counter() - started > WARM_UP_SECONDS:
            break
    if device == "cuda":
        torch.cuda.synchronize()
    times: list[float] = []
    flush = torch.empty(64 * 2**20, device=device) if device == "cuda" else None
    started = time.perf_counter()
    while (
        len(times) < FEWEST_REPEATS
        or (spent := time.perf_counter() - started) < LEAST_SECONDS
        or (len(times) < LEAST_REPEATS and spent < LONGEST_SECONDS[device])
    ):
        if flush is not None:
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin_cpu = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin_cpu))
    return times


def measure(
    problem: str, shape: str, contender: str, device: str, truth_folder: Path | None = None
) -> dict[str, object]:
    """One row of the results."""
    torch.manual_seed(0)
    if PROBLEMS[problem][contender].alone:
        # torch's second thread would spin beside those of the other runtime.
        torch.set_num_threads(1)
    source = "search" if contender == RANDOM else problem
    features, codebook = inputs(source, shape, device)
    right = truth(source, shape, device, truth_folder)
    call = PROBLEMS[problem][contender].make(features if problem in ("update", "step") else features[0], codebook)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    wrong = int((call().to(device) != right).sum())
    peak = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    times = milliseconds(call, device)
    size = SHAPES[shape] if problem == "step" else SEARCH_SHAPES[shape]
    return {
        "problem": problem,
        "contender": contender,
        "shape": shape,
        **{name.replace("positions", "steps"): value for name, value in size._asdict().items()},
        "dtype": "float32",
        **times_of(times),
        "wrong_rows": wrong,
        "checked_rows": len(right),
        "peak_bytes": peak,
        **origin(device),
        "threads": THREADS,
    }


def shape_names(problem: str) -> tuple[str, ...]:
    """The shapes of a problem."""
    few = {"update": UPDATE_SHAPES, "step": tuple(SHAPES), "search": tuple(SEARCH_SHAPES)}
    return few.get(problem, COLLAPSED_SHAPES)


def row_or_reason(
    row: dict[str, str], measure: Callable[..., dict[str, object]], *arguments: object
) -> dict[str, object]:
    """The result of `measure` for `arguments`; `row` with the reason if another contender than ours fails."""
    try:
        return measure(*arguments)
    except Exception as error:
        if row["contender"].startswith("ours"):
            raise
        return {**row, "missing": f"failed: {type(error).__name__}: {error}".splitlines()[0][:120]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="+", help="PROBLEM SHAPE CONTENDER, for each case")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--truth", type=Path, help="folder for the nearest codewords in float64")
    arguments = parser.parse_args()
    if len(arguments.case) % 3:
        parser.error(f"cases must have three words each, got {len(arguments.case)} words")
    words = iter(arguments.case)
    cases = list(zip(words, words, words, strict=True))
    for problem, shape, contender in cases:
        for value, known in (
            (problem, PROBLEMS),
            (shape, shape_names(problem)),
            (contender, PROBLEMS.get(problem, ())),
        ):
            if value not in known:
                parser.error(f"must be one of {', '.join(known)}, got {value!r}")
    for problem, shape, contender in cases:
        row = {"problem": problem, "shape": shape, "contender": contender}
        found = row_or_reason(row, measure, *row.values(), arguments.device, arguments.truth)
        print(json.dumps(found), flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
