"""The interface of a method: one that has a single term of its own trains through the same step, loop and report."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import tiny
import torch
from compare import assert_close
from tolerances import SHARED_BATCH
from torch import Tensor

from unicode_fast.methods import Draws, Method
from unicode_fast.modules import ModelOutput
from unicode_fast.train import main
from unicode_fast.training import trainer

pytestmark = pytest.mark.usefixtures("short_probes")


class MeanDistance(Method):
    """Squared distance between the mean features of a clip's modalities."""

    def alignment(self, output: ModelOutput, _: Draws | None = None) -> dict[str, Tensor]:
        means = {name: z.mean(1) for name, z in output.semantic.items()}
        return {
            f"distance.{first}-{second}": (means[first] - means[second]).square().sum(1).mean()
            for first, second in combinations(means, 2)
        }


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "make_method", MeanDistance)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_has_the_gradient_of_the_losses(micro_batches: int) -> None:
    own = tiny.trainer(micro_batches=micro_batches, dropout=0.0, dtype="float64", clip_norm=1e9)
    features = tiny.batch(own.model)
    losses = MeanDistance(own.model).losses(own.model(features))
    parameters = [(name, p) for name, p in own.model.named_parameters() if not name.startswith(("club", "cpc"))]
    expected = torch.autograd.grad(losses.total, [p for _, p in parameters], allow_unused=True)
    result = own.train_step(features, None, 1e-3)
    assert list(result.terms) == list(losses.terms)
    for (name, parameter), gradient in zip(parameters, expected, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            assert_close(parameter.grad, gradient, SHARED_BATCH, name)


def test_a_run_reports_its_terms(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store, out = tiny.write(tmp_path / "store"), tmp_path / "run"
    fields = {**tiny.SIZES, "steps": 20, "batch_size": 10, "validations": 1, "data": store, "out": out}
    assert main([f"--{name}={value}" for name, value in fields.items()]) == 0
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    distances = [name for name in first["losses"] if not name.startswith("reconstruction.")]
    assert distances == [f"distance.{pair}" for pair in ("audio-video", "audio-text", "video-text")]
    assert "recognised" not in first
    assert "classification" in capsys.readouterr().out
    assert (out / "plots" / "losses.png").is_file()
