"""CLUB networks computed together: the results and gradients of one network after the other."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from cases import ON_HOST, normal, strided
from compare import assert_all_close, assert_close, assert_no_worse
from tolerances import CLUB, EXACT, MANY_ROWS
from torch import Tensor, nn

from unicode_fast import backend, losses
from unicode_fast.modules import club

OPERATORS = torch.ops.unicode_fast_layers
by_operator = pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")

# Positions and width of the specific features by modality. The first two networks are computed together.
SIZES = {"audio": (4, 5), "depth": (4, 5), "video": (4, 7), "text": (2, 5)}


def inputs(leading: int = 3) -> tuple[nn.ModuleDict, dict[str, Tensor], dict[str, Tensor]]:
    """Networks, semantic features with gradient, specific features."""
    networks = nn.ModuleDict({name: club.ClubNetwork(6, width, 8) for name, (_, width) in SIZES.items()}).double()
    semantic, specific = {}, {}
    for seed, (name, (length, width)) in enumerate(SIZES.items()):
        semantic[name] = normal(leading, length, 6, seed=seed, dtype=torch.float64).requires_grad_()
        specific[name] = normal(leading, length, width, seed=9 + seed, dtype=torch.float64)
    return networks, semantic, specific


def test_predict() -> None:
    """With the gradients of features and parameters."""
    networks, semantic, specific = inputs()
    leaves = [*semantic.values(), *networks.parameters()]
    one_by_one = {name: network(semantic[name]) for name, network in networks.items()}
    gradients = []
    for results in (club.predict(networks, semantic), one_by_one):
        total = torch.stack([losses.club_likelihood(*results[name], specific[name]) for name in SIZES]).sum()
        gradients.append(torch.autograd.grad(total, leaves))
        for name in SIZES:
            assert_all_close(results[name], one_by_one[name], MANY_ROWS, name)
    assert_all_close(*gradients, MANY_ROWS)


MASKS = {
    "audio": tiny.mask_of([4, 1, 2], 4),
    "depth": None,
    "video": tiny.mask_of([0, 3, 1], 4),
    "text": tiny.mask_of([0, 0, 0], 2),
}


@pytest.mark.parametrize("masks", [dict.fromkeys(SIZES), MASKS], ids=["every position", "masks"])
def test_likelihood_gradients(masks: dict[str, Tensor | None]) -> None:
    """They replace older gradients; without a valid position they are 0."""
    networks, semantic, specific = inputs()
    likelihoods = [losses.club_likelihood(*networks[n](semantic[n]), specific[n], masks[n]) for n in SIZES]
    expected = torch.autograd.grad(torch.stack(likelihoods).sum(), list(networks.parameters()))
    for parameter in networks.parameters():
        parameter.grad = torch.ones_like(parameter)
    club.set_likelihood_gradients(networks, semantic, specific, masks)
    for (name, parameter), truth in zip(networks.named_parameters(), expected, strict=True):
        assert parameter.grad is not None and not parameter.grad.requires_grad
        assert parameter.grad.any() == (masks is not MASKS or not name.startswith("text."))
        assert_close(parameter.grad, truth, MANY_ROWS, name)


class Case:
    """Networks of differing sizes with their rows, in float32.

    Args:
        clips, length: B and T.
        widths: D, C and hidden width of each network.
        lengths: valid positions of each clip, or None.
        scale: of the weights; large ones bring log variances near -1 and 1.
    """

    def __init__(
        self,
        clips: int,
        length: int,
        widths: list[tuple[int, int, int]],
        lengths: list[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        torch.manual_seed(1)
        names = [f"network {number}" for number in range(len(widths))]
        made = [club.ClubNetwork(width, specific, hidden) for width, specific, hidden in widths]
        self.networks = nn.ModuleDict(dict(zip(names, made, strict=True)))
        with torch.no_grad():
            for number, parameter in enumerate(self.networks.parameters()):
                parameter.mul_(scale).add_(normal(*parameter.shape, seed=number), alpha=0.05)
        mask = None if lengths is None else tiny.mask_of(lengths, length)
        # The last network has every position.
        self.masks = (
            dict(zip(names, [*[mask] * (len(names) - 1), None], strict=True)) if names[1:] else {names[0]: mask}
        )
        self.semantic, self.specific = (
            {
                n: normal(clips, length, sizes[kind], seed=7 * kind + k)
                for k, (n, sizes) in enumerate(zip(names, widths, strict=True))
            }
            for kind in (0, 1)
        )

    def of(self, dtype: torch.dtype) -> tuple[nn.ModuleDict, dict[str, Tensor], dict[str, Tensor]]:
        """New networks and leaves with the same numbers."""
        widths = [
            (n.mean[0].in_features, n.mean[-1].out_features, n.mean[0].out_features) for n in self.networks.values()
        ]
        networks = nn.ModuleDict(
            dict(zip(self.networks, (club.ClubNetwork(w, s, h) for w, s, h in widths), strict=True))
        )
        networks.load_state_dict(self.networks.state_dict())
        copies = (
            {n: x.to(dtype).clone().requires_grad_() for n, x in given.items()}
            for given in (self.semantic, self.specific)
        )
        return networks.to(dtype), *copies

    def likelihood(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The parameters' gradients by `set_likelihood_gradients`."""
        networks, semantic, specific = self.of(dtype)
        club.set_likelihood_gradients(networks, semantic, specific, self.masks)
        return [gradient for p in networks.parameters() if (gradient := p.grad) is not None]

    def estimate(self, dtype: torch.dtype = torch.float32, reduction: str = "mean") -> list[Tensor]:
        """Estimates, and their weighted sum's gradients in features and parameters."""
        networks, semantic, specific = self.of(dtype)
        values = club.closed_form(networks, semantic, specific, self.masks, reduction=reduction)
        total = (values * torch.arange(1, len(values) + 1)).sum()
        leaves = [*semantic.values(), *specific.values(), *networks.parameters()]
        return [values.detach(), *torch.autograd.grad(total, leaves)]


