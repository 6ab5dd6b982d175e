"""The operator for the nearest codeword of each feature vector, and the prepared codebook."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from unicode_fast.ops import _checks, _library
from unicode_fast.reference.nearest_codeword import nearest_codeword_reference


class NearestCodeword(NamedTuple):
    """Results of `nearest_codeword`.

    Attributes:
        index: (...) int64 in [0, M).
        squared_distance: (...) float64 for float64 features, else float32.
    """

    # The field hides tuple.index, which nothing uses here.
    index: Tensor  # type: ignore[assignment]
    squared_distance: Tensor


class _Made:
    """Where and when operands are made: a search on another stream waits for them, without a wait of the host."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.event = stream.record_event()

    def wait(self, stream: torch.cuda.Stream, operands: Tensor) -> None:
        if stream != self.stream:
            stream.wait_event(self.event)
            # The allocator must not give the memory away before this stream has read it.
            operands.record_stream(stream)


class PreparedCodebook:
    """A codebook with the operands of the fast searches (norms, a cast), computed once for each version of it.

    `nearest_codeword` takes it in place of the codebook; the results have the same bits. The first search computes the
    operands. A search computes them again if torch's counter of in-place changes shows that the codebook changed.
    `codebook_update` with the prepared codebook computes them in the update. A search on another CUDA stream waits for
    them; it does not wait for changes of the codebook, as no search does.

    The counter is of no use in compiled graphs and for a codebook made in inference mode. There the search computes
    operands in each call, as for a plain tensor. It does so too in a CUDA graph, unless `codebook_update` has the
    prepared codebook. Then a replayed update computes the operands for the search of the next replay; call `refresh`
    after any other change between replays. The counter misses writes through `codebook.data`, and replays of updates
    without the prepared codebook: call `refresh` after these too.

    Args:
        codebook: (M, D), M >= 1, as for `nearest_codeword`. The object keeps a reference to it, no copy.

    Memory:
        At most (M + 256) (4 D + 312) + 8 D + 2048 bytes after the first search. On the CPU a codebook in half precision
        needs twice as much. Copies and pickles hold only the codebook.

    Raises:
        TypeError: the codebook is no tensor or its dtype is unsupported.
        ValueError: its shape is not (M, D), or it is empty.
    """

    def __init__(self, codebook: Tensor) -> None:
        _checks.check_codebook("codebook", codebook, _checks.FEATURE_DTYPES)
        self.codebook = codebook
        self._operands: Tensor | None = None
        self._made_from: tuple[Any, ...] | None = None
        self._made: _Made | None = None
        self._updated = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy holds only the codebook, because the copied codebook has another address and version."""
        return PreparedCodebook, (self.codebook,)

    def refresh(self, *, backend: str | None = None) -> None:
        """Compute the operands of the current codebook, in the memory that captured graphs read.

        Args:
            backend: of the searches.
        """
        if not self._countable():
            self._made_from = None
            return
        operator = _library.find_operator("nearest_codeword", self.codebook.device, backend, "codebook_operands")
        if self._operands is None:
            # A tensor made in inference mode is read-only outside it.
            with torch.inference_mode(False):
                self._operands = self.codebook.new_empty(_operand_bytes(self.codebook), dtype=torch.uint8)
        operator(self.codebook.detach(), self._operands)
        # A capture does not run the operator.
        captured, stream = self._captured(), self._stream()
        self._made_from = None if captured else self._source(operator)
        self._made = None if captured or stream is None else _Made(stream)

    def _refresh_after_update(self, backend: str | None) -> None:
        self._updated = True
        self.refresh(backend=backend)

    def _current(self, backend: str | None) -> Tensor | None:
        """The operands for a search, or None if the search must compute its own."""
        if not self._countable():
            return None
        operator = _library.find_operator("nearest_codeword", self.codebook.device, backend, "codebook_operands")
        fresh = self._made_from == self._source(operator)
        if self._captured():
            # A capture cannot wait for an event outside it; torch.cuda.graph waits for the device before it begins.
            return self._operands if fresh and self._updated else None
        stream = self._stream()
        if not fresh:
            self.refresh(backend=backend)
        elif stream is not None and self._made is not None and self._operands is not None:
            self._made.wait(stream, self._operands)
        return self._operands

    def _countable(self) -> bool:
        return not torch.compiler.is_compiling() and not self.codebook.is_inference()

    def _captured(self) -> bool:
        return self.codebook.is_cuda and torch.cuda.is_current_stream_capturing()

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.codebook.device) if self.codebook.is_cuda else None

    def _source(self, operator: OpOverload) -> tuple[Any, ...]:
        return operator, self.codebook._version, self.codebook.data_ptr()


def _operand_bytes(codebook: Tensor) -> int:
    """An upper bound for all layouts of all backends; they pad M and D to multiples of at most 256 and 64."""
    codewords, width = (-(-size // unit) * unit for size, unit in zip(codebook.shape, (256, 64), strict=True))
    cast = codewords * width * 4 if codebook.device.type == "cpu" and codebook.element_size() == 2 else 0
    return codewords * (4 * width + 84) + 8 * width + 1024 + cast


def nearest_codeword(
    features: Tensor, codebook: Tensor | PreparedCodebook, *, backend: str | None = None
) -> NearestCodeword:
    """Index of, and squared distance to, the codeword closest to each feature vector.

    Closest means smallest squared Euclidean distance between the numbers as given. The distance of the chosen
    codeword exceeds the smallest one by a factor of at most 1 + 4 D 2^-53. Of bit-identical codewords the lowest
    index wins. This holds on every backend, under autocast too.

    Args:
        features: (..., D) float64, float32, float16 or bfloat16; usually (B, T, D).
        codebook: (M, D), M >= 1, float64, float32 or the dtype of `features`, on their device. Half-precision
            features with a float32 codebook are the normal case under autocast. A `PreparedCodebook` saves the work
            that is needed only once for each version of the codebook.
        backend: None takes the fastest that can run on this device. A named backend is used or refused, never
            replaced.

    Returns:
        index: (...) int64 in [0, M); squared_distance: (...) float64 for float64 features, else float32, infinite
        on overflow. On the device of `features`, without gradient. A row with NaN gets index 0 and distance NaN; a
        codeword with NaN is chosen only if all others have NaN too.

    Raises:
        TypeError: a dtype, or the pair of dtypes, is unsupported.
        ValueError: widths or devices differ, or the codebook is empty.
        BackendUnavailable: `backend` cannot run here; the message has the reason.

    Precision:
        The reference compares float64 sums of squared differences. C++ scores all codewords in 16-bit integers, CUDA
        in float16 or float32. Both compare those within the bound of docs/exactness.md by such sums. A squared
        distance that overflows float64, from float64 inputs above 1e154, counts as the largest number.

    Memory:
        Never N M. Reference: float64 copies of both inputs and min(N M, 2^24) distances. C++: the operands of
        the codebook, and for each thread operands and candidates of up to 192 rows, at most M bits a row. CUDA:
        operands and norms of the codebook, and for each row and section of the codebook a record of 32 bytes. The
        operands of the codebook are computed in the call, unless it is a `PreparedCodebook`.

    Source:
        Xia et al., NeurIPS 2023, Eq. 2.
    """
    prepared, codewords = (codebook, codebook.codebook) if isinstance(codebook, PreparedCodebook) else (None, codebook)
    _checks.check_features_and_codebook(features, codewords)
    operator = _library.find_operator("nearest_codeword", features.device, backend)
    rows = features.detach().reshape(-1, features.shape[-1])
    # The search of float64 features needs no operands.
    operands = prepared._current(backend) if prepared is not None and features.dtype != torch.float64 else None
    index, squared_distance = operator(rows, codewords.detach(), operands)
    return NearestCodeword(index.reshape(features.shape[:-1]), squared_distance.reshape(features.shape[:-1]))


def _check(features: Any, codebook: Any, operands: Any = None) -> None:
    _checks.check_features_and_codebook(features, codebook, dimensions=2)
    if operands is not None:
        _check_operands(codebook, operands)


def _check_operands(codebook: Any, operands: Any) -> None:
    _checks.check_codebook("codebook", codebook, _checks.FEATURE_DTYPES)
    _checks.check_tensor("operands", operands, (torch.uint8,))
    _checks.check_device("operands", operands, codebook, "codebook")


def _search(features: Tensor, codebook: Tensor, operands: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference, which uses no operands."""
    return nearest_codeword_reference(features, codebook)


