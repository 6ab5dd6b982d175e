"""Calls of the operators themselves, without the checks of the public functions: `python tests/operator_entries.py`.

The calls are all samples of tests/test_registration.py with one argument spoilt: a wrong shape, dtype or place. Calls
made by hand follow. Each must raise an error that names an argument, what it must be and what it was, or return the
reference's result. The name of a call is printed before it runs. So the last line of a process that crashed names the
call. A fault of a call is printed after it, on a line that starts with FAILED.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import tolerances
import torch
from cases import ON_HOST, normal
from compare import assert_close
from test_registration import RULES, SAMPLES, made_operands
from torch import Tensor
from torch.utils._pytree import tree_leaves

OPERATORS = torch.ops.unicode_fast
LARGEST, SMALLEST = 2**63 - 1, -(2**63)
NAN, INF = float("nan"), float("inf")
DTYPES = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64, torch.complex64)
# At least that of the samples of the loss.
LARGEST_SCORE = 12
# The outcome of a call.
ERROR, RESULT, EITHER = "an error", "a result", "either"
# Calls without a comparison with the reference. Operands of another codebook are detected on CPUs only by their sizes.
# The reference counts no compared codewords.
UNLIKE = re.compile(r"operands of other numbers|compared" + (r"|operands of another" if ON_HOST else ""))
# torch's messages about more memory than the machine has.
NO_MEMORY = ("Storage size calculation overflowed", "can't allocate memory")
# Operators, arguments and changes to another valid size or dtype: operator and reference must only agree. With wrong
# operands they may differ, because the reference does not read operands.
FREE = re.compile(
    "|".join(
        (
            r"(nearest|compared|codebook|commitment|codeword)\w+, (features|codebook), (none|one|dtype) .*",
            r"\w+, operands, .*",
            r"cross_info_nce, predictions, \w+( \w+)? in 2",
            r"\w+, (gradient|direction|partners|pair_weights|temperature), dtype .*",
        )
    )
)


class Call(NamedTuple):
    """One call of an operator, and its permitted outcome."""

    name: str
    operator: str
    arguments: list[Any]
    expected: str = ERROR


def schema_of(operator: str) -> list[Any]:
    arguments: list[Any] = getattr(OPERATORS, operator).default._schema.arguments
    return arguments


def changed(sample: str, **changes: Any) -> tuple[str, list[Any]]:
    """Operator and arguments of a sample, some of them, by their names, replaced."""
    operator, arguments = SAMPLES[sample]
    names = [argument.name for argument in schema_of(operator)]
    values = dict(zip(names, arguments("cpu"), strict=False))
    return operator, [value.detach() if isinstance(value, Tensor) else value for value in (values | changes).values()]


def spoilt(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor in wrong shapes, dtypes and places."""
    yield "dimension more", tensor[None]
    yield "sixty dimensions", tensor.new_zeros((1,) * 60)
    for dim, size in enumerate(tensor.shape):
        if size:
            yield f"dimension {dim} gone", tensor.select(dim, 0)
            yield f"none in {dim}", tensor.narrow(dim, 0, 0)
            yield f"one more in {dim}", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
        if size > 1:
            yield f"one less in {dim}", tensor.narrow(dim, 0, size - 1)
    yield from ((f"dtype {dtype}", tensor.to(dtype)) for dtype in DTYPES if dtype != tensor.dtype)
    yield "elsewhere", tensor.to("meta")
    if tensor.dim():
        yield "sparse", tensor.to_sparse()


