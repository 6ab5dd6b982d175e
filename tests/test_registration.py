"""Registration of every operator: schema, fakes, gradients, compilation; no operator makes the host wait."""

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, NamedTuple

import pytest
import torch
from cases import NEAREST_CASES, normal
from compare import assert_all_close, assert_close
from processes import python
from tolerances import EXACT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unicode_fast.ops import (
    CodebookState,
    EmaConfig,
    PreparedCodebook,
    codebook_update,
    codeword_distribution,
    commitment_loss,
    cross_info_nce,
    nearest_codeword,
)
from unicode_fast.reference import (
    codebook_update_reference,
    codeword_distribution_backward_reference,
    codeword_distribution_reference,
    commitment_reference,
    cross_info_nce_backward_reference,
    cross_info_nce_reference,
    nearest_codeword_reference,
)
from unicode_fast.reference.codebook_update import CodebookBatch
from unicode_fast.reference.cross_info_nce import CrossInfoNCEInputs

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")),
]
RULES = {
    "paper": EmaConfig(reset_after=1, reset_unless="all"),
    "released": EmaConfig(update="sequential", smoothing="compounding", reset_after=1, reset_ema=False),
    "features": EmaConfig(smoothing="transient", reset_after=1, reset_source="feature"),
}
Arguments = Callable[[str], tuple[Any, ...]]


class Update(NamedTuple):
    """The inputs of a codebook update."""

    state: CodebookState
    features: list[Tensor]
    index: list[Tensor]
    partners: list[Tensor]
    valid: list[Tensor]
    draws: tuple[Tensor | None, Tensor | None]


def update_inputs(device: str, options: bool = False) -> Update:
    """Two modalities of six rows; with options partners, masks and draws too."""
    codebook = normal(7, 5).to(device)
    idle = torch.arange(14, device=device).reshape(2, 7) % 4
    step = torch.tensor(4, device=device)
    state = CodebookState(codebook, torch.ones(7, device=device), codebook.clone(), idle, step)
    features = [normal(6, 5, seed=m).to(device) for m in (1, 2)]
    index = [torch.arange(6, device=device) % 3] * 2
    if not options:
        return Update(state, features, index, [], [], (None, None))
    valid = torch.tensor([True, True, False, True, False, True], device=device)
    draws = (torch.rand(7, dtype=torch.float64, device=device), 2 * torch.rand(7, 5, device=device).double() - 1)
    partners = [normal(6, 5, seed=m).to(device) for m in (3, 4)]
    return Update(state, features, index, partners, [valid, ~valid], draws)


def statistics_arguments(
    rule: EmaConfig, device: str, options: bool = False, every_attempt: bool = False
) -> tuple[Any, ...]:
    """Arguments of the operator codebook_statistics in the schema's order."""
    state, features, index, partners, valid, draws = update_inputs(device, options)
    shard = ([0, 0], [6, 6])
    return (
        state.codebook,
        state.step,
        features,
        index,
        partners,
        valid,
        draws[0],
        *shard,
        every_attempt,
        *astuple(rule),
    )


def apply_arguments(rule: EmaConfig, device: str, options: bool = False) -> tuple[Any, ...]:
    """Arguments of the operator codebook_apply in the schema's order."""
    state, *_, draws = update_inputs(device, options)
    buffer = torch.ops.unicode_fast.codebook_statistics_reference(*statistics_arguments(rule, device, options))
    return (*state, buffer, *draws, *astuple(rule))


def whole_update_arguments(rule: EmaConfig, device: str, options: bool = False) -> tuple[Any, ...]:
    """Arguments of the operator codebook_update in the schema's order."""
    state, *rows, draws = update_inputs(device, options)
    return (*state, *rows, *draws, [0, 0], [6, 6], *astuple(rule))


def made_operands(codebook: Tensor) -> Tensor:
    """Operands of a codebook, for searches."""
    operands = torch.zeros(2**17, dtype=torch.uint8, device=codebook.device)
    torch.ops.unicode_fast.codebook_operands(codebook, operands)
    return operands


def distribution_arguments(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, float]:
    valid = torch.tensor([[True, False, True, True]] * 2 + [[False] * 4], device=device)
    return normal(3, 4, 5, dtype=dtype).to(device), normal(6, 5, seed=1, dtype=dtype).to(device), valid, 0.7


