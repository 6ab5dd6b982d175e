"""Clips that lack a modality: losses and updates of the clips that have it, whatever stands in the place of others."""

import math
from itertools import combinations
from pathlib import Path

import pytest
import tiny
import torch
from compare import assert_close
from test_distributed import State, compare
from test_every_method import Reads
from tolerances import EXACT, NAIVE_GRADIENT, NAIVE_LOSS, SHARED_BATCH
from torch import Tensor
from torch.nn.functional import softmax

from unicode_fast import checkpoint
from unicode_fast.methods import METHODS, Draws, recipe_of
from unicode_fast.methods.registry import needs_every_modality
from unicode_fast.modules import ModelOutput, UniCode, host
from unicode_fast.modules.absent import mean_over, with_a_position
from unicode_fast.modules.lexicon import SCALE
from unicode_fast.modules.model import as_read
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.step import backward, micro_batches
from unicode_fast.training.trainer import Trainer

NAMES = ("audio", "video", "text")
# Positions of each clip by modality: without audio, video or text, with two or one of them, or with all.
LENGTHS = {
    "audio": [5, 0, 4, 5, 0, 0, 3, 5],
    "video": [5, 4, 0, 5, 5, 0, 5, 2],
    "text": [3, 5, 4, 0, 0, 2, 5, 1],
}
FORMS = {
    "recommended": ("recommended", {"presence_weight": 0.3, "commitment_partners": "all"}),
    "recommended, official terms": (
        "recommended",
        {"club_estimator": "official", "code_matching_pairing": "official", "cpc_steps": 2},
    ),
    "paper": ("paper", {"club_floor": False, "cpc_self_weight": 0.2}),
}
each_form = pytest.mark.parametrize("form", FORMS)
POSITION = 0.6


def trainer_of(form: str, **fields: object) -> Trainer:
    preset, given = FORMS[form]
    usual = {"dropout": 0.0, "dtype": "float64", "reset_after": 1, "seed": 7, "batch_size": 8, "steps": 4}
    trainer = tiny.trainer(preset, **{**usual, **given, **fields})
    generator = torch.Generator().manual_seed(5)
    # New codewords are alike.
    rows = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    trainer.model.codebook.initialise(rows.to(trainer.model.device))
    return trainer


def batch_of(model: UniCode, step: int = 0, text: int = 5, gone: str = "") -> tuple[State, State]:
    """Features and masks of a batch, in another order of clips in each step; no clip has the modality `gone`."""
    features = tiny.batch(model, 8, lengths={"text": text}, seed=step)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(step)) if step else torch.arange(8)
    lengths = {name: torch.tensor(LENGTHS[name])[order].clamp(max=features[name].shape[1]) for name in NAMES}
    return features, {
        name: tiny.mask_of((0 * length if name == gone else length).tolist(), features[name].shape[1])
        for name, length in lengths.items()
    }


def output_of(trainer: Trainer, text: int = 5) -> ModelOutput:
    trainer.model.train()
    return trainer.model(*batch_of(trainer.model, text=text))


def ground(trainer: Trainer, output: ModelOutput) -> None:
    """A lexicon that predicts the codewords of some words better than their average; a new one grounds none."""
    generator = torch.Generator().manual_seed(5)
    for lexicon in trainer.model.lexicon.values():
        average = torch.stack(list(Naive(trainer, output).used_beside_words().values())).mean(0)
        lexicon.bias.data = average.log() / SCALE
        lexicon.weight.data = 0.005 * torch.randn(lexicon.weight.shape, generator=generator, dtype=torch.float64)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def sinkhorn(rows: Tensor, weights: Tensor, totals: Tensor) -> Tensor:
    logits = 2 * rows
    for _ in range(3):
        logits = logits + totals.log() - (logits + weights.log()[:, None]).logsumexp(0)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return softmax(logits, 1)


