"""The tests that run kernels on a device, their kernels, their distribution over processes, and slow ones."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from cases import Place

NO_CUDA = "CUDA is not available"
SEARCH_LOOPS = ("wgmma", "wide", "middle", "narrow", "plain")
MMA_LOOPS = ("wide", "middle", "narrow")


def kernels_of(place: Place) -> set[str]:
    """Names of benchmarks/gpu/kernels, or of Triton kernels, that tests at this place can run."""
    if place.backend == "reference":
        return set()
    if place.operator == "nearest_codeword":
        loops = {None: SEARCH_LOOPS, "mma": MMA_LOOPS}.get(place.loop, (place.loop,))
        return {"operands", "search_direct", *(f"search_{loop}" for loop in loops)}
    return {
        "codebook_update": {"operands", "statistics_scan", "statistics_sorted", "apply"},
        "commitment_loss": {"commitment"},
    }.get(place.operator, {place.operator})


# On the emulator: cases with half a minute for each comparison of all codewords, and tests of the same kernels at more
# sizes.
_LARGE = {"training", "many_tiles", "many_one_block_tiles", "many_blocks", "widest", "widest_in_large_tiles", "wider"}
_AT_MORE_SIZES = {"test_same_bits_at_all_sizes", "test_many_and_few_rows_share_operands"}


def place_of(item: pytest.Item) -> Place | None:
    """Where a test runs its operator; None if it has no place."""
    spec = getattr(item, "callspec", None)
    return next((value for value in spec.params.values() if isinstance(value, Place)), None) if spec else None


def is_slow_on_host(item: pytest.Item) -> bool:
    """Whether a test takes long on the emulator and repeats other tests there."""
    spec = getattr(item, "callspec", None)
    place = place_of(item)
    again = item.path.name == "test_prepared_codebook.py" or (place is not None and place.loop == "plain")
    large = spec is not None and spec.params.get("name") in _LARGE and again
    return large or getattr(item, "originalname", "") in _AT_MORE_SIZES


def group_of(item: pytest.Item, device: str, without: Iterable[str]) -> str | None:
    """The tests that share a process with this one: those of its kernel, or of its file. None: it is left out.

    Args:
        item: the test.
        device: "cuda" takes the tests that need a GPU, "cpu" those of compiled kernels on a CPU.
        without: kernels that do not work; tests without a place can run any.
    """
    place = place_of(item)
    if place is not None:
        taken = place.device == device and (device == "cuda" or place.backend == "cpp")
        left_out = kernels_of(place) & set(without)
        return "-".join(map(str, place)) if taken and not left_out else None
    needs_cuda = any(mark.kwargs.get("reason") == NO_CUDA for mark in item.iter_markers("skipif"))
    return str(item.path) if needs_cuda and device == "cuda" and not set(without) else None


def shard_of(groups: Sequence[str | None], shard: int, shards: int) -> list[bool]:
    """Whether a process takes each test of these groups; the larger groups are assigned first."""
    load = Counter({number: 0 for number in range(1, shards + 1)})
    mine: set[str] = set()
    counts = Counter(group for group in groups if group is not None)
    for group, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        number = min(load, key=lambda each: (load[each], each))
        load[number] += count
        if number == shard:
            mine.add(group)
    return [group in mine for group in groups]