def commitment_arguments(device: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    index = torch.arange(12, device=device).reshape(3, 4) % 6
    weights = normal(3, 3, seed=3, dtype=torch.float64).abs().to(device)
    features, codebook = normal(3, 4, 5, dtype=dtype).to(device), normal(6, 5, seed=1, dtype=dtype).to(device)
    return features, index, index % 4 != 1, codebook, weights


def loss_arguments(device: str, softmax_over: str = "both") -> tuple[Any, ...]:
    targets, predictions = normal(2, 3, 4, 5).to(device), normal(2, 3, 4, 5, seed=1).to(device)
    valid = torch.rand(2, 3, 4, device=device) < 0.7
    weights = torch.tensor([[0.1, 1.0], [0.5, 0.0]], device=device)
    return targets, predictions, weights, valid, torch.tensor(0.9, device=device), softmax_over, 0


def with_gradient(arguments: tuple[Any, ...], *places: int) -> tuple[Any, ...]:
    return tuple(x.requires_grad_() if place in places else x for place, x in enumerate(arguments))


def without_mask(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if isinstance(x, Tensor) and x.dtype == torch.bool else x for x in arguments)


def permuted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers, the second dimension of vectors the slowest in memory."""

    def permute(x: Any) -> Any:
        return x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 2 else x

    return tuple(map(permute, arguments))


# Operator and arguments, by the name of the test.
SAMPLES: dict[str, tuple[str, Arguments]] = {
    "nearest": ("nearest_codeword", lambda d: (normal(9, 5).to(d), normal(4, 5, seed=1).to(d))),
    "nearest with gradient": (
        "nearest_codeword",
        lambda d: with_gradient((normal(9, 5).to(d), normal(4, 5, seed=1).to(d)), 0, 1),
    ),
    "nearest half": ("nearest_codeword", lambda d: (normal(9, 5).half().to(d), normal(4, 5, seed=1).to(d))),
    "nearest empty": ("nearest_codeword", lambda d: (normal(0, 5).to(d), normal(4, 5, seed=1).to(d))),
    "nearest with operands": (
        "nearest_codeword",
        lambda d: (normal(9, 5).to(d), normal(4, 5, seed=1).to(d), made_operands(normal(4, 5, seed=1).to(d))),
    ),
    "compared": ("compared_codewords", lambda d: (normal(9, 5).to(d), normal(4, 5, seed=1).to(d))),
    "compared half": ("compared_codewords", lambda d: (normal(9, 5).half().to(d), normal(4, 5, seed=1).to(d))),
    "operands": ("codebook_operands", lambda d: (normal(4, 5).to(d), made_operands(normal(4, 5).to(d)))),
    "operands half": (
        "codebook_operands",
        lambda d: (normal(4, 5).half().to(d), made_operands(normal(4, 5).half().to(d))),
    ),
    "statistics paper": ("codebook_statistics", lambda d: statistics_arguments(RULES["paper"], d)),
    "apply paper": ("codebook_apply", lambda d: apply_arguments(RULES["paper"], d)),
    "statistics released": ("codebook_statistics", lambda d: statistics_arguments(RULES["released"], d, options=True)),
    "apply released": ("codebook_apply", lambda d: apply_arguments(RULES["released"], d, options=True)),
    "statistics features": ("codebook_statistics", lambda d: statistics_arguments(RULES["features"], d, options=True)),
    "statistics of every attempt": (
        "codebook_statistics",
        lambda d: statistics_arguments(RULES["features"], d, options=True, every_attempt=True),
    ),
    "apply features": ("codebook_apply", lambda d: apply_arguments(RULES["features"], d, options=True)),
    "update paper": ("codebook_update", lambda d: whole_update_arguments(RULES["paper"], d)),
    "update released": ("codebook_update", lambda d: whole_update_arguments(RULES["released"], d, options=True)),
    "update features": ("codebook_update", lambda d: whole_update_arguments(RULES["features"], d, options=True)),
    "distribution": ("codeword_distribution", distribution_arguments),
    "distribution with gradient": (
        "codeword_distribution",
        lambda d: with_gradient(distribution_arguments(d, torch.float64), 0, 1),
    ),
    "distribution without mask": ("codeword_distribution", lambda d: without_mask(distribution_arguments(d))),
    "distribution backward": (
        "codeword_distribution_backward",
        lambda d: (normal(3, 6, seed=2).to(d), *distribution_arguments(d), True),
    ),
    "distribution backward of features": (
        "codeword_distribution_backward",
        lambda d: (normal(3, 6, seed=2).to(d), *distribution_arguments(d), False),
    ),
    "distribution backward, permuted": (
        "codeword_distribution_backward",
        lambda d: (normal(3, 6, seed=2).to(d), *permuted(distribution_arguments(d)), True),
    ),
    "commitment": ("commitment_loss", commitment_arguments),
    "commitment with gradient": ("commitment_loss", lambda d: with_gradient(commitment_arguments(d), 0)),
    "commitment without mask": ("commitment_loss", lambda d: without_mask(commitment_arguments(d))),
    "commitment backward": (
        "commitment_loss_backward",
        lambda d: (normal(3, seed=2).to(d), normal(3, 4, 5).to(d), normal(3, 4, 5, seed=1).to(d)),
    ),
    "loss": ("cross_info_nce", loss_arguments),
    "loss with gradient": ("cross_info_nce", lambda d: with_gradient(loss_arguments(d), 0, 1, 4)),
    "loss over candidates": ("cross_info_nce", lambda d: with_gradient(loss_arguments(d, "candidates"), 1)),
    "loss and gradient": ("cross_info_nce_with_gradient", lambda d: with_gradient(loss_arguments(d), 0, 1, 4)),
    "loss and gradient, permuted": ("cross_info_nce_with_gradient", lambda d: permuted(loss_arguments(d))),
    "loss and gradient backward": (
        "cross_info_nce_with_gradient_backward",
        lambda d: tuple(
            x.to(d) for x in (torch.tensor(2.0), *(normal(2, 3, 4, 5), normal(2, 3, 4, 5), torch.tensor(0.5)) * 2)
        ),
    ),
    "loss without mask": ("cross_info_nce", lambda d: without_mask(loss_arguments(d))),
    "loss backward": (
        "cross_info_nce_backward",
        lambda d: (
            torch.tensor(2.0, device=d),
            normal(2, 2, 2, 3, 4, seed=2).to(d),
            normal(2, 2, 3, seed=3).to(d),
            *loss_arguments(d),
        ),
    ),
    "loss, permuted": ("cross_info_nce", lambda d: with_gradient(permuted(loss_arguments(d)), 0, 1, 4)),
    "loss backward, permuted": (
        "cross_info_nce_backward",
        lambda d: (
            torch.tensor(2.0, device=d),
            normal(2, 2, 2, 3, 4, seed=2).to(d),
            normal(2, 2, 3, seed=3).to(d),
            *permuted(loss_arguments(d)),
        ),
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("twin", ["", "_reference"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_operator_checker(sample: str, twin: str, device: str) -> None:
    name, arguments = SAMPLES[sample]
    torch.library.opcheck(getattr(torch.ops.unicode_fast, name + twin).default, arguments(device))


def test_every_operator_has_a_sample() -> None:
    declared = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "unicode_fast::" in name}
    sampled = {name for name, _ in SAMPLES.values()}
    assert declared == sampled | {f"{name}_reference" for name in sampled}


@pytest.mark.parametrize("name", ["codebook_apply", "codebook_update"])
def test_update_declares_what_it_changes(name: str) -> None:
    schema = getattr(torch.ops.unicode_fast, name).default._schema
    changed = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert changed == list(CodebookState._fields)
    assert not schema.returns


def nearest(device: str, rows: int) -> list[Tensor]:
    return [normal(2, rows, 5).to(device), normal(4, 5, seed=1).to(device)]


def distribution(device: str, rows: int) -> list[Tensor]:
    return [normal(3, rows, 5).to(device).requires_grad_(), normal(6, 5, seed=1).to(device).requires_grad_()]


def commitment(device: str, rows: int) -> list[Tensor]:
    features, index = (
        normal(2, rows, 5).to(device).requires_grad_(),
        torch.arange(2 * rows, device=device).view(2, rows),
    )
    return [features, index % 4, normal(4, 5, seed=1).to(device), torch.full((2, 2), 0.25, device=device)]


def loss(device: str, rows: int) -> list[Tensor]:
    vectors = [normal(2, 3, rows, 5, seed=seed).to(device).requires_grad_() for seed in (0, 1)]
    return [*vectors, torch.ones(2, 2, device=device)]


def masked_loss(targets: Tensor, predictions: Tensor, weights: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    valid = targets.detach()[..., 0] < 1
    # As in the model's targets: prediction steps first in memory.
    steps_first = targets.transpose(0, 1).contiguous().transpose(0, 1)
    return tuple(cross_info_nce(steps_first, predictions, weights, valid=valid, temperature=temperature))


# Functions as a model would compile them, with their inputs for a device and a number of rows.
COMPILED: dict[str, tuple[Callable[..., Any], Callable[[str, int], list[Tensor]]]] = {
    "nearest": (lambda features, codebook: tuple(nearest_codeword(features, codebook)), nearest),
    "nearest prepared": (
        lambda features, codebook: tuple(nearest_codeword(features, PreparedCodebook(codebook))),
        nearest,
    ),
    "commitment": (lambda x, i, e, w: (commitment_loss(x, i, e, w, valid=x[:, :, 0] < 1),), commitment),
    "distribution": (lambda x, e: (codeword_distribution(x, e, valid=x[:, :, 0] < 1, temperature=0.5),), distribution),
    "loss": (lambda a, b, w: tuple(cross_info_nce(a, b, w, softmax_over="both", temperature=0.7)), loss),
    "masked loss": (
        masked_loss,
        lambda d, rows: [*loss(d, rows), torch.tensor(0.7, device=d, requires_grad=True)],
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(name: str, dynamic: bool, device: str) -> None:
    """aot_eager traces forward and backward but generates no code, which is quick."""
    function, make_inputs = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 6):
        results = []
        for run in (compiled, function):
            inputs = make_inputs(device, rows)
            found = run(*inputs)
            leaves = [x for x in inputs if x.requires_grad]
            gradients = torch.autograd.grad(found[0].square().sum(), leaves) if leaves else ()
            results.append([*found, *gradients])
        assert_all_close(*results, EXACT)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_under_autocast(device: str) -> None:
    """Vectors of two dtypes, as from a layer under autocast and another layer."""

    def function(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return cross_info_nce(a, b.bfloat16(), w).loss

    torch._dynamo.reset()
    inputs = loss(device, 4)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        found = run(*inputs)
        results.append([found, *torch.autograd.grad(found, inputs[:2])])
    assert_all_close(*results, EXACT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES)
def test_update_compiles_in_one_graph(rule: str, device: str) -> None:
    def function(state: CodebookState, features: list[Tensor], index: list[Tensor]) -> Tensor:
        codebook_update(state, features, index, RULES[rule])
        return state.codebook.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = update_inputs(device)
    states = [CodebookState(*(tensor.clone() for tensor in inputs.state)) for _ in range(2)]
    for _ in range(3):
        for run, state in zip((compiled, function), states, strict=True):
            run(state, inputs.features, inputs.index)
    assert_all_close(*states, EXACT)


class WaitCounter(TorchDispatchMode):
    """Counts the operations that wait for a device, or whose results have data-dependent shapes."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.operations += 1
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if name in self.WAITING or boolean_index:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def refuse_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor, *arguments: Any) -> None:
        raise AssertionError("this makes the host wait for the device")

    for method in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, refuse)


