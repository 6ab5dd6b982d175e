"""Open-set classification: measures against brute force, by hand and scikit-learn; what the probe may learn from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from look_up import CODEWORDS, NAMES, LookUp, coded, dataset
from sklearn.metrics import roc_auc_score
from task_tolerances import RATIO, SEPARATED

from unicode_fast.data import Dataset, write_store
from unicode_fast.tasks import Evaluator, open_set
from unicode_fast.tasks.metrics import open_set as metrics
from unicode_fast.tasks.metrics.intervals import Bootstrap
from unicode_fast.tasks.metrics.open_set import Decisions, measure
from unicode_fast.tasks.official import official_probe
from unicode_fast.tasks.probe import ProbeRule
from unicode_fast.train import main as train

CLASSES, KNOWN, POSITIONS = 5, 3, 6


def close(value: float) -> object:
    return pytest.approx(value, rel=RATIO.relative, abs=RATIO.absolute)


def drawn(seed: int, clips: int = 80, levels: int = 20) -> tuple[Decisions, np.ndarray]:
    """Random decisions, confidences with ties, and the truth."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(KNOWN + 1, size=clips)
    best = np.where(generator.random(clips) < 0.6, np.minimum(truth, KNOWN - 1), generator.integers(KNOWN, size=clips))
    confidence = generator.integers(1, levels, clips) / levels
    return Decisions(best, confidence, confidence < 0.4), truth


def test_measures_by_hand() -> None:
    # Rows are the true classes 0, 1, 2 and unknown, columns the predicted ones, the last of them rejected.
    confusion = np.array([[3, 1, 0, 0], [0, 1, 0, 1], [0, 0, 4, 4], [1, 0, 0, 3]])
    truth, predicted = (np.repeat(places, confusion.ravel()) for places in np.indices((4, 4)).reshape(2, -1))
    best, rejected = np.where(predicted < 3, predicted, truth % 3), predicted == 3
    found = measure(Decisions(best, np.where(rejected, 0.2, 0.8), rejected), truth, 3)
    os_star, acc_in, unk = (3 / 4 + 1 / 2 + 4 / 8) / 3, 8 / 14, 3 / 4
    assert found["os_star"] == close(os_star) and found["acc_in"] == close(acc_in)
    assert found["unk"] == found["acc_out"] == close(unk)
    assert found["hos"] == close(2 * os_star * unk / (os_star + unk))
    assert found["h"] == close(2 * acc_in * unk / (acc_in + unk))
    assert found["os"] == close((3 * os_star + unk) / 4)
    # Nine of fourteen known clips and one of four unknown ones have the large confidence, the other four the small one.
    assert found["auroc"] == close((9 * 3 + (9 * 1 + 5 * 3) / 2) / (14 * 4))


def test_nothing_right_is_zero_and_not_a_division_by_zero() -> None:
    truth = np.array([0, 1, KNOWN])
    found = measure(Decisions(np.array([1, 0, 0]), np.ones(3), np.zeros(3, bool)), truth, KNOWN)
    assert found["h"] == found["hos"] == found["os"] == found["oscr"] == 0 and found["auroc"] == 0.5
    # Without unknown clips, measures of both kinds are undefined.
    assert np.isnan(measure(Decisions(truth[:2], np.ones(2), np.zeros(2, bool)), truth[:2], KNOWN)["hos"])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_auroc_is_that_of_scikit_learn(seed: int, levels: int) -> None:
    decisions, truth = drawn(seed, levels=levels)
    assert measure(decisions, truth, KNOWN)["auroc"] == close(roc_auc_score(truth < KNOWN, decisions.confidence))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_oscr_is_the_area_under_its_curve(seed: int, levels: int) -> None:
    decisions, truth = drawn(seed, levels=levels)
    right, inside = decisions.best == truth, truth < KNOWN
    rates, hits = [0.0], [0.0]
    for threshold in np.unique(decisions.confidence)[::-1]:
        above = decisions.confidence >= threshold
        rates.append((above & ~inside).sum() / (~inside).sum())
        hits.append((above & inside & right).sum() / inside.sum())
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(rates, rates[1:], hits, hits[1:], strict=False))
    found = measure(decisions, truth, KNOWN)
    assert found["oscr"] == close(area) and found["oscr"] < found["auroc"]
    perfect = Decisions(np.minimum(truth, KNOWN - 1), decisions.confidence, decisions.rejected)
    assert measure(perfect, truth, KNOWN)["oscr"] == found["auroc"]


