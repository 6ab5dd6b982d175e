"""Seeds, poisoned memory, threads, and the rule that turns skips into failures on machines with a GPU."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import selection
import tiny
import torch
from cases import ON_HOST, Place

from unicode_fast.data import ClipSet
from unicode_fast.data.talking_digits import digits as talking_digits

# The tensors of the tests are small: more threads only wait for each other, and for other work of the machine.
# For child processes too, whose number would depend on other work.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# Beginnings of skips that are failures on a machine with a GPU. A single GPU is no fault, nor is a torch without the
# CUDA toolkit.
FORBIDDEN_SKIPS = (
    selection.NO_CUDA,
    "extension or backend is not available",
    "the C++ extension is not there",
    "could not import 'triton'",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of benchmarks/on_gpu.py."""
    group = parser.getgroup("unicode_fast")
    group.addoption("--kernels-on", choices=("cuda", "cpu"), help="only tests that run kernels there")
    group.addoption("--without", default="", help="with --kernels-on: kernels whose tests are left out, A,B")
    group.addoption("--shard", default="1/1", help="with --kernels-on: share of the tests, as 2/6; whole kernels")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that these options exclude, and mark those that take long on the emulator."""
    for item in items:
        if ON_HOST and selection.is_slow_on_host(item):
            item.add_marker(pytest.mark.slow)
    device = config.getoption("--kernels-on")
    if device is None:
        return
    without = [name for name in config.getoption("--without").split(",") if name]
    groups = [selection.group_of(item, device, without) for item in items]
    taken = selection.shard_of(groups, *map(int, config.getoption("--shard").split("/")))
    config.hook.pytest_deselected(items=[item for item, mine in zip(items, taken, strict=True) if not mine])
    items[:] = [item for item, mine in zip(items, taken, strict=True) if mine]


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def notes_on_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Notes on verified stores lie among the files of the tests, unless a test names a cache folder."""
    from unicode_fast.data.store import read as store

    folder, cache_folder = tmp_path_factory.mktemp("verified"), store.cache_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "cache_folder", lambda: cache_folder() if "UNICODE_FAST_CACHE" in os.environ else folder)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, or with the largest integer, so that an element without a write is visible.

    torch fills memory only in deterministic mode; operations that cannot be deterministic only warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    """24 clips of talking digits with their frames, of few voices."""
    clips = {"train": 1, "val": 1, "test": 24}
    with tiny.quick_speech():
        folder = tmp_path_factory.mktemp("spoken")
        return talking_digits.load(cache=folder, easy=True, clips=clips, progress=False).split("test")


@pytest.fixture
def few(spoken: ClipSet) -> ClipSet:
    """Twelve of them."""
    return spoken.select(np.arange(12))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `tiny.write`."""
    return tiny.write(tmp_path_factory.mktemp("store") / "tiny")


@pytest.fixture(scope="module")
def short_probes() -> Iterator[Callable]:
    """Probes make one pass over the clips an epoch, fewer than they need to learn from few clips.

    The value is the original method, for tests whose probes must learn.
    """
    from unicode_fast.tasks.probe import ProbeRule

    before = ProbeRule.passes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbeRule, "passes", lambda *_: 1)
        yield before


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[Callable]:
    """Files of pictures hold a word; the value is the original method, for tests that draw pictures."""
    from unicode_fast.report import plots

    before = plots.FigureCanvasAgg.print_figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots.FigureCanvasAgg, "print_figure", lambda _, file, **options: file.write(b"picture"))
        yield before


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the tests' own number is restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where to run an operator; skips if this machine cannot. Parametrise with `cases.places(operator)`."""
    chosen: Place = request.param
    chosen.skip_unless_usable()
    if chosen.loop is not None:
        monkeypatch.setenv("UNICODE_FAST_MAIN_LOOP", chosen.loop)
    return chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With UNICODE_FAST_REQUIRE_CUDA=1 a skip for lack of CUDA, Triton or the extension is a failure."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("UNICODE_FAST_REQUIRE_CUDA") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if reason.removeprefix("Skipped: ").startswith(FORBIDDEN_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"UNICODE_FAST_REQUIRE_CUDA=1 forbids this skip: {reason}"
    return report