def reference_calls() -> dict[str, Callable[[], Any]]:
    """Every reference on its own: as operators they would hide their operations from the counter."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("training", "no_rows", "float16_and_float32"):
        features, codebook = NEAREST_CASES[name]()
        calls[f"nearest {name}"] = lambda x=features, e=codebook: nearest_codeword_reference(x, e)
    for name, rule in RULES.items():
        for options in (False, True):
            state, *lists, _ = update_inputs("cpu", options)
            batch = CodebookBatch(*lists)
            calls[f"update {name} {options}"] = lambda s=state, b=batch, r=rule: codebook_update_reference(
                s, b, r, None
            )
    inputs = distribution_arguments("cpu")
    gradient = normal(3, 6)
    features, index, valid, codes, weights = commitment_arguments("cpu")
    calls["commitment"] = lambda: commitment_reference(features, index, valid, codes, weights)
    calls["distribution"] = lambda: codeword_distribution_reference(*inputs)
    calls["distribution backward"] = lambda: codeword_distribution_backward_reference(gradient, *inputs)
    for softmax_over in ("predictions", "candidates", "both"):
        loss_inputs = CrossInfoNCEInputs(*loss_arguments("cpu", softmax_over))
        logsumexp = torch.zeros(2 if softmax_over == "both" else 1, 2, 2, 3, 4)
        calls[f"loss {softmax_over}"] = lambda x=loss_inputs: cross_info_nce_reference(x)
        calls[f"loss {softmax_over} backward"] = lambda x=loss_inputs, n=logsumexp: cross_info_nce_backward_reference(
            n.sum(), n, n[0, ..., 0], x
        )
    return calls


@pytest.mark.parametrize("name", reference_calls())
def test_references_do_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = reference_calls()[name]
    refuse_to_wait(monkeypatch)
    with WaitCounter() as counter:
        call()
    assert counter.operations > 5
    assert not counter.waits


def public_calls(device: str) -> Callable[[], None]:
    """Calls all public functions, backward too, with given inputs."""
    inputs = [make_inputs(device, 4) for _, make_inputs in COMPILED.values()]
    updates = [update_inputs(device, options=True) for _ in RULES]

    def run() -> None:
        for (function, _), tensors in zip(COMPILED.values(), inputs, strict=True):
            (first, *_) = function(*tensors)
            if first.requires_grad:
                first.sum().backward()
        for rule, update in zip(RULES.values(), updates, strict=True):
            codebook_update(update.state, update.features, update.index, rule, valid=update.valid)

    return run


def test_public_functions_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    run = public_calls("cpu")
    refuse_to_wait(monkeypatch)
    with WaitCounter() as counter:
        run()
    assert not counter.waits


def test_the_counter_counts() -> None:
    numbers = torch.arange(3.0)
    with WaitCounter() as counter:
        numbers[numbers > 1] = numbers[numbers > 1]
        bool(numbers.sum() > 0)
    assert counter.waits == {"index": 1, "index_put_": 1, "_local_scalar_dense": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
def test_nothing_waits_for_the_gpu() -> None:
    run = public_calls("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@pytest.mark.parametrize("rule", RULES)
def test_a_step_replays_from_a_cuda_graph(rule: str) -> None:
    """Search, commitment, its gradient and the update: captured once, replayed with other numbers."""

    def step(state: CodebookState, rows: Tensor) -> Tensor:
        index = nearest_codeword(rows.flatten(0, 1), state.codebook).index.view(rows.shape[:2])
        leaf = rows.detach().requires_grad_()
        weights = torch.full((2, 2), 0.25, dtype=torch.float64, device="cuda")
        commitment_loss(leaf, index, state.codebook, weights).sum().backward()
        codebook_update(state, list(rows), list(index), RULES[rule])
        return leaf.grad

    def state() -> CodebookState:
        return CodebookState(*(tensor.clone() for tensor in update_inputs("cuda").state))

    batches = [normal(2, 6, 5, seed=seed).to("cuda") for seed in range(4)]
    rows, captured, plain = batches[0].clone(), state(), state()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(state(), rows)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step(captured, rows)
    for batch in batches:
        rows.copy_(batch)
        graph.replay()
        assert_close(gradient, step(plain, batch), EXACT)
    assert_all_close(captured, plain, EXACT)


PRECEDENCE = """
import torch

def implementation(features, codebook, operands=None):
    return torch.full((features.shape[0],), 42, dtype=torch.int32)

def register():
    library = torch.library.Library("unicode_fast", "IMPL")
    library.impl("compared_codewords", implementation, "CPU")
    return library

{first}
{second}
inputs = (torch.randn(3, 5), torch.randn(2, 5))
operators = torch.ops.unicode_fast
assert operators.compared_codewords(*inputs).tolist() == [42, 42, 42]
assert operators.compared_codewords_reference(*inputs).tolist() == [-1, -1, -1]
"""


@pytest.mark.parametrize("backend_first", [False, True])
def test_an_implementation_takes_the_place_of_the_reference(backend_first: bool) -> None:
    """A backend may register before or after the package is imported; the reference stays reachable by name.

    No CPU backend of the package has the operator.
    """
    lines = ["import unicode_fast", "library = register()"]
    first, second = reversed(lines) if backend_first else lines
    script = PRECEDENCE.format(first=first, second=second)
    result = python("-W", "error", "-c", script)
    assert result.returncode == 0, result.stderr
