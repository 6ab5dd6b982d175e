"""Probes on codes with and without information on the class, and their side effects."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from look_up import CODEWORDS, NAMES, WIDTH, Encoded, LookUp, coded, dataset
from task_tolerances import LAYER, LEARNED
from tolerances import STANDARD_ERRORS
from torch import Tensor, nn
from tqdm import tqdm

from unicode_fast import tasks
from unicode_fast.data import ClipSet, Dataset, open_store
from unicode_fast.data.lazy import LazyArray
from unicode_fast.tasks import Evaluator, Row, runner
from unicode_fast.tasks.metrics import scores as metrics
from unicode_fast.tasks.metrics.intervals import RESAMPLES
from unicode_fast.tasks.metrics.masks import BETA_SQUARED, THRESHOLDS
from unicode_fast.tasks.official import official_probe
from unicode_fast.tasks.probe import (
    EncodedClips,
    Examples,
    ProbeHead,
    ProbeRule,
    ProbeTask,
    encode_batch,
    encode_split,
    one_thread,
    probe_seed,
    train_probe,
)
from unicode_fast.tasks.retrieval import DEPTH, RetrievalRule
from unicode_fast.tasks.segmentation.backbones import LIGHT_SETTINGS, TIMM_SETTINGS
from unicode_fast.tasks.segmentation.task import JUDGED, OFFICIAL_BATCH, OFFICIAL_RATE

CLASSES, POSITIONS = 4, 6
COUNTS = {"train": 240, "val": 80, "test": 400}


def official_scores(
    kind: ProbeTask, model: LookUp, split: ClipSet, source: str, names: list[str], seed: int
) -> dict[str, float]:
    """Scores of a probe that is trained and scored on the same clips."""
    codes = {name: encode_split(model, split, name) for name in names}
    scored = {name: Examples(codes[name], kind.truth(split, name)) for name in names}
    return {name: best.score for name, best in official_probe(kind, model, split, source, scored, seed).items()}


def clips(count: int, seed: int, *, learnable: bool = True, private: bool = False) -> ClipSet:
    """Each class and the background have five codewords; with `private`, every modality has separate codewords."""
    generator = np.random.default_rng(seed)
    target = generator.permutation(np.arange(count) % CLASSES)
    start, length = generator.integers(0, 3, (count, 1)), generator.integers(2, 5, (count, 1))
    shown = (np.arange(POSITIONS) >= start) & (np.arange(POSITIONS) < start + length)
    meaning = np.where(shown, target[:, None], CLASSES)
    label = np.eye(CLASSES + 1, dtype=np.uint8)[meaning]
    codes = {}
    for number, name in enumerate(NAMES):
        variant = np.full(meaning.shape, number) if private else generator.integers(5, size=meaning.shape)
        codes[name] = meaning * 5 + variant if learnable else generator.integers(CODEWORDS, size=meaning.shape)
    arrays = {"audio.label": label, "video.label": label, "class": target}
    return coded(codes, [str(number) for number in range(CLASSES)], arrays)


def store(**options: bool) -> Dataset:
    return dataset({split: clips(count, seed, **options) for seed, (split, count) in enumerate(COUNTS.items())})


def padded(split: ClipSet, extra: int, filler: int) -> ClipSet:
    """The same clips with padded positions that hold a code of class 0, labels included."""
    width = ((0, 0), (0, extra), (0, 0))
    arrays = {"class": split.target}
    for name, value in split.features.items():
        arrays[name] = np.pad(value, width, constant_values=filler)
        arrays[f"{name}.length"] = split.lengths[name]
    arrays |= {f"{name}.label": np.pad(value, width, constant_values=1) for name, value in split.labels.items()}
    return dataclasses.replace(split, arrays=arrays)


@pytest.fixture(scope="module")
def learnable_rows() -> list[Row]:
    return Evaluator(LookUp(), store(), 3).table(progress=False)


@pytest.fixture(scope="module")
def chance_rows() -> list[Row]:
    return Evaluator(LookUp(), store(learnable=False), 1).table(progress=False)


def test_a_probe_learns_from_codes_and_transfers_to_every_modality(learnable_rows: list[Row]) -> None:
    assert [(row.task, row.source, row.target) for row in learnable_rows] == [
        *(("classification", *pair) for pair in itertools.permutations(NAMES, 2)),
        ("localisation", "audio", "video"),
        ("localisation", "video", "audio"),
    ]
    for row in learnable_rows:
        assert min(row.score, row.same_modality) > LEARNED
        assert row.protocol == "held_out"


def test_codes_without_meaning_give_chance(chance_rows: list[Row]) -> None:
    for row in chance_rows:
        error = math.sqrt(0.25 * 0.75 / COUNTS["test"])
        if row.task == "classification":
            assert abs(row.score - row.chance) < STANDARD_ERRORS * error
        else:
            # Probabilities up to one half predict nothing.
            assert row.score < row.chance
        ends = row.same_interval or ()
        assert len(ends) == 2 and row.at_chance == (min(row.same_modality, *ends) <= row.chance)


def test_separate_codes_of_modalities_give_chance_across_and_everything_within() -> None:
    """As in a model whose modalities share no codeword."""
    for row in Evaluator(LookUp(), store(private=True)).table("classification", progress=False):
        assert row.same_modality > LEARNED
        assert row.score < LEARNED


def test_chance_is_that_of_the_metric(learnable_rows: list[Row]) -> None:
    test = store().split("test")
    for row in learnable_rows:
        if row.task == "classification":
            assert row.chance == 1 / CLASSES
        else:
            assert row.chance == metrics.constant_f1(test.labels[row.target].reshape(-1, CLASSES + 1)[:, :-1])


def test_the_scale_of_the_codebook_does_not_matter() -> None:
    for scale in (1e-3, 1e3):
        assert Evaluator(LookUp(scale), store()).score("classification", "audio", "video") > LEARNED


def test_a_single_row_repeats_the_row_of_the_table(learnable_rows: list[Row]) -> None:
    for row in (learnable_rows[4], learnable_rows[-1]):
        assert Evaluator(LookUp(), store(), 3).row(row.task, row.source, row.target) == row


def test_rows_do_not_depend_on_earlier_rows(chance_rows: list[Row]) -> None:
    backwards = Evaluator(LookUp(), store(learnable=False), 1)
    for row in reversed(chance_rows):
        assert backwards.row(row.task, row.source, row.target) == row


def test_the_seed_matters(chance_rows: list[Row]) -> None:
    row, other = chance_rows[0], Evaluator(LookUp(), store(learnable=False), 2)
    assert other.score(row.task, row.source, row.target) != row.score


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_nothing_around_the_probes_changes(protocol: str) -> None:
    """Mode, buffers, global random numbers and number of threads, although dropout counts calls and draws."""
    model = LookUp()
    model.train()
    model.inner.eval()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    Evaluator(model, store()).row("localisation", "audio", "video", protocol)
    tasks.validate(model, store())
    assert model.training and not model.inner.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.get_num_threads() == before[2]


def test_the_old_name_of_a_protocol_is_accepted() -> None:
    """Rows of older versions have it."""
    evaluator = Evaluator(LookUp(), store(learnable=False), 1)
    row = evaluator.row("classification", "audio", "video")
    assert row == evaluator.row("classification", "audio", "video", "sound")
    assert row.score == evaluator.score("classification", "audio", "video", "sound")
    assert row == Row.from_dict({**row.as_dict(), "protocol": "sound"}) and row.protocol == "held_out"
    assert tasks.explain("retrieval", "sound") == tasks.explain("retrieval", "held_out")
    with pytest.raises(ValueError, match="protocol must be one of held_out, official, got 'other'"):
        Row.from_dict({**row.as_dict(), "protocol": "other"})


@pytest.mark.parametrize("filler", [0, 24])
def test_padding_changes_nothing(filler: int, chance_rows: list[Row]) -> None:
    """Codes without meaning, so that the scores depend on every decision of the probes."""
    data = store(learnable=False)
    evaluator = Evaluator(LookUp(), dataset({split: padded(data.split(split), 3, filler) for split in COUNTS}), 1)
    assert evaluator.row("localisation", "audio", "video") == chance_rows[-2]
    assert evaluator.score("classification", "audio", "video") == chance_rows[0].score


def test_official_padding_changes_nothing() -> None:
    model, split = LookUp(noise=0.0), clips(100, 0, learnable=False)
    kind = runner.probe_task("localisation", "official")

    def scores(given: ClipSet) -> dict[str, float]:
        return official_scores(kind, model, given, "audio", ["audio", "video"], seed=0)

    assert scores(padded(split, 3, 0)) == scores(split)


def test_the_target_modality_does_not_enter_the_choice_of_the_epoch() -> None:
    """Neither its features nor its labels are read outside the test split."""

    def read(numbers: np.ndarray) -> np.ndarray:
        raise AssertionError

    data = store()
    for split in ("train", "val"):
        arrays = data.split(split).arrays
        for key in ("video", "video.label", "text"):
            arrays[key] = LazyArray(arrays[key].shape, arrays[key].dtype, read)  # type: ignore[index]
    evaluator = Evaluator(LookUp(), data)
    for task in tasks.DEFAULT_TASKS:
        assert evaluator.score(task, "audio", "video") > LEARNED


def test_the_epoch_with_the_best_validation_score_is_kept() -> None:
    """Scores are scripted: the second of four epochs is best, and equal scores are decided by the loss."""
    split = clips(60, 0)
    codes = encode_split(LookUp(), split, "audio")

    class Scripted(type(runner.probe_task("classification"))):  # type: ignore[misc]
        def __init__(self, scores: list[float]) -> None:
            self.scores: Iterator[float] = iter(scores)

        def score(self, logits: Tensor, truth: Tensor, mask: Tensor) -> float:
            return next(self.scores)

    def trained(scores: list[float], epochs: int, validated: bool) -> ProbeHead:
        kind = Scripted(scores)
        examples = Examples(codes, kind.truth(split, "audio"))
        rule = ProbeRule(epochs, batch_size=20, learning_rate=1e-3)
        generator = torch.Generator().manual_seed(0)
        return train_probe(kind, CLASSES, examples, examples if validated else None, generator, rule)

    def weights(head: ProbeHead) -> list[list[float]]:
        return [parameter.flatten().tolist() for parameter in head.parameters()]

    assert weights(trained([0.1, 0.9, 0.2, 0.3], 4, True)) == weights(trained([], 2, False))
    assert weights(trained([0.5] * 4, 4, True)) == weights(trained([], 4, False))


def test_codewords_of_encode_split_do_not_depend_on_the_batch() -> None:
    model, split = LookUp(), clips(50, 0)
    model.train()
    for name in NAMES:
        codes, second = (encode_split(model, split, name, batch_size) for batch_size in (7, 50))
        assert len(codes) == 50
        assert torch.equal(codes.index, torch.from_numpy(split.features[name][..., 0]).long())
        assert torch.equal(codes.vector, model.codebook[codes.index])
        assert torch.equal(codes.index, second.index) and torch.equal(codes.table, second.table)
        assert codes.mask.all()
    chosen = encode_split(model, split, "text", numbers=np.array([3, 8]))
    assert torch.equal(chosen.vector, encode_split(model, split, "text").vector[[3, 8]])


def test_the_head_on_the_table_equals_the_head_on_every_position() -> None:
    """One projection per codeword in place of one per position, with padding that repeats a valid code."""
    split = padded(clips(30, 0), 2, 0)
    split.arrays["audio.length"][::2] = 3  # type: ignore[index]
    codes = encode_split(LookUp(), split, "audio")
    head = ProbeHead(WIDTH, CLASSES, torch.Generator().manual_seed(0), torch.float32)
    head.standardise(codes)
    hidden = head.project((LookUp().codebook[codes.index] - head.center) / head.scale)
    by_clip = head.classify(hidden.masked_fill(~codes.mask[..., None], -math.inf).amax(1))
    by_step = head.classify(hidden)
    close = {"rtol": LAYER.relative, "atol": LAYER.absolute}
    torch.testing.assert_close(head.of_clips(codes), by_clip, **close)
    torch.testing.assert_close(head.of_positions(codes)[codes.mask], by_step[codes.mask], **close)
    parameters = list(head.parameters())
    expected = torch.autograd.grad(by_clip.square().sum(), parameters)
    found = torch.autograd.grad(head.of_clips(codes).square().sum(), parameters)
    torch.testing.assert_close(found, expected, **close)


def test_standardised_codewords_have_mean_zero_and_spread_one() -> None:
    codes = encode_split(LookUp(300.0), clips(30, 0), "audio")
    head = ProbeHead(WIDTH, CLASSES, torch.Generator(), torch.float32)
    head.standardise(codes)
    vectors = (codes.vector - head.center) / head.scale
    assert vectors.mean((0, 1)).abs().max() < LAYER.absolute
    assert abs(float(vectors.square().mean()) - 1) < LAYER.absolute
    same = EncodedClips(torch.zeros(3, 2, dtype=torch.int64), torch.ones(1, WIDTH), torch.ones(3, 2, dtype=torch.bool))
    head.standardise(same)
    assert float(head.scale) == 1.0


def test_bad_codes_are_refused() -> None:
    model, split = LookUp(), clips(8, 0)
    with pytest.raises(ValueError, match="clips must be at least one, got none"):
        encode_split(model, split, "audio", numbers=np.array([], int))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode_split(model, split, "audio", 0)
    split.arrays["audio.length"] = np.where(np.arange(8) == 5, 0, POSITIONS)  # type: ignore[index]
    with pytest.raises(
        ValueError, match="mask of 'audio' must mark at least one position of each clip, got none in clip 5"
    ):
        encode_split(model, split, "audio", 3)

    class Ambiguous(LookUp):
        def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
            index, vector = super().encode(name, features, mask)
            self.calls += 1
            return Encoded(index, vector + torch.arange(len(vector)).view(-1, 1, 1) + self.calls)

    for batch_size in (1, 8):
        with pytest.raises(ValueError, match="vector of 'video' must be equal at equal index"):
            encode_split(Ambiguous(), clips(8, 0), "video", batch_size)


def test_bad_requests_are_refused() -> None:
    model, data = LookUp(), store()
    for arguments, message in (
        (("walking", "audio", "video"), "tasks must be among classification, localisation, .*, got 'walking'"),
        (("classification", "smell", "video"), "source must be one of audio, video, text, got 'smell'"),
        (("classification", "audio", "smell"), "target must be one of audio, video, text, got 'smell'"),
        (("classification", "audio", "audio"), "target must be another modality than source, got 'audio' for both"),
        (
            ("localisation", "audio", "text"),
            r"target of localisation must have labels at each position \(in the data: audio, video\), got",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(model, data).row(*arguments)
    with pytest.raises(ValueError, match="protocol must be one of held_out, official, got 'kind'"):
        Evaluator(model, data).row("classification", "audio", "video", "kind")
    with pytest.raises(ValueError, match="tasks must be among"):
        tasks.check_tasks("")
    assert tasks.check_tasks("localisation, classification,localisation") == ["localisation", "classification"]


def test_a_task_without_labels_has_no_rows() -> None:
    data = store()
    for split in data.splits:
        del data.split(split).arrays["video.label"]  # type: ignore[attr-defined]
    assert Evaluator(LookUp(), data).table("localisation", progress=False) == []


def test_quick_accuracy_by_direction() -> None:
    model = LookUp()
    whole = tasks.validate(model, store(), seed=1)
    quick = {name: value for name, value in whole.items() if name not in ("token", "sharing")}
    directions = [f"{source}->{target}" for source, target in itertools.permutations(NAMES, 2)]
    assert list(quick) == ["mean", *directions]
    assert quick["mean"] == np.mean([quick[direction] for direction in directions])
    assert min(quick.values()) > LEARNED
    assert whole == tasks.validate(model, store(), seed=1)
    without_test = dataset({split: store().split(split) for split in ("train", "val")})
    assert tasks.validate(model, without_test, seed=1) == whole


def test_rows_before_a_failure_are_given_and_no_bar_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open bar would be drawn once more after the error."""
    found: list[Row] = []
    monkeypatch.setattr(runner.Localisation, "score", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as failed:
        found.extend(Evaluator(LookUp(), store()).rows("classification,localisation"))
    assert [row.task for row in found] == ["classification"] * 6
    assert failed.tb and not list(tqdm._instances)


def test_official_rows_are_labelled_and_repeat() -> None:
    model, data = LookUp(), store()
    evaluator = Evaluator(model, data)
    rows = evaluator.table("localisation", protocol="official", progress=False)
    rows.append(evaluator.row("classification", "text", "video", "official"))
    assert {row.protocol for row in rows} == {"official"}
    last = rows[1]
    assert Evaluator(model, data).row(last.task, last.source, last.target, "official") == last
    for row in rows:
        assert row.as_dict()["protocol"] == "official"
        assert 0 <= row.score <= 1
    train = data.split("train")
    assert last.chance == metrics.official_constant_precision(train.labels["audio"], train.mask["audio"], 80)


def test_few_clips_have_several_passes_an_epoch() -> None:
    rule = ProbeRule(epochs=15, batch_size=200, learning_rate=1.0, least_steps=300)
    assert [rule.passes(clips) for clips in (1, 200, 201, 3801, 100_000)] == [20, 20, 10, 1, 1]


def test_official_rules() -> None:
    for task, epochs in (("classification", 30), ("localisation", 50)):
        rule = runner.probe_task(task, "official").rule
        assert rule == ProbeRule(epochs, 80, 4e-4, halve_at=(10, 20, 30), clip_norm=0.5)


@pytest.mark.parametrize("task", tasks.DEFAULT_TASKS)
def test_official_training_is_the_released_loop(task: str) -> None:
    """Against plain torch: dense layers on every position, MultiStepLR, clipping of the probe, best test epoch."""
    model, split = LookUp(noise=0.0), clips(400, 1)
    kind = runner.probe_task(task, "official")
    codes = ["audio", "video"]
    found = official_scores(kind, model, split, "audio", codes, seed=4)

    columns = kind.columns(split)
    generator = torch.Generator().manual_seed(probe_seed(4, "official", task, "audio"))
    head = ProbeHead(WIDTH, columns, generator, torch.float64)
    alpha = [nn.Parameter(0.1 * torch.ones(1, dtype=torch.float64)) for _ in range(columns)]
    layers = nn.ModuleList([head.project, head.classify])
    optimizer = torch.optim.Adam([*layers.parameters(), *(alpha if task == "localisation" else [])], lr=4e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20, 30], 0.5)
    table = model.codebook.double()

    def logits(name: str, numbers: Tensor) -> Tensor:
        hidden = head.project(table[torch.from_numpy(split.features[name][..., 0]).long()[numbers]])
        return head.classify(hidden.max(1).values if task == "classification" else hidden)

    best = dict.fromkeys(codes, 0.0)
    for _ in range(kind.rule.epochs):
        for numbers in torch.randperm(400, generator=generator).split(80):
            output = logits("audio", numbers)
            if task == "classification":
                loss = nn.functional.cross_entropy(output, torch.from_numpy(split.target)[numbers])
            else:
                label = torch.from_numpy(split.labels["audio"])[numbers].double().flatten(0, 1)
                flat = output.flatten(0, 1)
                weighted = label * flat.log_softmax(1) * torch.exp(-torch.cat(alpha))
                loss = nn.functional.binary_cross_entropy_with_logits(flat, label) - weighted.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(layers.parameters(), 0.5)
            optimizer.step()
        scheduler.step()
        for name in codes:
            with torch.no_grad():
                output = logits(name, torch.arange(400))
            if task == "classification":
                score = float((output.argmax(1).numpy() == split.target).mean())
            else:
                truth = split.labels[name]
                score = metrics.official_scores((output.sigmoid() > 0.5).numpy(), truth, split.mask[name], 80).precision
            best[name] = max(best[name], score)
    assert found == best
    assert min(best.values()) > 1.5 / columns


