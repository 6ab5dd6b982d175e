"""CODIS: its terms beside loops, the transport plan beside the formula and POT, teacher, queue and codebook."""

import copy
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from compare import assert_close, to_float64
from numpy.typing import NDArray
from tolerances import EXACT, SHARED_BATCH, Tolerance
from torch import Tensor

from unicode_fast import UniCode, checkpoint
from unicode_fast.losses import balanced_assignment
from unicode_fast.methods import make_method
from unicode_fast.modules import ModelOutput
from unicode_fast.training.trainer import Trainer

NAMES = "audio,video,text"
Array = NDArray[np.float64]
LENGTHS = {"audio": [5, 2, 1, 5, 3, 4], "video": [1, 4, 4, 2, 4, 3], "text": [7, 6, 1, 2, 3, 7]}


def model(names: str = NAMES, **fields: object) -> UniCode:
    return tiny.model("recommended", names, method="codis", **fields)


def trainer(names: str = NAMES, **fields: object) -> Trainer:
    return tiny.trainer("recommended", names, method="codis", **fields)


def masks(owner: UniCode, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tiny.mask_of(LENGTHS[name], features[name].shape[1]) for name in owner.names}


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def log_softmax(scores: Array) -> Array:
    return np.array([[value - np.log(np.exp(row).sum()) for value in row] for row in scores])


def plan_by_scaling(cost: Array, epsilon: float, rounds: int) -> Array:
    """Sinkhorn and Knopp's scaling of exp(-cost / epsilon) to uniform marginals, columns first; not in logarithms."""
    kernel = np.exp(-cost / epsilon)
    rows, columns = np.ones(len(cost)), np.ones(cost.shape[1])
    for _ in range(rounds):
        columns = 1 / cost.shape[1] / (kernel.T @ rows)
        rows = 1 / len(cost) / (kernel @ columns)
    return rows[:, None] * kernel * columns


def vectors_by_loops(features: dict[str, Tensor], mask: dict[str, Tensor] | None, norm: bool) -> dict[str, Array]:
    found = {}
    for name, z in features.items():
        clips = [to_float64(clip[: LENGTHS[name][i]] if mask else clip) for i, clip in enumerate(z)]
        rows = np.concatenate(clips)
        mean, deviation = (rows.mean(0), np.sqrt(rows.var(0) + 1e-5)) if norm else (0.0, 1.0)
        found[name] = unit(np.array([((clip - mean) / deviation).mean(0) for clip in clips]))
    return found


def terms_by_loops(owner: UniCode, output: ModelOutput, queue: dict[str, Array]) -> dict[str, float]:
    method, names = owner.config.method, owner.names
    codebook = owner.alignment.codewords if method.codis_codebook == "gradient" else owner.codebook.codebook
    codewords = unit(to_float64(codebook))
    student = vectors_by_loops(output.semantic, output.mask, norm=False)
    teacher = vectors_by_loops(output.observed, output.mask, norm=method.feature_norm == "batch")
    plan = {
        name: plan_by_scaling(1 - teacher[name] @ codewords.T, method.codis_epsilon, method.codis_iterations)
        for name in names
    }
    clips = len(student[names[0]])

    def code(one: str, other: str) -> float:
        share = plan[one] / plan[one].sum(1, keepdims=True)
        return -(share * log_softmax(student[other] @ codewords.T / method.codis_gamma)).sum() / clips

    def nce(one: str, other: str) -> float:
        scores = student[one] @ np.concatenate([teacher[other], queue[other]]).T / method.align_temperature
        return -np.mean([log_softmax(scores)[i, i] for i in range(clips)])

    transport = {name: (plan[name] * (1 - student[name] @ codewords.T)).sum() for name in names}
    pairs = [(a, b) for a, b in permutations(names, 2) if a < b]
    total = {
        "code": np.mean([code(a, b) + code(b, a) for a, b in pairs]),
        "transport": np.mean([transport[a] + transport[b] for a, b in pairs]),
        "contrast": np.mean([(nce(a, a) + nce(b, b) + nce(a, b) + nce(b, a)) / 4 for a, b in pairs]),
    }
    return {f"codis.{name}": method.align_weight * float(value) for name, value in total.items()}