def test_a_weight_is_a_number_of_copies() -> None:
    decisions, truth = drawn(7)
    bootstrap = Bootstrap(len(truth), seed=0, resamples=7)
    numbers = [np.repeat(np.arange(len(truth)), weights.astype(int)) for weights in bootstrap.weights]
    copies = [measure(Decisions(*(one[each] for one in decisions)), truth[each], KNOWN) for each in numbers]
    for name, estimate in metrics.open_set_metrics(decisions, truth, KNOWN, bootstrap).items():
        low, high = np.percentile([copy[name] for copy in copies], (2.5, 97.5))
        assert (estimate.low, estimate.high) == (close(low), close(high))
        assert estimate.value == measure(decisions, truth, KNOWN)[name]


@pytest.mark.parametrize("seed", range(20))
def test_the_official_threshold_is_the_best_of_ten(seed: int) -> None:
    """By the released form of the rule: a rejection is a column that is 1."""
    generator = np.random.default_rng(seed)
    probability = generator.dirichlet(np.full(KNOWN, 0.3), size=60)
    truth = generator.integers(KNOWN + 1, size=60)
    best, sure = probability.argmax(1), probability.max(1)
    found = 0.0
    for threshold in np.linspace(sure.min(), sure.max(), 10):
        predicted = np.concatenate([probability, (sure < threshold)[:, None]], 1).argmax(1)
        acc_in = (predicted == truth)[truth < KNOWN].mean()
        acc_out = (predicted == truth)[truth == KNOWN].mean()
        found = max(found, 2 * acc_in * acc_out / (acc_in + acc_out) if acc_in + acc_out else 0.0)
    decisions = metrics.official_decisions(best, sure, truth, KNOWN)
    assert measure(decisions, truth, KNOWN)["h"] == close(found)
    logits = torch.from_numpy(np.log(probability))
    kind = open_set.OfficialOpenClassification(KNOWN)
    assert kind.score(logits, torch.from_numpy(truth), torch.ones(60, POSITIONS)) == close(found)


@pytest.mark.parametrize("known", [1, 2, 8, 14, 21])
def test_chance_is_the_best_blind_guess(known: int) -> None:
    rate = np.linspace(0, 1, 100_001)
    acc_in = (1 - rate) / known
    assert metrics.chance_h(known) == pytest.approx((2 * acc_in * rate / (acc_in + rate)).max(), rel=1e-8)


def test_chance_of_the_published_settings() -> None:
    assert [round(metrics.chance_h(known), 3) for known in (14, 21)] == [0.089, 0.064]


@pytest.mark.parametrize("clips", [1, 19, 20, 40, 101])
def test_the_threshold_rejects_as_many_as_allowed(clips: int) -> None:
    values = np.random.default_rng(clips).random(clips)
    threshold = metrics.rejection_threshold(values, 0.05)
    assert (values < threshold).sum() == clips // 20
    assert (np.repeat(values, 2) < metrics.rejection_threshold(np.repeat(values, 2), 0.05)).mean() <= 0.05


def codes_of(shift: int = 0, missing: dict[str, int] | None = None, *, noise: int = 0) -> Dataset:
    """Five codes for each class. `noise` draws codes of unknown classes, `missing` names a class to leave out."""
    splits = {}
    for number, (split, count) in enumerate({"train": 150, "val": 60, "test": 100}.items()):
        generator = np.random.default_rng([shift, number])
        target = generator.permutation(np.arange(count) % CLASSES)
        if missing and split in missing:
            target[target == missing[split]] = CLASSES - 1
        code = target[:, None] * 5 + generator.integers(5, size=(count, POSITIONS))
        other = np.random.default_rng([noise, number]).integers(CODEWORDS, size=code.shape)
        code = np.where((target >= KNOWN)[:, None] & (noise > 0), other, code)
        codes = dict.fromkeys(NAMES, code)
        splits[split] = coded(codes, [str(one) for one in range(CLASSES)], {"class": target})
    return dataset(splits)