def _fake(features: Tensor, codebook: Tensor, operands: Tensor | None = None) -> tuple[Tensor, Tensor]:
    distance_dtype = torch.promote_types(features.dtype, torch.float32)
    rows = features.shape[0]
    return features.new_empty(rows, dtype=torch.int64), features.new_empty(rows, dtype=distance_dtype)


def _compare_all(features: Tensor, codebook: Tensor, operands: Tensor | None = None) -> Tensor:
    return features.new_full(features.shape[:-1], -1, dtype=torch.int32)


def _write_nothing(codebook: Tensor, operands: Tensor) -> None:
    return None


_library.declare(
    "nearest_codeword",
    "(Tensor features, Tensor codebook, Tensor? operands=None) -> (Tensor index, Tensor squared_distance)",
    _check,
    _search,
    _fake,
)
_library.declare_without_gradient("nearest_codeword", inputs=3)
# For tests and measurements of the CUDA search: (N) int32, the number of codewords compared in float64 with each of
# (N, D) rows. A row without candidates was compared with all codewords and has -1. Other searches return -1 for all.
_library.declare(
    "compared_codewords",
    "(Tensor features, Tensor codebook, Tensor? operands=None) -> Tensor",
    _check,
    _compare_all,
    _compare_all,
)
_library.declare_without_gradient("compared_codewords", inputs=3)
_library.declare(
    "codebook_operands",
    "(Tensor codebook, Tensor(a!) operands) -> ()",
    _check_operands,
    _write_nothing,
    _write_nothing,
)