def spoilt_values(argument: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and lists in place of an argument."""
    if isinstance(value, Tensor):
        yield from spoilt(value)
        yield "None", None
    elif isinstance(value, list):
        yield "none", []
        yield "one less", value[:-1]
        yield "one more", [*value, *value[:1]]
        if value and isinstance(value[-1], Tensor):
            yield from ((how, [*value[:-1], wrong]) for how, wrong in spoilt(value[-1]))


def with_one_spoilt(sample: str) -> Iterator[Call]:
    operator, given = changed(sample)
    yield Call(sample, operator, given, RESULT)
    for place, value in enumerate(given):
        argument = schema_of(operator)[place]
        for how, wrong in spoilt_values(argument, value):
            optional = "Optional" in str(argument.type) or argument.name in ("partners", "valid")
            absent = (optional and how in ("None", "none")) or (
                isinstance(wrong, list) and len(wrong) == len(value) == 0
            )
            may = absent or FREE.fullmatch(f"{operator}, {argument.name}, {how}")
            arguments = [*given[:place], wrong, *given[place + 1 :]]
            yield Call(f"{sample}, {argument.name}, {how}", operator, arguments, EITHER if may else ERROR)


def of_rules() -> Iterator[Call]:
    rule = asdict(RULES["features"])
    for half in ("statistics", "apply", "update"):
        for name, value in rule.items():
            wrong: tuple[Any, ...] = (NAN, -1.0)
            if isinstance(value, (str, int)):
                wrong = ("", "x" * 1000) if isinstance(value, str) else (-1, SMALLEST)
            for number in wrong if name not in ("seed", "reset_ema") else ():
                yield Call(f"{half}, {name} {number}", *changed(f"{half} features", **{name: number}))
        for name, number in (("reset_after", LARGEST), ("reset_active_within", LARGEST), ("seed", SMALLEST)):
            yield Call(f"{half}, {name} {number}", *changed(f"{half} paper", **{name: number}), RESULT)
        for number in (NAN, -1e300, 1e300, INF):
            draws = torch.full((7,), number, dtype=torch.float64)
            yield Call(f"{half}, choice {number}", *changed(f"{half} released", choice=draws), RESULT)


def of_rows() -> Iterator[Call]:
    for first, total in (
        ([-1, 0], [6, 6]),
        ([0, 1], [6, 6]),
        ([LARGEST, 0], [LARGEST, 6]),
        ([0, 0], [LARGEST, 6]),
        ([0, 0], [6, -6]),
    ):
        yield Call(f"rows {first} of {total}", *changed("statistics features", first_row=first, total_rows=total))
    far = {"first_row": [LARGEST - 12, 0], "total_rows": [LARGEST - 6, 6]}
    yield Call("rows far away", *changed("statistics features", **far), RESULT)
    # The check would need a synchronisation on a GPU: there such rows do not count, and the commitment loss is NaN.
    refused = EITHER if ON_HOST else ERROR
    for number in (-1, 7, LARGEST, SMALLEST):
        last = torch.tensor([0, 0, 0, 0, 0, number])
        index = {"index": [torch.zeros(6, dtype=torch.int64), last]}
        yield Call(f"statistics, index {number}", *changed("statistics paper", **index), refused)
        masks = [torch.ones(6, dtype=torch.bool), torch.arange(6) < 5]
        masked = changed("statistics features", **index, valid=masks)
        yield Call(f"statistics, index {number} at a row that does not count", *masked, RESULT)
        codes = torch.full((3, 4), number)
        yield Call(f"commitment, index {number}", *changed("commitment without mask", index=codes), refused)
        none = torch.zeros(3, 4, dtype=torch.bool)
        masked = changed("commitment", index=codes, valid=none)
        yield Call(f"commitment, index {number} at rows that do not count", *masked, RESULT)
        yield Call(f"step {number}", *changed("apply paper", step=torch.tensor(number)), RESULT)
        yield Call(f"idle {number}", *changed("apply paper", idle=torch.full((2, 7), number)), RESULT)


def of_numbers() -> Iterator[Call]:
    for name in ("choice", "noise"):
        yield Call(f"apply without {name}", *changed("apply released", **{name: None}))
    buffer = changed("apply features")[1][5]
    for number in (NAN, -1.0, INF):
        filled = torch.full_like(buffer, number)
        yield Call(f"statistics of {number}", *changed("apply features", statistics=filled), RESULT)
    for number in (NAN, INF, 0.0, -1.0):
        for sample in ("distribution", "distribution backward"):
            yield Call(f"{sample}, temperature {number}", *changed(sample, temperature=number))
    for sample in ("loss", "loss backward"):
        for softmax in ("predictions", "candidates", "both", "", "x" * 1000):
            for offset in (-1, 1, LARGEST, SMALLEST):
                spoilt_loss = changed(sample, softmax_over=softmax, offset=offset)
                yield Call(f"{sample}, {softmax[:20]!r} from {offset}", *spoilt_loss)
    for sample in ("nearest", "nearest half", "nearest with operands", "commitment", "distribution"):
        _, (features, *_) = changed(sample)
        yield Call(f"{sample}, all NaN", *changed(sample, features=features * NAN), RESULT)


def of_memory() -> Iterator[Call]:
    """Sizes without memory, gaps, memory of others, and bytes that are neither operands nor bools."""
    rows, codebook = normal(9, 5), normal(4, 5, seed=1)
    wide, many = torch.zeros(1, 1).expand(1, 2**62), torch.zeros(1, 5).expand(2**40, 5)
    yield Call("search of 2^62 columns", "nearest_codeword", [wide, wide], EITHER if ON_HOST else ERROR)
    for name, huge in (("2^62 columns", wide), ("2^40 codewords", many)):
        memory = torch.zeros(2**12, dtype=torch.uint8)
        yield Call(f"operands of {name}", "codebook_operands", [huge, memory], EITHER)
        yield Call(f"statistics of {name}", *changed("statistics paper", codebook=huge))
        yield Call(f"apply to {name}", *changed("apply paper", codebook=huge))

    operands = made_operands(codebook)
    yield Call("operands of this codebook", "nearest_codeword", [rows, codebook, operands], RESULT)
    for name, wrong in (
        ("of zeros", torch.zeros_like(operands)),
        ("of ones", torch.full_like(operands, 255)),
        ("of another shape", made_operands(normal(3, 5))),
        ("of another dtype", made_operands(codebook.double())),
        ("of other numbers", made_operands(codebook * 3)),
        # All codewords equal, those that fill a panel included.
        ("of other numbers, all zero", torch.cat([operands[:64], torch.zeros_like(operands[64:])])),
        ("of other numbers, all NaN", torch.cat([operands[:64], torch.full_like(operands[64:], 255)])),
        ("not aligned", operands[1:]),
        ("with gaps", torch.cat([operands, operands])[::2]),
    ):
        yield Call(f"operands {name}", "nearest_codeword", [rows, codebook, wrong], EITHER)
    memory = torch.zeros(2**13, dtype=torch.float64)
    yield Call(
        "operands in a codebook", "codebook_operands", [memory[:20].view(4, 5), memory.view(torch.uint8)], EITHER
    )

    for name, value in (
        ("codebook", torch.zeros(7, 1).expand(7, 5)),
        ("ema_count", torch.ones(1).expand(7)),
        ("idle", torch.zeros(1, 7, dtype=torch.int64).expand(2, 7)),
    ):
        yield Call(f"apply, {name} of one row", *changed("apply paper", **{name: value}))
    codes = normal(7, 5)
    yield Call("apply, one memory for two", *changed("apply paper", codebook=codes, ema_sum=codes))
    yield Call("update, one memory for two", *changed("update paper", codebook=codes, ema_sum=codes))
    buffer = torch.zeros(100, dtype=torch.float64)
    state = {
        "codebook": buffer[:35].view(7, 5),
        "ema_sum": buffer[34:69].view(7, 5),
        "ema_count": torch.ones(7).double(),
    }
    yield Call("apply, memory that overlaps", *changed("apply paper", **state))
    state["ema_sum"] = buffer[35:70].view(7, 5)
    yield Call("apply, memory side by side", *changed("apply paper", **state), RESULT)

    mask = torch.arange(12, dtype=torch.uint8).view(torch.bool)
    yield Call("bytes for bools, commitment", *changed("commitment", valid=mask.view(3, 4)), EITHER)
    yield Call("bytes for bools, statistics", *changed("statistics features", valid=[mask[:6], mask[6:]]), EITHER)
    for sample in SAMPLES:
        operator, values = changed(sample)
        views = [torch._neg_view(-x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]
        if not sample.startswith(("apply", "update", "operands")):
            yield Call(f"{sample}, negative views", operator, views, RESULT)


def calls() -> Iterator[Call]:
    """All calls; samples that differ from others in strides or gradients alone are left out."""
    for sample in SAMPLES:
        if not sample.endswith((", permuted", "with gradient")):
            yield from with_one_spoilt(sample)
    for more in (of_rules, of_rows, of_numbers, of_memory):
        yield from more()


def outcome(name: str, arguments: list[Any]) -> Exception | list[Tensor]:
    """The error of a call, or all that it returned or changed; the arguments stay as they are."""
    operator = getattr(OPERATORS, name).default
    written = {place for place, argument in enumerate(operator._schema.arguments) if argument.alias_info is not None}
    copies = {place: x.clone() for place, x in enumerate(arguments) if place in written and copies_alone(x, arguments)}
    values = [copies.get(place, x) for place, x in enumerate(arguments)]
    try:
        returned = operator(*values)
    except Exception as error:
        return error
    # The reference computes no operands.
    changes = (
        [values[place] for place in sorted(written)] if name.startswith(("codebook_apply", "codebook_update")) else []
    )
    return [x for x in (*tree_leaves(returned), *changes) if isinstance(x, Tensor)]


def copies_alone(tensor: Any, arguments: list[Any]) -> bool:
    """Whether a copy of a written tensor is equivalent for the operator: not if it shares memory or has gaps."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    others = [x for x in arguments if isinstance(x, Tensor) and x is not tensor]
    return tensor.is_contiguous() and not any(
        torch._C._overlaps(tensor, x) for x in others if x.layout == torch.strided
    )


def fault(call: Call) -> str:
    """The fault of a call; empty if it has none."""
    found, truth = outcome(call.operator, call.arguments), outcome(f"{call.operator}_reference", call.arguments)
    names = "|".join(argument.name for argument in schema_of(call.operator))
    for error in (found, truth):
        text = str(error)
        if isinstance(error, RuntimeError) and any(message in text for message in NO_MEMORY):
            continue
        if isinstance(error, Exception) and not (
            isinstance(error, (TypeError, ValueError, IndexError))
            and re.search(rf"\b({names})\b", text)
            and re.search(r" must .*, got ", text)
            and len(text) < 300
        ):
            return f"{type(error).__name__}: {text[:400]}"
    results = [result for result in (found, truth) if not isinstance(result, Exception)]
    if call.expected != EITHER and len(results) != (2 if call.expected == RESULT else 0):
        return f"must give {call.expected}, got {found!r:.200} and from the reference {truth!r:.200}"
    if len(results) == 2 and not UNLIKE.match(call.name):
        tolerance = tolerances.codebook_update(torch.float32)
        if call.operator.startswith("cross_info_nce"):
            tolerance = tolerances.cross_info_nce_gradient(LARGEST_SCORE, torch.float32)
        if call.operator.startswith("codeword_distribution"):
            # Gradients of half-precision features are rounded once more on both sides.
            computing = tolerances.codeword_distribution_gradient(5, torch.float32)
            rounding = 2 * max(tolerances.UNIT_ROUNDOFF[part.dtype] for part in results[0])
            tolerance = tolerances.Tolerance(computing.relative + rounding, computing.absolute)
        for part, expected in zip(*results, strict=True):
            if not part.is_meta:
                assert_close(part, expected, tolerance)
    return ""


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    number, failed = 0, 0
    for call in calls():
        number += 1
        say(call.name)
        try:
            wrong = fault(call)
        except AssertionError as error:
            wrong = str(error)
        if wrong:
            failed += 1
            say(f"FAILED {call.name}: {wrong}")
    say(f"{number} calls")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