@pytest.fixture
def long_probes(short_probes: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that learn."""
    monkeypatch.setattr(ProbeRule, "passes", short_probes)


@pytest.mark.usefixtures("long_probes")
def test_known_classes_are_recognised_and_the_rest_is_rejected() -> None:
    row = Evaluator(LookUp(), codes_of(), known=KNOWN).row("open-classification", "audio", "video", details=True)
    assert row.clips == 100 and row.chance == metrics.chance_h(KNOWN) and row.learnable and row.above_chance
    found = {name: estimate.value for name, estimate in row.metrics.items()}
    assert row.score == found["hos"] and min(row.score, found["auroc"], found["oscr"]) > SEPARATED
    assert found["acc_in_ceiling"] == found["hos_ceiling"] == 1
    assert row.token is not None and row.token.score > SEPARATED


def test_the_official_probe_learns_known_classes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more steps than two an epoch, which its small learning rate needs."""
    monkeypatch.setattr(ProbeRule, "passes", lambda *_: 5)
    evaluator = Evaluator(LookUp(3.0, noise=0.0), codes_of(), known=KNOWN)
    kind = evaluator.kind("open-classification", "official")
    scored = evaluator.home.examples(kind, "test", "video")
    clips = evaluator.home.clips("train", "audio")
    best = official_probe(kind, evaluator.model, clips, "audio", {"video": scored}, 0)["video"]
    assert best.logits.shape == (100, KNOWN) and best.score > SEPARATED
    assert best.score == kind.score(best.logits, scored.truth, scored.codes.mask)


@pytest.mark.usefixtures("long_probes")
def test_unknown_classes_and_test_clips_enter_no_choice() -> None:
    """Other codes of unknown classes change scores, but neither the probe nor its threshold."""
    heads = []
    for noise in (1, 2):
        evaluator = Evaluator(LookUp(), codes_of(noise=noise), known=KNOWN)
        heads.append(evaluator.head("open-classification", "audio"))
        assert heads[-1].classify.weight.shape[0] == KNOWN
    assert heads[0].threshold == heads[1].threshold > 1 / KNOWN
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(one, other)
    validation = evaluator.home.examples(evaluator.kind("open-classification"), "val", "audio")
    known = validation.truth < KNOWN
    output = evaluator.kind("open-classification").output(heads[-1], validation.codes)
    rejected = output.argmax(1) == KNOWN
    assert rejected[known].float().mean() <= open_set.REJECTED < rejected[~known].float().mean()


def test_ceilings_of_a_class_without_training_clips() -> None:
    """Class 1 is missing in training; of the test clips of known classes 20, 20 and 20, two thirds can be right."""
    for protocol, name, most in (("held_out", "hos_ceiling", 0.8), ("official", "h_ceiling", 0.8)):
        evaluator = Evaluator(LookUp(), codes_of(missing={"train": 1}), known=KNOWN)
        found = evaluator.row("open-classification", "audio", "video", protocol, details=True).metrics
        assert found["acc_in_ceiling"].value == close(2 / 3) and found[name].value == close(most)
        assert found["acc_in"].value <= 2 / 3
    # A class that is missing among the scored clips lowers nothing.
    kind = evaluator.kind("open-classification")
    assert kind.limits(torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3]))["acc_in_ceiling"].value == 1


def test_the_official_epochs_are_those_of_the_data_set() -> None:
    for name, epochs in (("ucf51", 16), ("ave", 25), ("ucf-vggsound", 25)):
        data = dataset({"train": codes_of().split("train")}, name)
        kind = Evaluator(LookUp(), data).kind("open-classification", "official")
        closed = dataclasses.replace(open_set.OfficialClassification.rule, halve_at=(10, 20))
        assert kind.rule == dataclasses.replace(closed, epochs=epochs)


@pytest.mark.usefixtures("short_probes")
def test_a_threshold_of_one_data_set_is_used_on_another() -> None:
    home, other = codes_of(), codes_of(shift=1)
    evaluator = Evaluator(LookUp(), home, known=KNOWN, transfer={"cross-open-classification": other})
    row = evaluator.row("cross-open-classification", "audio", "video")
    away = evaluator.head("cross-open-classification", "audio", at_home=False)
    assert row.clips == 100 and 0 <= row.score <= 1
    assert evaluator.head("cross-open-classification", "audio").threshold != away.threshold


@pytest.mark.usefixtures("short_probes")
def test_bad_numbers_of_known_classes_are_named() -> None:
    for known in (0, -1, CLASSES, 9):
        with pytest.raises(ValueError, match=f"known must be at least 1 and below the 5 classes .*, got {known}"):
            Evaluator(LookUp(), codes_of(), known=known).row("open-classification", "audio", "video")
    assert Evaluator(LookUp(), codes_of()).kind("open-classification").columns(codes_of().split("val")) == 2
    for missing, message in (
        ({"train": 0}, "clips to learn from must be of the 1 known classes, got none of 150"),
        ({"test": 0}, "clips to score on must be of known and of unknown classes, got 100 of unknown ones only"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(LookUp(), codes_of(missing=missing), known=1).row("open-classification", "audio", "video")


def test_data_without_unknown_classes_are_refused_before_training(tmp_path: Path) -> None:
    splits = tiny.learnable_splits({"train": 60, "val": 24, "test": 24})
    for split in splits.values():
        split["class"] = np.zeros_like(split["class"])
    kinds = {name: tiny.MODALITIES[name] for name in ("audio", "video", "text")}
    write_store(tmp_path / "store", "tiny", kinds, ["zero", "one", "two"], splits)
    flags = [f"--data={tmp_path / 'store'}", "--steps=1", "--validations=0", "--batch_size=10"]
    flags += [f"--{name}={value}" for name, value in tiny.SIZES.items()]
    message = "^probe_tasks must be tasks that the data can measure, got 'open-classification': clips to score on must"
    with pytest.raises(ValueError, match=message):
        train([*flags, "--probe_tasks=open-classification", f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
