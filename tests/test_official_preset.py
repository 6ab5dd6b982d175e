"""The official preset against the float64 oracle of the released code: codes, losses, gradients, codebook update."""

from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import numpy as np
import official_oracle as oracle
import pytest
import torch
from compare import assert_close
from official_checkpoint import MODALITIES, TIED, Array, checkpoint, features, map_arrays
from official_tolerances import CODE_MATCHING_GRADIENT, DIRECTIONAL, OFFICIAL

from unicode_fast import ResetDraws, UniCode, losses
from unicode_fast.compat import from_cmg
from unicode_fast.compat.cmg_names import PARAMETER_KEYS, used_entries
from unicode_fast.methods import Draws, UniCodeMethod

CLIPS, POSITIONS = 5, 10
# Positions from which the release draws the end of the context, 1 to 8.
LAST_POSITIONS = range(1, POSITIONS - 1)


@dataclass(frozen=True)
class Case:
    """A checkpoint, the model read from it, one batch, and what the oracle makes of them."""

    saved: dict[str, Any]
    model: UniCode
    inputs: dict[str, Array]
    random: oracle.Draws
    expected: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return map_arrays(self.inputs, torch.from_numpy)

    @property
    def draws(self) -> Draws:
        return method_draws(self.random)


def method_draws(random: oracle.Draws) -> Draws:
    """The oracle's draws as the method takes them; a position in the middle of its step's share of [0, 1)."""
    position = (LAST_POSITIONS.index(random.cpc_step) + 0.5) / len(LAST_POSITIONS)
    return Draws(torch.tensor(position), map_arrays(random.permutation, torch.from_numpy))


def reset_draws(random: oracle.Draws) -> ResetDraws:
    return ResetDraws(torch.from_numpy(random.choice), torch.from_numpy(random.noise))


def make_case(variant: str, *, clips: int = CLIPS, text_lstm: bool = True) -> Case:
    saved = checkpoint(variant, 7, widths=TIED)
    inputs = features(variant, clips, POSITIONS, seed=3, widths=TIED)
    if not text_lstm:
        inputs["text"] = oracle.encode(saved, "text", inputs["text"])["input"]
        del saved["Text_ar_lstm_parameters"]
    random = oracle.draws(MODALITIES[variant], clips, oracle.quantiser_of(saved), seed=4)
    model = from_cmg(map_arrays(saved, torch.from_numpy))
    return Case(saved, model, inputs, random, oracle.forward(saved, inputs, random))