CASES = {
    "training": Case(80, 10, [(128, 128, 64), (128, 64, 64), (128, 128, 64)], [10] * 70 + [9] * 9 + [1]),
    "one network": Case(5, 7, [(16, 16, 16)], [7, 0, 3, 1, 7]),
    "other sizes": Case(9, 3, [(5, 7, 9), (17, 1, 33), (1, 70, 100)], [3, 3, 0, 1, 2, 3, 3, 3, 2]),
    "one position": Case(301, 1, [(24, 40, 20)]),
    "one clip": Case(1, 20, [(24, 40, 20)], [13]),
    "many positions": Case(3, 50, [(24, 40, 20), (8, 8, 8)], [50, 49, 3]),
    "no valid position": Case(2, 3, [(8, 8, 8), (8, 8, 8)], [0, 0]),
    "large weights": Case(20, 6, [(30, 20, 40)], scale=6.0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., list[Tensor]]], list[Tensor]]:
    """Results with the reference backend."""

    def call(function: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_FORCED", "reference")
            return function(*arguments)

    return call


@by_operator
@cases
def test_likelihood_by_operator(case: Case, by_torch: Callable[..., list[Tensor]]) -> None:
    """As exact as torch's products in float32."""
    found, own, truths = case.likelihood(), by_torch(case.likelihood), case.likelihood(torch.float64)
    for result, torchs, truth in zip(found, own, truths, strict=True):
        assert_no_worse(result, torchs, truth, CLUB)


@by_operator
@cases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_estimate_by_operator(case: Case, reduction: str, by_torch: Callable[..., list[Tensor]]) -> None:
    """With gradients of features and parameters."""
    single, double = (torch.float32, reduction), (torch.float64, reduction)
    found, own, truths = case.estimate(*single), by_torch(case.estimate, *single), case.estimate(*double)
    for result, torchs, truth in zip(found, own, truths, strict=True):
        assert_no_worse(result, torchs, truth, CLUB)


@by_operator
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads: int, set_threads: Callable[[int], None]) -> None:
    """Results are the same to the last bit."""
    case = CASES["training"]
    set_threads(1)
    expected = case.likelihood(), case.estimate()
    set_threads(threads)
    for found, truth in zip((case.likelihood(), case.estimate()), expected, strict=True):
        assert_all_close(found, truth, EXACT)


@by_operator
def test_layout_and_values_of_invalid_positions() -> None:
    """Rows of any strides; NaN at invalid positions reaches no result."""
    case, other = (Case(5, 7, [(16, 20, 24), (16, 20, 24)], [7, 0, 3, 1, 7]) for _ in range(2))
    for given in (other.semantic, other.specific):
        for name, mask in other.masks.items():
            changed = given[name] if mask is None else given[name].masked_fill(~mask.unsqueeze(-1), torch.nan)
            given[name] = strided(changed)
    assert_all_close(other.likelihood(), case.likelihood(), EXACT)
    assert_all_close(other.estimate(), case.estimate(), EXACT)


@by_operator
def test_no_clips() -> None:
    case = Case(0, 3, [(8, 8, 8), (8, 8, 8)], [])
    assert not any(gradient.any() for gradient in case.likelihood())
    values, *gradients = case.estimate()
    assert values[0] == 0 and values[1].isnan()  # the mean over no rows, with a mask and without
    assert [gradient.shape[0] for gradient in gradients[:4]] == [0, 0, 0, 0]