def test_official_codes_are_noisy_and_new_in_every_epoch() -> None:
    """Every epoch has other codes, and more codes than without dropout."""
    indices: list[Tensor] = []

    class Watched(LookUp):
        def encode(self, name: str, features: Tensor, mask: Tensor | None = None, *, dropout: bool = False) -> Encoded:
            result = super().encode(name, features, mask, dropout=dropout)
            if dropout:
                indices.append(result.index)
            return result

    split = clips(40, 0)
    kind = runner.probe_task("classification", "official")
    model = Watched()
    official_scores(kind, model, split, "audio", ["audio"], seed=0)
    assert len(indices) == kind.rule.epochs
    assert len({tuple(index.sum(1).sort().values.tolist()) for index in indices}) == len(indices)


def rule_words(task: str, protocol: str) -> list[str]:
    """Words with the numbers of the rules in code, which a page must have."""

    def rate(rule: Any, unit: str = "clips") -> str:
        return f"batches of {rule.batch_size} {unit}, learning rate {rule.learning_rate:g}"

    held_out = protocol == "held_out"
    words = [f"intervals from {RESAMPLES} draws of "] if held_out else []
    if task == "retrieval":
        rule = RetrievalRule()
        trained = f"Adam, {rule.steps} steps, {rate(rule, 'pairs')}, temperature {rule.temperature:g}."
        return [*words, trained, f"R@{DEPTH} of target", f"Chance: {DEPTH} / test clips"]
    if task == "segmentation":
        light, large = LIGHT_SETTINGS, TIMM_SETTINGS
        words += [f"beta squared is {BETA_SQUARED:g}.", f"at {THRESHOLDS} thresholds"]
        trained = [f"{light.steps} steps, {rate(light)}", f"{large.epochs} epochs, {rate(large)}", f"of {JUDGED} in"]
        official = [f"learning rate {OFFICIAL_RATE:g}, batches of {OFFICIAL_BATCH} clips"]
        return words + (trained if held_out else official)
    rule = runner.probe_task(task, protocol).rule
    halved = f"halved at epochs {', '.join(map(str, rule.halve_at))}."
    official = [halved, f"clipped at {rule.clip_norm}.", f"All {rule.epochs} epochs"]
    more = [f"for {rule.least_steps} steps", "validation split"] if held_out else official
    return [*words, f"Adam, {rule.epochs} epochs, {rate(rule)}", *more]


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
@pytest.mark.parametrize("task", tasks.TASKS)
def test_pages_have_the_numbers_of_the_rules(task: str, protocol: str) -> None:
    text = " ".join(tasks.explain(task, protocol).split())
    for words in rule_words(task, protocol):
        assert words in text
    with pytest.raises(ValueError, match="protocol must be one of"):
        tasks.explain(task, "other")