@pytest.fixture(scope="module", params=MODALITIES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def check_all(actual: dict[str, torch.Tensor], expected: dict[str, Array]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_close(actual[name], value, OFFICIAL, name)


def weighted_terms(expected: dict[str, Any]) -> dict[str, float]:
    """The oracle's losses under the names and with the weights of the method."""
    found = expected["losses"]
    plain = {"reconstruction": "reconstruction", "commitment": "commitment", "club": "mutual_information"}
    terms = {f"{ours}.{name}": value for ours, theirs in plain.items() for name, value in found[theirs].items()}
    terms["cpc"] = sum(value * (0.1 if x == y else 1) for (x, y), value in found["prediction"].items())
    return terms | {f"code_matching.{x}-{y}": value / 2 for (x, y), value in found["code_matching"].items()}


class TestOneBatch:
    def test_encode(self, case: Case) -> None:
        for name, value in case.tensors.items():
            encoded = case.model.encode(name, value)
            assert np.array_equal(encoded.index.numpy(), case.expected["index"][name])
            assert_close(encoded.vector, case.expected["code"][name], OFFICIAL, name)

    def test_intermediates(self, case: Case) -> None:
        output = case.model(case.tensors)
        pairs = {
            "semantic": "z",
            "club": "club_target",
            "index": "index",
            "codeword": "code",
            "quantised": "quantised",
            "decoded": "decoded",
            "target": "input",
        }
        for ours, theirs in pairs.items():
            check_all(getattr(output, ours), case.expected[theirs])

    def test_losses(self, case: Case) -> None:
        result = UniCodeMethod(case.model).losses(case.model(case.tensors), case.draws)
        expected = weighted_terms(case.expected)
        assert set(result.terms) == set(expected)
        for name, value in expected.items():
            assert_close(result.terms[name], np.array(value), OFFICIAL, name)
        assert_close(result.total, np.array(case.expected["total"]), OFFICIAL, "total")

    def test_likelihood_of_the_club_networks(self, case: Case) -> None:
        output = case.model(case.tensors)
        for name, expected in case.expected["losses"]["likelihood"].items():
            guess = case.model.club[name](output.quantised[name])
            assert_close(losses.club_likelihood(*guess, output.club[name]), np.array(expected), OFFICIAL, name)

    def test_every_position(self, case: Case) -> None:
        output, method = case.model(case.tensors), UniCodeMethod(case.model)
        names = {name: oracle.cpc_name(variant_of(case), name) for name in case.model.names}
        for step in LAST_POSITIONS:
            random = oracle.Draws(case.random.choice, case.random.noise, case.random.permutation, step)
            found = oracle.cross_prediction(case.saved["CPC_parameters"], names, case.expected["z"], step)
            expected = sum(value * (0.1 if x == y else 1) for (x, y), value in found.items())
            term = method.losses(output, method_draws(random)).terms["cpc"]
            assert_close(term, np.array(expected), OFFICIAL, f"step {step}")

    def test_without_text_lstm(self) -> None:
        with pytest.warns(UserWarning, match="Text_ar_lstm_parameters"):
            case = make_case("AT", text_lstm=False)
        self.test_encode(case)
        self.test_losses(case)

    def test_forward_and_encode_change_no_buffer(self, case: Case) -> None:
        before = {name: value.clone() for name, value in case.model.state_dict().items()}
        case.model(case.tensors)
        case.model.encode("audio", case.tensors["audio"])
        assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def variant_of(case: Case) -> str:
    return next(key for key, names in MODALITIES.items() if names == case.model.names)


class TestCodebook:
    def test_update_and_reset(self, case: Case) -> None:
        model = from_cmg(map_arrays(case.saved, torch.from_numpy))
        output = model(case.tensors)
        model.codebook.update(output.semantic, output.index, draws=reset_draws(case.random))
        averaged, expected = case.expected["averaged"], case.expected["quantiser"]
        reset = (averaged.embedding != expected.embedding).any(1)
        assert 0 < reset.sum() < len(reset)
        self._check(model, expected)

    def test_several_updates(self, case: Case) -> None:
        model, state = from_cmg(map_arrays(case.saved, torch.from_numpy)), oracle.quantiser_of(case.saved)
        for step in range(4):
            generator = np.random.default_rng(step)
            z = {m: generator.standard_normal((CLIPS, POSITIONS, TIED.width)) for m in case.model.names}
            index = {m: oracle.nearest(value, state.embedding) for m, value in z.items()}
            random = oracle.draws(case.model.names, CLIPS, state, seed=step)
            state = oracle.reset(oracle.update_average(state, z, index), index, random)
            tensors = [map_arrays(values, torch.from_numpy) for values in (z, index)]
            model.codebook.update(*tensors, draws=reset_draws(random))
            self._check(model, state)

    def test_a_fresh_codebook(self, case: Case) -> None:
        """Counts at zero, every codeword never used: the first step makes unused codewords explode."""
        state = oracle.quantiser_of(case.saved)
        start = state._replace(
            embedding=state.embedding / 400,
            ema_weight=state.embedding / 400,
            ema_count=np.zeros(TIED.codewords),
            unactivated_count=np.full(TIED.codewords, -1.0),
        )
        model = from_cmg(map_arrays(case.saved, torch.from_numpy))
        for ours, theirs in (("codebook", "embedding"), ("ema_sum", "ema_weight"), ("ema_count", "ema_count")):
            getattr(model.codebook, ours).copy_(torch.from_numpy(getattr(start, theirs)))
        model.codebook.idle.fill_(-1)
        output = model(case.tensors)
        index = {name: oracle.nearest(z, start.embedding) for name, z in case.expected["z"].items()}
        model.codebook.update(output.semantic, output.index, draws=reset_draws(case.random))
        expected = oracle.reset(oracle.update_average(start, case.expected["z"], index), index, case.random)
        assert np.abs(expected.embedding).max() > 100
        self._check(model, expected)

    @staticmethod
    def _check(model: UniCode, expected: oracle.Quantiser) -> None:
        codebook = model.codebook
        assert_close(codebook.codebook, expected.embedding, OFFICIAL, "codebook")
        assert_close(codebook.ema_count, expected.ema_count, OFFICIAL, "counts")
        assert_close(codebook.ema_sum, expected.ema_weight, OFFICIAL, "sums")
        assert np.array_equal(codebook.idle.amin(0).numpy(), expected.unactivated_count)


class TestGradients:
    """One random direction in the space of all parameters: the derivative against the oracle's finite difference."""

    STEP = 1e-8

    def test_of_the_total(self, case: Case) -> None:
        method, model = UniCodeMethod(case.model), case.model
        model.zero_grad()
        method.losses(model(case.tensors), case.draws).total.backward()
        keys = [key for key in PARAMETER_KEYS if "_mi_net_" not in key]
        moved, derivative = self._moved(case, keys)
        plus, minus = (
            oracle.forward(moved(sign), case.inputs, case.random, offset=case.expected["offset"]) for sign in (1, -1)
        )
        assert derivative == pytest.approx((plus["total"] - minus["total"]) / (2 * self.STEP), rel=DIRECTIONAL.relative)

    def test_of_the_likelihood(self, case: Case) -> None:
        """An inner step of plain gradient descent, with a rate of one, moves by the gradient."""
        model = from_cmg(map_arrays(case.saved, torch.from_numpy))
        method = UniCodeMethod(model)
        optimizer = torch.optim.SGD(model.club.parameters(), lr=0.0)
        method.fit_club(model(case.tensors), optimizer)
        keys = [f"{name.title()}_mi_net_parameters" for name in model.names]
        moved, derivative = self._moved(Case(case.saved, model, case.inputs, case.random, case.expected), keys)
        plus, minus = (
            sum(oracle.forward(moved(sign), case.inputs, case.random)["losses"]["likelihood"].values())
            for sign in (1, -1)
        )
        assert derivative == pytest.approx((plus - minus) / (2 * self.STEP), rel=DIRECTIONAL.relative)

    def test_of_code_matching(self) -> None:
        """The subtracted smallest score has a gradient too, because of the 1e-5 in the denominator."""
        generator, step = np.random.default_rng(0), 1e-6
        shares = [generator.dirichlet(np.full(6, 3.0), 4) for _ in range(2)]
        tensors = [torch.from_numpy(share).requires_grad_() for share in shares]
        losses.code_matching(*tensors, pairing="official", directions="rows").backward()
        for place in np.ndindex(4, 6):
            moved = np.zeros((4, 6))
            moved[place] = step
            plus, minus = (oracle.code_matching(shares[0] + sign * moved, shares[1]) for sign in (1, -1))
            expected = np.array((plus - minus) / (2 * step))
            assert_close(tensors[0].grad[place], expected, CODE_MATCHING_GRADIENT, str(place))

    def _moved(self, case: Case, keys: list[str]) -> tuple[Any, float]:
        """A function from a sign to the checkpoint moved along the direction, and the model's derivative along it."""
        generator, directions, derivative = np.random.default_rng(0), {}, 0.0
        parameters = dict(case.model.named_parameters())
        for key, entries in used_entries(case.model.modalities).items():
            for entry, name in entries.items() if key in keys else ():
                if name in parameters:
                    direction = generator.standard_normal(case.saved[key][entry].shape)
                    directions[key, entry] = direction
                    derivative += float((parameters[name].grad * torch.from_numpy(direction)).sum())

        def moved(sign: int) -> dict[str, Any]:
            result = {key: dict(value) if isinstance(value, dict) else value for key, value in case.saved.items()}
            for (key, entry), direction in directions.items():
                result[key][entry] = result[key][entry] + sign * self.STEP * direction
            return result

        return moved, derivative


class TestDistributions:
    """Without injected draws every outcome of the release occurs, and no other."""

    ROUNDS = 120

    def test_positions_and_permutations(self) -> None:
        case = make_case("AV", clips=3)
        method, output, saved = UniCodeMethod(case.model), case.model(case.tensors), case.saved
        names = {name: name for name in case.model.names}
        steps, orders = list(LAST_POSITIONS), list(permutations(range(3)))
        predicted = []
        for step in steps:
            found = oracle.cross_prediction(saved["CPC_parameters"], names, case.expected["z"], step)
            predicted.append(sum(value * (0.1 if x == y else 1) for (x, y), value in found.items()))
        z, y = case.expected["quantised"]["audio"], case.expected["club_target"]["audio"]
        net = saved["Audio_mi_net_parameters"]
        estimates = [oracle.mutual_information(net, z, y, np.array(order)) for order in orders]
        assert min(abs(x - y) for x, y in product(predicted, predicted) if x != y) > OFFICIAL.absolute
        seen: tuple[set[int], set[int]] = set(), set()
        for step in range(self.ROUNDS):
            case.model.codebook.step.fill_(step)
            terms = method.losses(output).terms
            for term, values, found in zip(("cpc", "club.audio"), (predicted, estimates), seen, strict=True):
                place = int(np.abs(np.array(values) - terms[term].item()).argmin())
                assert_close(terms[term], np.array(values[place]), OFFICIAL, term)
                found.add(place)
        assert seen == (set(range(len(steps))), set(range(len(orders))))

    def test_reset_codewords_are_near_active_ones(self) -> None:
        case = make_case("AV")
        output = case.model(case.tensors)
        averaged, expected = case.expected["averaged"], case.expected["quantiser"]
        reset = np.flatnonzero((averaged.embedding != expected.embedding).any(1))
        idle = expected.unactivated_count.copy()
        idle[reset] = oracle.IDLE_LIMIT + 1
        active = averaged.embedding[(idle >= 0) & (idle < oracle.ACTIVE_WITHIN)]
        sources, start = set(), case.model.codebook.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        for step in range(self.ROUNDS):
            case.model.codebook.load_state_dict({**start, "step": torch.tensor(step)})
            case.model.codebook.update(output.semantic, output.index)
            for row in case.model.codebook.codebook.numpy()[reset]:
                gap = np.abs(row - active).max(1)
                sources.add(int(gap.argmin()))
                assert 0 < gap.min() <= oracle.RESET_NOISE + OFFICIAL.absolute
        assert sources == set(range(len(active)))