@by_operator
def test_gradients_that_are_asked_for() -> None:
    """Those of features alone, of parameters alone, of both, and a second time."""
    case = CASES["other sizes"]
    values, *expected = case.estimate()
    features = 2 * len(case.networks)
    networks, semantic, specific = case.of(torch.float32)
    leaves = [*semantic.values(), *specific.values(), *networks.parameters()]

    def total() -> Tensor:
        values = club.closed_form(networks, semantic, specific, case.masks, reduction="mean")
        return (values * torch.arange(1, len(values) + 1)).sum()

    for chosen in (slice(0, features), slice(features, None), slice(2, 3), slice(-2, -1)):
        value = total()
        for _ in range(2):
            assert_all_close(torch.autograd.grad(value, leaves[chosen], retain_graph=True), expected[chosen], EXACT)
        value.backward(inputs=leaves[chosen])
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert_all_close(found, expected[chosen], EXACT)
        for leaf in leaves:
            leaf.grad = None
    for leaf in leaves[:features]:
        leaf.requires_grad_(False)
    assert_all_close(torch.autograd.grad(total(), leaves[features:]), expected[features:], EXACT)
    with torch.no_grad():
        assert_close(total(), (values * torch.arange(1, 4)).sum(), EXACT)


@by_operator
def test_choice_in_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in float32 takes the operators; the reference backend, float64 and autocast take torch's."""
    taken: list[str] = []
    real = club.Perceptrons.forward
    monkeypatch.setattr(club.Perceptrons, "forward", lambda *args: taken.append("torch") or real(*args))

    def by_torch(**fields: object) -> bool:
        taken.clear()
        trainer = tiny.trainer(**fields)
        trainer.train_step(tiny.batch(trainer.model), None, 1e-3)
        return bool(taken)

    assert not by_torch()
    assert by_torch(club_estimator="official") and len(taken) == 2  # two sizes, once for the estimates
    assert by_torch(dtype="float64")
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_FORCED", "reference")
        assert by_torch()
    networks, semantic, specific = CASES["one network"].of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        taken.clear()
        club.closed_form(networks, semantic, specific, CASES["one network"].masks, reduction="mean")
        assert taken


@by_operator
def test_differentiated_once() -> None:
    case = CASES["one network"]
    networks, semantic, specific = case.of(torch.float32)
    value = club.closed_form(networks, semantic, specific, case.masks, reduction="mean").sum()
    with pytest.raises(RuntimeError, match="CLUB can be differentiated once on a CPU in float32"):
        torch.autograd.grad(value, list(semantic.values()), create_graph=True)


X, Y = normal(2, 5, 8), normal(2, 5, 3)
PARAMETERS = list(club.ClubNetwork(8, 3, 4).parameters())
BAD: list[tuple[int, list[Any], type[Exception], str]] = [
    (0, [], ValueError, "semantic, specific and valid must have an entry for each network, got 0, 1 and 1"),
    (0, [X, X], ValueError, "semantic, specific and valid must have an entry for each network, got 2, 1 and 1"),
    (2, [], ValueError, "semantic, specific and valid must have an entry for each network, got 1, 1 and 0"),
    (0, [X.double()], TypeError, r"semantic\[0\] must be float32, got float64"),
    (0, [X.to("meta")], ValueError, r"semantic\[0\] must be on a CPU, got meta"),
    (0, [X[0]], ValueError, r"semantic\[0\] must have shape .* got \(5, 8\)"),
    (0, [X[..., :0]], ValueError, r"semantic\[0\] must have shape .* D at least 1"),
    (0, [X[..., :7]], ValueError, r"parameters\[0\] must have shape \(4, 7\).* got \(4, 8\)"),
    (1, [Y[:1]], ValueError, r"specific\[0\] must have shape \(2, 5, 3\).* got \(1, 5, 3\)"),
    (1, [Y[..., :2]], ValueError, r"parameters\[6\] must have shape \(2, 4\).* got \(3, 4\)"),
    (2, [torch.ones(2, 5)], TypeError, r"valid\[0\] must be bool, got float32"),
    (2, [torch.ones(2, 4) > 0], ValueError, r"valid\[0\] must have shape \(2, 5\).* got \(2, 4\)"),
    (3, [], ValueError, "parameters must have a weight and a bias for each layer .* got 0 for 1 networks"),
    (3, PARAMETERS[:-1], ValueError, "parameters must have a weight and a bias for each layer .* got 15 for 1"),
    (3, [PARAMETERS[0].double(), *PARAMETERS[1:]], TypeError, r"parameters\[0\] must be float32, got float64"),
    (3, [PARAMETERS[0][0], *PARAMETERS[1:]], ValueError, r"parameters\[0\] must have shape \(1, 8\).* got \(8,\)"),
    (3, [PARAMETERS[0], Y, *PARAMETERS[2:]], ValueError, r"parameters\[1\] must have shape \(4,\).* got \(2, 5, 3\)"),
    (3, [*PARAMETERS[:8], X, *PARAMETERS[9:]], ValueError, r"parameters\[8\] must have shape .* got \(2, 5, 8\)"),
]


@by_operator
@pytest.mark.parametrize(("place", "value", "error", "message"), BAD)
def test_bad_arguments(place: int, value: list[Any], error: type[Exception], message: str) -> None:
    given: list[Any] = [[X], [Y], [None], PARAMETERS]
    given[place] = value
    for call in (OPERATORS.club_likelihood_gradients, lambda *each: OPERATORS.club_estimate(*each, True)):
        with pytest.raises(error, match=message):
            call(*given)
