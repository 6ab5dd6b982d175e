"""The transformer layer beside torch's, and dropout as random numbers."""

import numpy as np
import pytest
import torch
from cases import normal
from compare import assert_close
from tolerances import EXACT, FLOAT64, STANDARD_ERRORS, Tolerance
from torch import Tensor, nn

from unicode_fast.modules import transformer
from unicode_fast.modules.transformer import TransformerLayer, dropout

ROUNDED = Tolerance(FLOAT64["rel"], FLOAT64["abs"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_as_torch_computes_it(training: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; in training with the products of dropout, whose zeros are left out."""
    probability = 0.1 if training else 0.0
    monkeypatch.setattr(transformer, "dropout", lambda values, _: values)
    torch.manual_seed(0)
    ours = TransformerLayer(12, 3, 20, probability, batch_first=True, dtype=torch.float64).train(training)
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, dtype=torch.float64).train(training)
    theirs.load_state_dict(ours.state_dict())
    sequence = normal(4, 6, 12, dtype=torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 1, 3, 5])[:, None]
    found = ours(sequence, valid if masked else None)
    expected = theirs(sequence, src_key_padding_mask=~valid if masked else None)
    counted = valid if masked else torch.ones_like(valid)
    assert_close(found[counted], expected[counted], ROUNDED)
    for output in (found, expected):
        output[counted].square().sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad, ROUNDED, name)


def drawn(shape: tuple[int, ...], probability: float, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(shape, dtype=torch.float64), probability)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.97])
def test_dropout_is_uniform_and_independent(probability: float) -> None:
    """The share of zeros, in each of the four draws of a number too; draws do not depend on their neighbours."""
    values = drawn((400, 100), probability).numpy()
    zeros = values == 0
    assert set(np.unique(values[~zeros])) == {1 / (1 - probability)}
    error = STANDARD_ERRORS * np.sqrt(probability * (1 - probability))
    for draws in (zeros.reshape(-1), *zeros.reshape(-1, 4).T):
        # The probability is rounded to a multiple of 2^-16.
        assert abs(draws.mean() - probability) < error / np.sqrt(draws.size) + 2.0**-17
    flat = zeros.reshape(-1) - probability
    for distance in (1, 2, 3, 4, 100):
        assert abs((flat[:-distance] * flat[distance:]).mean()) < error**2 / STANDARD_ERRORS / np.sqrt(flat.size)


def test_dropout_repeats_with_the_state_of_the_generator() -> None:
    """The same state, the same zeros; also for a number of elements that four does not divide."""
    assert_close(drawn((7, 3), 0.5), drawn((7, 3), 0.5), EXACT)
    assert not torch.equal(drawn((7, 30), 0.5), drawn((7, 30), 0.5, seed=1))
    assert torch.equal(drawn((5,), 0.0), torch.ones(5, dtype=torch.float64))
    assert not drawn((5,), 1.0).any()


def test_gradient_of_dropout() -> None:
    """The gradient has the zeros and the factor of the values."""
    values = normal(40, 30).requires_grad_()
    kept = dropout(values, 0.25)
    kept.sum().backward()
    assert_close(values.grad, torch.where(kept == 0, 0.0, torch.ones(()) / 0.75), EXACT)