def test_the_documentation_has_the_pages_of_all_tasks() -> None:
    package = Path(tasks.__file__).parent
    assert {page.stem for page in (package / "protocols").iterdir()} == set(tasks.TASKS)
    page = (package.parent.parent / "docs" / "protocols.md").read_text()
    assert re.findall(r'^--8<-- "unicode_fast/tasks/protocols/(.*)\.md"$', page, re.MULTILINE) == list(tasks.TASKS)


def test_rows_become_plain_values_and_back() -> None:
    row = Row("classification", "audio", "video", 0.75, 0.9, 0.1)
    assert row.as_dict() == {
        "task": "classification",
        "from": "audio",
        "to": "video",
        "score": 0.75,
        "same_modality": 0.9,
        "chance": 0.1,
    }
    for one in (row, dataclasses.replace(row, std=0.01, protocol="official")):
        assert Row.from_dict(one.as_dict()) == one
    with pytest.raises(ValueError, match="a row must have the keys of Row.as_dict"):
        Row.from_dict({**row.as_dict(), "colour": 1})
    for ends in ([0.5], [0.5, None], ["0.5", 0.6]):
        with pytest.raises(ValueError, match="a row must have values of the types of Row.as_dict"):
            Row.from_dict({**row.as_dict(), "same_interval": ends})
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.score = 1.0  # type: ignore[misc]