class Naive:
    """The losses as loops over the clips and the modalities that they have; a vector is a row of a list."""

    def __init__(self, trainer: Trainer, output: ModelOutput) -> None:
        self.model, self.output, self.method = trainer.model, output, trainer.config.method
        self.codebook = self.model.codebook.codebook
        assert output.mask is not None
        self.length = {name: output.mask[name].sum(1).tolist() for name in NAMES}
        self.clips = range(8)

    def z(self, name: str, clip: int) -> Tensor:
        """(valid positions, D)."""
        return self.output.semantic[name][clip, : self.length[name][clip]]

    def with_all(self, *names: str) -> list[int]:
        return [clip for clip in self.clips if all(self.length[name][clip] for name in names)]

    def same_positions(self) -> bool:
        return len({self.output.semantic[name].shape[1] for name in NAMES}) == 1

    def terms(self) -> dict[str, Tensor]:
        found = {}
        for name in NAMES:
            found[f"reconstruction.{name}"] = self.reconstruction(name)
            found[f"commitment.{name}"] = self.commitment(name)
            found[f"club.{name}"] = self.club(name)
        if self.method.assignment_weight:
            found |= self.assignment()
        if self.method.presence_weight:
            found["presence.text"] = self.method.presence_weight * sum(
                self.presence({clip: self.used(other, clip) for clip in self.with_all("text", other)}, "text")
                for other in ("audio", "video")
            )
        if self.method.grounding_weight:
            found |= self.grounding()
        for pair in combinations(NAMES, 2):
            found["code_matching." + "-".join(pair)] = self.code_matching(*pair)
        return {**found, "cpc": self.cpc()}

    def reconstruction(self, name: str) -> Tensor:
        target, decoded = self.output.target[name], self.output.decoded[name]
        errors = [
            (decoded[clip, t] - target[clip, t]).square().mean()
            for clip in self.clips
            for t in range(self.length[name][clip])
        ]
        return self.method.reconstruction_weight * mean(errors)

    def commitment(self, name: str) -> Tensor:
        method, total = self.method, torch.zeros((), dtype=torch.float64)
        timed = method.commitment_partners == "timed"
        others = [other for other in NAMES if other != name and not (timed and "text" in (name, other))]
        for other in (name, *others):
            errors = []
            for clip in self.with_all(name, other):
                codewords = self.codebook[self.output.index[other][clip, : self.length[other][clip]]]
                for t in range(self.length[name][clip]):
                    if other == name or self.same_positions():
                        targets = codewords[t : t + 1]
                    else:
                        targets = codewords.mean(0, keepdim=True)
                    errors += [(self.z(name, clip)[t] - one).square().mean() for one in targets]
            share = method.commitment_own if other == name else method.commitment_partner / len(others)
            total = total + method.commitment_weight * share * mean(errors)
        return total

    def club(self, name: str) -> Tensor:
        method, network, specific = self.method, self.model.club[name], self.output.club[name]
        there, found = self.with_all(name), []

        def likelihood(clip: int, other: int, t: int) -> Tensor:
            centre, log_variance = network(self.z(name, clip)[t])
            return -(specific[other, t] - centre).square() * torch.exp(-log_variance) / 2

        if method.club_estimator == "official":
            return method.club_weight * self.club_official(name)
        for t in range(specific.shape[1]):
            clips = [clip for clip in there if self.length[name][clip] > t]
            for clip in clips:
                others = torch.stack([likelihood(clip, other, t) for other in clips]).mean(0)
                found.append((likelihood(clip, clip, t) - others).mean())
        return method.club_weight * (mean(found).clamp(min=0) if method.club_floor else mean(found))

    def club_official(self, name: str) -> Tensor:
        network, specific, found = self.model.club[name], self.output.club[name], []
        for clip, other in zip(self.clips, ORDER, strict=True):
            own, both = self.length[name][clip], min(self.length[name][clip], self.length[name][other])
            if both:
                centre, log_variance = network(self.z(name, clip))
                spread = torch.exp(log_variance.mean(0))
                gaps = (centre[:both] - specific[other, :both]).square().mean(0) / spread
                found.append((gaps - (centre - specific[clip, :own]).square().mean(0) / spread).sum())
        estimate = mean(found) / 2 / specific.shape[-1]
        return estimate.clamp(min=0) if self.method.club_floor else estimate

    def scores(self, name: str, clip: int) -> Tensor:
        distance = (self.z(name, clip)[:, None] - self.codebook).square().mean(-1)
        return -distance / 0.05

    def used(self, name: str, clip: int) -> Tensor:
        return self.scores(name, clip).softmax(-1).mean(0).detach()

    def used_beside_words(self) -> dict[int, Tensor]:
        """Codewords of the other modalities of the clips that have words and another modality."""
        found = {}
        for clip in self.with_all("text"):
            there = [self.used(name, clip) for name in ("audio", "video") if self.length[name][clip]]
            found |= {clip: torch.stack(there).mean(0)} if there else {}
        return found

    def assignment(self) -> dict[str, Tensor]:
        rows, places = [], []
        for clip in self.clips:
            there = [name for name in ("audio", "video") if self.length[name][clip]]
            for t in range(min((self.length[name][clip] for name in there), default=0)):
                rows.append(torch.stack([self.scores(name, clip)[t] for name in there]).mean(0).detach())
                places.append((clip, t, there))
        target = sinkhorn(torch.stack(rows), torch.ones(len(rows)).double(), torch.ones(len(self.codebook)).double())
        return {
            f"assignment.{name}": self.method.assignment_weight
            * mean(
                [
                    -(aim * self.scores(name, clip)[t].log_softmax(-1)).sum()
                    for aim, (clip, t, there) in zip(target, places, strict=True)
                    if name in there
                ]
            )
            for name in ("audio", "video")
        }

    def presence(self, used: dict[int, Tensor], name: str) -> Tensor:
        found = []
        for clip, aim in used.items():
            share = self.scores(name, clip).softmax(-1).clamp(max=1 - 1e-4)
            held = 1 - (1 - share).prod(0)
            found.append(-(aim * (held + 1e-6).log()).sum())
        return mean(found)

    def grounding(self) -> dict[str, Tensor]:
        used = self.used_beside_words()
        clips = list(used)
        average = torch.stack(list(used.values())).mean(0)
        words, surprises = [], []
        for clip in clips:
            for t in range(self.length["text"][clip]):
                expected = self.model.lexicon["text"](self.output.words["text"][clip, t])
                surprise = -(used[clip] * expected).sum()
                lead = -(used[clip] * (average + 1e-6).log()).sum() - surprise
                weight = (1 - torch.exp(-2 * lead.clamp(min=0))).detach()
                meaning = (used[clip].clamp(min=1e-9).log() + expected).softmax(-1).detach()
                surprises.append(surprise)
                words.append((clip, t, weight, meaning))
        weights = torch.stack([weight for _, _, weight, _ in words])
        assert (weights > 0).any() and (weights == 0).any()
        meanings = torch.stack([meaning for *_, meaning in words])
        totals = (weights[:, None] * meanings).sum(0).clamp(min=1e-6)
        scores = torch.stack([self.scores("text", clip)[t] for clip, t, _, _ in words])
        target = sinkhorn((meanings + 1e-6).log() + scores.detach(), weights, totals)
        errors = weights * -(target * scores.log_softmax(-1)).sum(-1)
        held, means = torch.zeros((), dtype=torch.float64), {}
        for clip in clips:
            own = torch.tensor([clip == other for other, *_ in words])
            counted = (weights[own, None] * scores[own].softmax(-1)).sum(0).detach()
            means[clip] = counted / weights[own].sum().clamp(min=1e-3)
        for other in ("audio", "video"):
            held = held + self.presence({clip: means[clip] for clip in self.with_all("text", other)}, other)
        return {
            "lexicon.text": mean(surprises),
            "grounding.text": self.method.grounding_weight * (errors.sum() / len(clips) + held),
        }

    def code_matching(self, one: str, other: str) -> Tensor:
        clips, shares = self.with_all(one, other), {}
        for name in (one, other):
            for clip in clips:
                distances = torch.cdist(self.z(name, clip), self.codebook)
                shares[name, clip] = softmax(-distances, -1).mean(0)
        scores = torch.zeros(len(clips), len(clips), dtype=torch.float64)
        official = self.method.code_matching_pairing == "official"
        for row, i in enumerate(clips):
            for column, j in enumerate(clips):
                second = shares[other, i], shares[one, j] if official else None
                score = (shares[one, i] * (shares[other, j] + 1e-10).log()).sum()
                if second[1] is None:
                    score = score + (shares[other, j] * (shares[one, i] + 1e-10).log()).sum()
                else:
                    score = score + (second[0] * (second[1] + 1e-10).log()).sum()
                scores[row, column] = score
        offset = 1e-5 if official else 0.0
        lowest = scores.min() if official else 0.0
        exponentials = (scores - lowest).exp()
        along, across = (
            ((exponentials.sum(axis) + offset).log() - (scores - lowest).diagonal()).mean() for axis in (1, 0)
        )
        both = self.method.code_matching_directions == "both"
        return self.method.code_matching_weight * ((along + across) / 2 if both else along)

    def vectors(self) -> tuple[list[dict[tuple[str, int], Tensor]], list[dict[tuple[str, int], Tensor]]]:
        """Targets and predictions of each prediction step, by modality and clip."""
        cpc = self.model.cpc
        common = [
            min(lengths)
            for clip in self.clips
            if len(lengths := [self.length[name][clip] for name in NAMES if self.length[name][clip]]) > 1
        ]
        if not self.same_positions() or max(common) < cpc.earliest + 1 + cpc.steps:
            means = {(name, clip): self.z(name, clip).mean(0) for name in NAMES for clip in self.with_all(name)}
            return [means], [{key: cpc.predictors[key[0]][0](value) for key, value in means.items()}]
        last = cpc.earliest + int(POSITION * (max(common) - cpc.steps - cpc.earliest))
        targets, predictions = [], []
        for step in range(cpc.steps):
            place = last + 1 + step
            there = [(name, clip) for name in NAMES for clip in self.clips if self.length[name][clip] > place]
            targets.append({key: self.z(*key)[place] for key in there})
            predictions.append(
                {
                    key: cpc.predictors[key[0]][step](cpc.context[key[0]](self.z(*key)[None, : last + 1])[0][0, last])
                    for key in there
                }
            )
        return targets, predictions

    def cpc(self) -> Tensor:
        method, total = self.method, torch.zeros((), dtype=torch.float64)
        directions = {"both": (0, 1), "predictions": (0,), "candidates": (1,)}[method.cpc_softmax_over]
        steps = list(zip(*self.vectors(), strict=True))
        for one in NAMES:
            for other in NAMES:
                weight = method.cpc_weight * (method.cpc_self_weight if one == other else 1)
                of_steps = []
                for targets, predictions in steps:
                    clips = [clip for clip in self.clips if (one, clip) in targets and (other, clip) in predictions]
                    losses = []
                    for clip in clips:
                        own = targets[one, clip] @ predictions[other, clip]
                        for direction in directions:
                            pool = predictions if direction == 0 else targets
                            name, fixed = (
                                (other, targets[one, clip]) if direction == 0 else (one, predictions[other, clip])
                            )
                            scores = [fixed @ vector for (key, _), vector in pool.items() if key == name]
                            losses.append((torch.stack(scores).logsumexp(0) - own) / len(directions))
                    if losses:
                        of_steps.append(torch.stack(losses).sum() / len(clips))
                total = total + weight * mean(of_steps)
        return total