@pytest.mark.parametrize("names", ["audio,video", NAMES])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"codis_codebook": "gradient", "align_weight": 0.7},
        {"codis_codebook": "ema", "feature_norm": "none", "codis_iterations": 3},
        {"codis_codebook": "gradient", "codis_queue": 4, "codis_epsilon": 0.2, "codis_gamma": 0.3},
    ],
)
def test_terms(names: str, masked: bool, fields: dict) -> None:
    owner = model(names, dtype="float64", **fields)
    features = tiny.batch(owner, lengths={"video": 4, "text": 7})
    mask = masks(owner, features) if masked else None
    for number, teacher in enumerate(owner.alignment.teacher.parameters()):
        teacher.add_(0.1 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(number)))
    output = owner(features, mask)
    queue = {name: np.zeros((0, 16)) for name in owner.names}
    if "codis_queue" in fields:
        owner.alignment.queue.copy_(torch.nn.functional.normalize(torch.randn(owner.alignment.queue.shape), dim=-1))
        owner.alignment.queued.fill_(3)
        queue = {name: to_float64(rows[:3]) for name, rows in zip(owner.names, owner.alignment.queue, strict=True)}
    terms = {name: x for name, x in make_method(owner).alignment(output).items() if name.startswith("codis.")}
    expected = terms_by_loops(owner, output, queue)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-10), name
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is None for parameter in owner.alignment.teacher.parameters())
    assert all(encoder.temporal.affine.weight.grad.isfinite().all() for encoder in owner.encoders.values())
    if fields["codis_codebook"] == "gradient":
        gradient = owner.alignment.codewords.grad
        assert gradient.isfinite().all() and gradient.abs().sum(1).min() > 0
    assert owner.codebook.codebook.grad is None


@pytest.mark.parametrize(("epsilon", "rounds"), [(0.05, 3), (0.05, 5), (0.1, 50)])
def test_plan(epsilon: float, rounds: int) -> None:
    generator = np.random.default_rng(0)
    features, codewords = unit(generator.normal(size=(20, 16))), unit(generator.normal(size=(30, 16)))
    cosine = torch.as_tensor(features @ codewords.T)
    plan = to_float64(balanced_assignment(cosine, sharpness=1 / epsilon, rounds=rounds)) / 20
    np.testing.assert_allclose(plan, plan_by_scaling(1 - features @ codewords.T, epsilon, rounds), rtol=1e-11)
    np.testing.assert_allclose(plan.sum(1), 1 / 20, rtol=1e-13)
    if rounds == 50:
        np.testing.assert_allclose(plan.sum(0), 1 / 30, rtol=1e-10)