def test_aggregate_by_hand() -> None:
    rows = [
        [Row("localisation", "audio", "video", score, 0.8, 0.1), Row("localisation", "video", "audio", 0.5, score, 0.2)]
        for score in (0.25, 0.5, 0.75)
    ]
    mean = tasks.aggregate([rows[0], rows[1][::-1], rows[2]])
    assert [row.direction for row in mean] == ["audio->video", "video->audio"]
    assert (mean[0].score, mean[0].std) == (0.5, 0.25)
    assert (mean[1].same_modality, mean[1].std) == (0.5, 0.0)
    assert tasks.aggregate(rows[:1]) == rows[0]
    with pytest.raises(ValueError, match="rows_of_seeds must hold at least one seed, got none"):
        tasks.aggregate([])
    with pytest.raises(ValueError, match="must hold the same directions once for every seed, number 1 differs"):
        tasks.aggregate([rows[0], rows[1][:1]])


def test_tables_as_text_and_markdown() -> None:
    rows = [
        Row("classification", "audio", "video", 0.875, 0.9, 0.1, std=0.0123),
        Row("localisation", "video", "audio", 0.0, 0.0, 0.117, protocol="official"),
    ]
    assert tasks.format_table(rows).splitlines() == [
        "task                     direction          zero-shot  same modality  chance  ratio",
        "-----------------------  --------------  ------------  -------------  ------  -----",
        "classification           audio -> video  87.5 ± 1.2 %         90.0 %  10.0 %   0.97",
        "localisation (official)  video -> audio         0.0 %          0.0 %  11.7 %      -",
    ]
    assert tasks.format_markdown(rows).splitlines()[2] == (
        "| classification | audio → video | 87.5 ± 1.2 % | 90.0 % | 10.0 % | 0.97 |"
    )