ORDER = [1, 0, 3, 2, 6, 7, 5, 4]


@each_form
@pytest.mark.parametrize("text", [5, 3])
def test_losses_and_gradients_are_those_of_loops_over_what_is_there(form: str, text: int) -> None:
    trainer = trainer_of(form)
    output = output_of(trainer, text)
    ground(trainer, output)
    draws = Draws(torch.tensor(POSITION, dtype=torch.float64), dict.fromkeys(NAMES, torch.tensor(ORDER)))
    losses, naive = trainer.method.losses(output, draws), Naive(trainer, output).terms()
    assert set(losses.terms) == set(naive)
    for name, term in naive.items():
        assert_close(losses.terms[name], term.detach(), NAIVE_LOSS, name)
        assert term != 0 or (name.startswith("club") and trainer.config.method.club_floor), name
    leaves = [*output.semantic.values(), *output.club.values(), *output.decoded.values()]
    found, expected = (
        torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        for total in (losses.total, torch.stack(list(naive.values())).sum())
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_close(one, other, NAIVE_GRADIENT)
    for name, gradient in zip(NAMES, found, strict=False):
        assert not gradient[torch.tensor(LENGTHS[name]) == 0].any(), name


def partner_of(codebook: torch.nn.Module, naive: Naive, name: str, clip: int, t: int) -> Tensor | None:
    """The mean partner of a row from loops; None without one."""
    found, z = [], naive.z(name, clip)[t]
    for other in (other for other in NAMES if other != name and naive.length[other][clip]):
        rows = naive.z(other, clip)
        if codebook.partner == "attended":
            found.append(softmax(rows @ z / math.sqrt(len(z)), 0) @ rows)
        elif not naive.same_positions():
            found.append(rows.mean(0))
        elif t < len(rows):
            found.append(rows[t])
    return torch.stack(found).mean(0) if found else None


@pytest.mark.parametrize("partner", ["aligned", "attended"])
@pytest.mark.parametrize("text", [5, 3])
def test_the_update_mixes_a_row_with_the_partners_that_are_there(partner: str, text: int) -> None:
    trainer = trainer_of("recommended", ema_partner=partner, reset_after=0, ema_smoothing="none", ema_own_weight=0.3)
    output, codebook = output_of(trainer, text), trainer.model.codebook
    naive = Naive(trainer, output)
    count, total = codebook.ema_count.clone(), codebook.ema_sum.clone()
    count, total = 0.99 * count, 0.99 * total
    for name in NAMES:
        for clip in naive.with_all(name):
            for t, z in enumerate(naive.z(name, clip).detach()):
                other = partner_of(codebook, naive, name, clip, t)
                mixed = z if other is None else 0.3 * z + 0.7 * other.detach()
                code = int(output.index[name][clip, t])
                count[code] += 0.01
                total[code] += 0.01 * mixed
    trainer.model.update_codebook(output)
    assert_close(codebook.ema_count, count, NAIVE_LOSS)
    assert_close(codebook.codebook, total / count[:, None], NAIVE_LOSS)


def test_moments_are_of_the_positions_that_are_there() -> None:
    trainer = trainer_of("recommended")
    output = output_of(trainer)
    features, mask = batch_of(trainer.model)
    for name, moments in output.moments.items():
        z = trainer.model.encode_features(name, features[name], mask[name])[0][mask[name]]
        assert_close(moments.mean, z.mean(0).detach(), NAIVE_LOSS)
        assert_close(moments.variance, z.var(0, correction=0).detach(), NAIVE_LOSS)


def step_of(trainer: Trainer, step: int = 0, fill: float | None = None, **batch: object) -> StepResult:
    features, mask = batch_of(trainer.model, step, **batch)  # type: ignore[arg-type]
    for name, valid in mask.items():
        if fill is not None:
            features[name][~valid] = fill
    return trainer.train_step(features, mask, 1e-2)


@each_form
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fill", [math.nan, 1e30])
def test_what_stands_in_an_absent_place_changes_no_bit(form: str, dtype: str, fill: float) -> None:
    ends = []
    for filled in (0.0, fill):
        trainer = trainer_of(form, dtype=dtype, dropout=0.3, reset_unless="all")
        results = [step_of(trainer, step, filled) for step in range(3)]
        ends.append((trainer.model.state_dict(), results))
    compare(ends[1], ends[0], EXACT)
    assert all(torch.isfinite(value).all() for value in ends[0][0].values())
    assert all(torch.isfinite(term) for result in ends[0][1] for term in result.terms.values())


@each_form
@pytest.mark.parametrize("gone", NAMES)
def test_a_modality_that_no_clip_of_a_batch_has(form: str, gone: str) -> None:
    """Its terms and gradients are 0, and its moments and idle counters stay."""
    trainer = trainer_of(form, reset_after=3)
    model, row = trainer.model, NAMES.index(gone)
    step_of(trainer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = step_of(trainer, 1, gone=gone)
    assert all(torch.isfinite(term) for term in result.terms.values())
    of_it = [name for name in result.terms if gone in name.replace(".", "-").split("-")]
    assert of_it and all(result.terms[name] == 0 for name in of_it)
    for name, parameter in model.named_parameters():
        if gone in name.split("."):
            assert parameter.grad is None or not parameter.grad.any(), name
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    for name in ("mean", "variance") if model.norms else ():
        assert torch.equal(after[f"norms.{gone}.{name}"], before[f"norms.{gone}.{name}"])
    kept = after["codebook.idle"][row] == before["codebook.idle"][row]
    reset = (after["codebook.idle"] == 0).all(0)
    assert (kept | reset).all() and kept.any()
    others = [other for other in range(3) if other != row]
    assert (after["codebook.idle"][others] != before["codebook.idle"][others]).any()


@pytest.mark.parametrize("names", ["audio,video,text", "audio,video"])
def test_no_clip_has_two_modalities(names: str) -> None:
    trainer = trainer_of("recommended") if "text" in names else tiny.trainer(names=names, dtype="float64")
    features = tiny.batch(trainer.model, 4)
    lengths = {"audio": [5, 4, 0, 0], "video": [0, 0, 5, 0], "text": [0, 0, 0, 0]}
    mask = {name: tiny.mask_of(lengths[name], 5) for name in features}
    result = trainer.train_step(features, mask, 1e-2)
    assert all(torch.isfinite(term) for term in result.terms.values())
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert result.terms["reconstruction.audio"] > 0 and result.terms["code_matching.audio-video"] == 0


@pytest.mark.parametrize("longest", [2, 4])
def test_a_clip_with_one_modality_sets_no_position_of_a_context(longest: int) -> None:
    """Cross-CPC needs three positions here: with two it contrasts means."""
    trainer = trainer_of("recommended", cpc_steps=2)
    features = tiny.batch(trainer.model, 8)
    lengths = {"audio": [5, 2, 2, longest], "video": [0, 2, 0, longest], "text": [0, 1, 2, longest]}
    mask = {name: tiny.mask_of(2 * lengths[name], 5) for name in NAMES}
    trainer.model.train()
    output = trainer.model(features, mask)
    terms, _ = trainer.method.contrast(output, Draws(torch.tensor(POSITION, dtype=torch.float64)))
    assert_close(terms["cpc"], Naive(trainer, output).cpc().detach(), NAIVE_LOSS)


def trained(trainer: Trainer, steps: range = range(3)) -> tuple[State, list[StepResult]]:
    results = [step_of(trainer, step, gone="audio" if step == 2 else "") for step in steps]
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}, results


@each_form
def test_micro_batches_are_the_batch(form: str) -> None:
    """With eight of them, micro-batches lack a modality in all their clips."""
    compare(trained(trainer_of(form, micro_batches=8)), trained(trainer_of(form)))


@each_form
def test_a_resumed_run_ends_as_the_whole(form: str, tmp_path: Path) -> None:
    whole, resumed = (trainer_of(form, dtype="float32", dropout=0.3) for _ in range(2))
    trained(whole, steps=range(2))
    checkpoint.save(tmp_path / "model.pt", whole.model, whole.state())
    expected = trained(whole, steps=range(2, 4))
    resumed.restore(checkpoint.read(tmp_path / "model.pt"))
    compare(trained(resumed, steps=range(2, 4)), expected, EXACT)


@each_form
def test_a_step_reads_no_value(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would wait for the device. The step is also the one on a CPU, to rounding."""
    ends: list[tuple[State, list[StepResult]]] = []
    for on_device in (False, True):
        trainer = trainer_of(form)
        with monkeypatch.context() as patch:
            if on_device:
                for name in ("is_on_host", "has_operators"):
                    patch.setattr(host, name, lambda _: False)
                patch.setattr(trainer.club_optimizer, "step", lambda: None)
                features, mask = batch_of(trainer.model)
                with Reads() as reads:
                    output, _ = backward(trainer.method, trainer.club_optimizer, micro_batches(features, mask, 1))
                    trainer.model.update_codebook(output)
                assert reads.number > 100 and reads.found == []
                trainer = trainer_of(form)
                patch.undo()
                for name in ("is_on_host", "has_operators"):
                    patch.setattr(host, name, lambda _: False)
            ends.append(trained(trainer))
    compare(ends[1], ends[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
@each_form
def test_a_graphed_step_on_a_gpu(form: str) -> None:
    ends = []
    for graphed in (False, True):
        trainer = trainer_of(form, device="cuda", cuda_graph=graphed)
        for step in range(4):
            given = batch_of(trainer.model, step, gone="audio" if step == 2 else "")
            batch = [{name: values.cuda() for name, values in tensors.items()} for tensors in given]
            trainer.train_step(*batch, 1e-2)
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        assert_close(ends[1][name].double(), value.double(), SHARED_BATCH, name)


@pytest.mark.parametrize("method", [*METHODS, "official"])
def test_methods_that_need_every_modality_refuse(method: str) -> None:
    preset = {"name": method} if method == "official" else {"method": method}
    trainer = tiny.trainer(**preset, batch_size=8, seed=7, dtype="float64")
    if method != "official" and recipe_of(method).incomplete:
        assert not needs_every_modality(trainer.config)
        result = step_of(trainer)
        assert all(torch.isfinite(term) for term in result.terms.values())
        return
    refused_by = "preset 'official'" if method == "official" else f"method '{method}'"
    message = f"mask must mark at least one position of every modality in every clip for {refused_by}, got none of "
    with pytest.raises(ValueError, match=f"^{message}'audio' in clip 1 of the batch$"):
        step_of(trainer)


def test_an_encoder_reads_a_position() -> None:
    """Without one, attention of torch in evaluation mode is NaN."""
    features, mask = torch.full((3, 3, 6), math.nan), tiny.mask_of([0, 2, 3], 3)
    read, of_encoder = as_read(features, mask)
    assert of_encoder is not None and of_encoder.any(1).all() and not read[0].any()
    assert with_a_position(mask).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert with_a_position(tiny.mask_of([0], 1)).tolist() == [[True]]


def test_mean_over() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, math.nan], [7.0, 5.0]])
    counted = torch.tensor([[True, True], [True, False], [False, False]])
    assert mean_over(values, counted).tolist() == [2.0, 2.0]
    assert mean_over(values[:1], torch.tensor([[False, False]])).tolist() == [0.0, 0.0]
    three = torch.randn(3, 1000)
    assert torch.equal(mean_over(three, torch.ones(3, 1, dtype=torch.bool)), three.mean(0))