def test_plan_is_that_of_pot() -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    generator = np.random.default_rng(1)
    cosine = unit(generator.normal(size=(80, 16))) @ unit(generator.normal(size=(400, 16))).T
    uniform = np.full(80, 1 / 80), np.full(400, 1 / 400)
    expected = ot.sinkhorn(*uniform, 1 - cosine, 0.05, method="sinkhorn_log", numItermax=1000, stopThr=1e-14)
    plan = to_float64(balanced_assignment(torch.as_tensor(cosine), sharpness=1 / 0.05, rounds=1000)) / 80
    np.testing.assert_allclose(plan, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("training", [True, False])
def test_teacher_starts_as_the_student_without_dropout(training: bool) -> None:
    owner = model(dtype="float64", dropout=0.5, feature_norm="none")
    features = tiny.batch(owner)
    mask = {name: tiny.mask_of([5, 4, 3, 2, 1, 5], 5) for name in features}
    seen = owner.train(training)(features, mask).observed
    expected = owner.eval()(features, mask).semantic
    for name in owner.names:
        assert_close(seen[name][mask[name]], expected[name][mask[name]], Tolerance(1e-12, 1e-13), name)
        assert not seen[name].requires_grad


def test_teacher_follows_the_student() -> None:
    owner = trainer(dtype="float64", codis_teacher_decay=0.9)
    teacher, encoders = owner.model.alignment.teacher, owner.model.encoders
    names = [name for name, _ in encoders.named_parameters() if ".specific." not in name]
    assert [name for name, _ in teacher.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trained = {parameter for group in owner.model.parameter_groups().values() for parameter in group}
    assert not trained & set(teacher.parameters())
    assert f"alignment.teacher.{names[0]}" in owner.model.state_dict()
    expected = {name: encoders.get_parameter(name).detach().clone() for name in names}
    for step in range(3):
        owner.train_step(tiny.batch(owner.model, seed=step), None, 1e-2)
        for name, value in expected.items():
            value.mul_(0.9).add_(encoders.get_parameter(name).detach(), alpha=0.1)
            assert_close(teacher.get_parameter(name), value, Tolerance(1e-12, 1e-14), name)


@pytest.mark.parametrize("size", [4, 6, 9])
def test_queue(size: int) -> None:
    """It holds the teacher's vectors of the last clips, the oldest replaced first."""
    owner = trainer("audio,text", dtype="float64", codis_queue=size, feature_norm="none")
    alignment, kept = owner.model.alignment, {name: [] for name in owner.model.names}
    for step in range(4):
        features = tiny.batch(owner.model, clips=5, seed=step)
        for name in kept:
            kept[name] += list(unit(to_float64(owner.model.observe(name, features[name], None).mean(1))))
        owner.train_step(features, None, 1e-2)
        assert int(alignment.queued) == (step + 1) * min(5, size)
        for name, found in zip(kept, alignment.queue, strict=True):
            last = np.array(kept[name][-size:])
            held = to_float64(found)[: int(alignment.queued)]
            np.testing.assert_allclose(sorted(map(tuple, held)), sorted(map(tuple, last)), rtol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_codewords_by_gradient(masked: bool) -> None:
    owner = trainer(dtype="float64", feature_norm="none")
    codebook, alignment = owner.model.codebook, owner.model.alignment
    first = torch.randn(12, 16, dtype=torch.float64)
    codebook.initialise(first)
    alignment.initialised(owner.model)
    length = first.norm(dim=1).mean()
    assert_close(alignment.codewords, unit(to_float64(first)), Tolerance(1e-14))
    count, tensor = codebook.ema_count.clone(), codebook.codebook
    for step in range(3):
        features = tiny.batch(owner.model, lengths={"video": 4, "text": 7}, seed=step)
        mask = masks(owner.model, features) if masked else None
        torch.manual_seed(step)
        z = owner.model.train()(features, mask).semantic
        norms = [z[name].norm(dim=-1)[... if mask is None else mask[name]].mean() for name in z]
        length = 0.99 * length + 0.01 * sum(norms) / len(norms)
        torch.manual_seed(step)
        owner.train_step(features, mask, 1e-2)
        assert_close(alignment.length, length, Tolerance(1e-12))
        assert_close(alignment.codewords.norm(dim=1), np.ones(12), Tolerance(1e-14))
        assert_close(codebook.codebook, length * alignment.codewords, Tolerance(1e-12, 1e-14))
    assert codebook.codebook is tensor
    assert (alignment.codewords - torch.as_tensor(unit(to_float64(first)))).abs().amax(1).min() > 0.01
    assert int(codebook.step) == 3
    assert torch.equal(codebook.ema_count, count)
    # The search reads the codewords of now, and the nearest one has the largest cosine.
    z = owner.model.eval()(tiny.batch(owner.model)).semantic["audio"]
    found = owner.model.encode("audio", tiny.batch(owner.model)["audio"]).index
    assert torch.equal(found, (z @ alignment.codewords.T).argmax(-1))


def test_codewords_by_ema() -> None:
    """With DCID the codebook is that of the frame."""
    owner = trainer(dcid=True, dtype="float64")
    assert owner.config.method.codis_codebook == "ema"
    assert "alignment" not in owner.model.parameter_groups()
    assert not [name for name in owner.model.state_dict() if name in ("alignment.codewords", "alignment.length")]
    before = owner.model.codebook.ema_count.clone()
    result = owner.train_step(tiny.batch(owner.model), None, 1e-2)
    assert not torch.equal(owner.model.codebook.ema_count, before)
    assert {"cpc", "club.audio", "codis.code"} <= set(result.terms)


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_micro_batches(codebook: str) -> None:
    found = []
    for number in (1, 3):
        owner = trainer(dtype="float64", dropout=0.0, micro_batches=number, codis_queue=8, codis_codebook=codebook)
        for step in range(2):
            features = tiny.batch(owner.model, lengths={"video": 4, "text": 7}, seed=step)
            owner.train_step(features, masks(owner.model, features), 1e-3)
        found.append(owner.model.state_dict())
    for name, value in found[0].items():
        assert_close(found[1][name], value, SHARED_BATCH._replace(relative=1e-7, absolute=1e-8), name)


def test_resume_and_export(tmp_path: Path) -> None:
    """Teacher, queue and codewords are state: a restored trainer goes on with the same bits."""
    owner, other = (trainer(codis_queue=8, dropout=0.2) for _ in range(2))
    for step in range(3):
        owner.train_step(tiny.batch(owner.model, seed=step), None, 1e-2)
    content = copy.deepcopy({"model": owner.model.state_dict(), **owner.state()})
    other.restore(content)
    for one in (owner, other):
        torch.set_rng_state(content["rng"])
        one.train_step(tiny.batch(one.model, seed=7), None, 1e-2)
    for name, value in owner.model.state_dict().items():
        assert_close(other.model.state_dict()[name], value, EXACT, name)
    checkpoint.export(owner.model, tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in owner.model.state_dict().items())