def test_the_legend_of_a_table_defines_intervals_and_spreads() -> None:
    row = Row("classification", "audio", "video", 0.875, 0.9, 0.1, interval=(0.85, 0.9), clips=400)
    table = tasks.format_table([row]).splitlines()
    assert "  zero-shot (95 % interval)  " in table[0] and "  87.5 (85.0-90.0) %  " in table[2]
    assert tasks.format_legend([row]) == (
        "zero-shot, in brackets: 95 % bootstrap interval over 400 test clips, the model fixed"
    )
    mean = tasks.aggregate([[row], [dataclasses.replace(row, score=0.675)], [row]])
    assert mean[0].seeds == 3 and mean[0].interval is None and Row.from_dict(mean[0].as_dict()) == mean[0]
    assert tasks.format_legend(mean) == "zero-shot: mean ± sample standard deviation over 3 seeds"
    more = dataclasses.replace(row, clips=300)
    assert "over 300 to 400 test clips" in tasks.format_legend([row, more])
    assert "over 1 test clip," in tasks.format_legend([dataclasses.replace(row, clips=1)])
    assert "over test clips" in tasks.format_legend([row, dataclasses.replace(row, clips=None)])
    assert tasks.format_legend([dataclasses.replace(row, interval=None)]) == ""


def test_no_ratio_where_the_same_modality_is_at_chance() -> None:
    good = Row("classification", "audio", "video", 0.3, 0.11, 0.1)
    assert good.ratio == pytest.approx(0.3 / 0.11)
    for bad in (
        dataclasses.replace(good, same_modality=0.1),
        dataclasses.replace(good, same_modality=0.02),
        dataclasses.replace(good, at_chance=True, same_interval=(0.09, 0.13)),
    ):
        assert math.isnan(bad.ratio) and tasks.format_table([bad]).splitlines()[2].endswith(" -")
        assert "ratio -: the same-modality score is not above chance" in tasks.format_legend([bad])
        assert Row.from_dict(bad.as_dict()) == bad
    one = dataclasses.replace(good, at_chance=True)
    assert [mean.at_chance for mean in (tasks.aggregate([[one], [one]])[0], tasks.aggregate([[one], [good]])[0])] == [
        True,
        False,
    ]
    assert [tasks.Estimate(*values).reaches(0.1) for values in ((0.2,), (0.1,), (0.2, 0.1, 0.3), (0.2, 0.11, 0.3))] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_a_real_model_and_store(tmp_path: Path, protocol: str) -> None:
    model = tiny.model(names="audio,video")
    data = open_store(tiny.write(tmp_path / "store"))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = Evaluator(model, data, 1).table(protocol=protocol, progress=False)
    assert len(rows) == 2 + 2
    assert all(0 <= row.score <= 1 for row in rows)
    assert rows[0] == Evaluator(model, data, 1).row("classification", "audio", "video", protocol)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_is_encoded_without_dropout_by_default() -> None:
    model, split = LookUp(noise=1.0).train(), clips(20, 0)
    clean, noisy = (encode_batch(model, split, "audio", np.arange(20), dropout=dropout) for dropout in (False, True))
    assert torch.equal(clean.index, encode_batch(model.eval(), split, "audio", np.arange(20)).index)
    assert not torch.equal(clean.index, noisy.index)


def test_one_thread_ends_with_an_error_too() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
