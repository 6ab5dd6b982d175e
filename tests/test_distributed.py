"""Ranks that share a batch train the model of one; they end together, and with less memory the step is the same."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_close
from tolerances import EXACT, SHARED_STEP, Tolerance

from unicode_fast import Config, UniCode, checkpoint
from unicode_fast.distributed import Ranks
from unicode_fast.journal import StepResult
from unicode_fast.train import Trainer, main

NAMES = ("audio", "video", "text")
# Clips of the batches; with three ranks neither is shared evenly.
BATCHES = (8, 8, 5)
# By preset: are there masks, and steps of modalities that differ from the others.
CASES: dict[str, tuple[str, bool, dict[str, int]]] = {
    "recommended": ("recommended", False, {}),
    "recommended, masks": ("recommended", True, {}),
    "recommended, unequal lengths": ("recommended", False, {"text": 3}),
    "official": ("official", False, {}),
    "official, masks": ("official", True, {}),
    "paper": ("paper", False, {}),
    "paper, masks": ("paper", True, {}),
}
State = dict[str, torch.Tensor]


def config_of(preset: str, **fields: object) -> Config:
    return tiny.config(preset, **{"dropout": 0.0, "dtype": "float64", "revive_after": 1, **fields})


def batch_of(owner: UniCode, case: str, step: int) -> tuple[State, State | None]:
    """Features and masks of a whole batch."""
    _, masked, lengths = CASES[case]
    features = tiny.batch(owner, BATCHES[step], lengths=lengths, seed=step)
    if not masked:
        return features, None
    generator = torch.Generator().manual_seed(step)
    return features, {
        name: tiny.mask_of(torch.randint(1, 6, (BATCHES[step],), generator=generator).tolist(), 5) for name in NAMES
    }


def trained(case: str, ranks: Ranks, **fields: object) -> tuple[State, list[StepResult]]:
    """The model of a rank after a few steps, and their results."""
    config = config_of(CASES[case][0], **fields)
    trainer = Trainer(config, {name: tiny.MODALITIES[name] for name in NAMES}, torch.device("cpu"))
    results = []
    for step, clips in enumerate(BATCHES):
        own = ranks.bounds(clips)
        features, mask = batch_of(trainer.model, case, step)
        part = {name: values[own] for name, values in features.items()}
        valid = None if mask is None else {name: values[own] for name, values in mask.items()}
        results.append(trainer.train_step(part, valid, 1e-3, ranks.part(clips)))
    return trainer.model.state_dict(), results


def compare(
    found: tuple[State, list[StepResult]], wanted: tuple[State, list[StepResult]], tolerance: Tolerance = SHARED_STEP
) -> None:
    for name, value in wanted[0].items():
        assert_close(found[0][name], value, tolerance if value.is_floating_point() else EXACT, name)
    for result, truth in zip(found[1], wanted[1], strict=True):
        for part in ("terms", "recognised", "usage"):
            ours, theirs = getattr(result, part), getattr(truth, part)
            assert list(ours) == list(theirs)
            for name, value in theirs.items():
                assert_close(ours[name], value, tolerance, f"{part} {name}")


def meet(rank: int, ranks: int, folder: str) -> Ranks:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    return Ranks(rank, ranks)


def check_rank(rank: int, size: int, folder: str, truths: dict[str, tuple[State, list[StepResult]]]) -> None:
    ranks = meet(rank, size, folder)
    for case, truth in truths.items():
        found = trained(case, ranks)
        compare(found, truth)
        every: list[State | None] = [None] * size
        dist.all_gather_object(every, found[0])
        for other in every:
            assert other is not None and all(torch.equal(other[name], found[0][name]) for name in other), case
    compare(
        trained("official, masks", ranks, micro_batches=2, activation_checkpointing=True), truths["official, masks"]
    )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_the_model_of_one(size: int, tmp_path: Path) -> None:
    truths = {case: trained(case, Ranks()) for case in CASES}
    revived = [case for case, truth in truths.items() if (truth[0]["codebook.idle"] == 0).sum() > 0]
    assert revived == list(CASES)
    mp.start_processes(check_rank, args=(size, str(tmp_path), truths), nprocs=size, start_method="fork")


class TestLessMemory:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("number", [2, 3])
    def test_micro_batches(self, case: str, number: int) -> None:
        compare(trained(case, Ranks(), micro_batches=number), trained(case, Ranks()))

    @pytest.mark.parametrize("preset", ["recommended", "official", "paper"])
    def test_activation_checkpointing(self, preset: str) -> None:
        """Dropout is drawn again as it was."""
        kept = trained(f"{preset}, masks", Ranks(), dropout=0.1)
        compare(trained(f"{preset}, masks", Ranks(), dropout=0.1, activation_checkpointing=True), kept)

    def test_dropout_is_replayed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both times a micro-batch is encoded, it is encoded alike; the next one is not."""
        real, seen = UniCode.encode_features, []

        def noted(self: UniCode, name: str, features: torch.Tensor, mask: torch.Tensor | None) -> object:
            found = real(self, name, features, mask)
            seen.append((name, torch.is_grad_enabled(), found.semantic.detach()))
            return found

        monkeypatch.setattr(UniCode, "encode_features", noted)
        first = trained("recommended, masks", Ranks(), dropout=0.5, micro_batches=2)
        for step in range(len(BATCHES)):
            calls = seen[12 * step : 12 * step + 12]
            assert [graph for _, graph, _ in calls] == [False] * 6 + [True] * 6
            for (name, _, before), (again, _, after) in zip(calls[:6], calls[6:], strict=True):
                assert name == again
                assert_close(after, before, SHARED_STEP, name)
        compare(trained("recommended, masks", Ranks(), dropout=0.5, micro_batches=2), first, EXACT)
        other = trained("recommended, masks", Ranks(), dropout=0.0, micro_batches=2)
        assert not torch.allclose(other[0]["codebook.codebook"], first[0]["codebook.codebook"])

    def test_activations_are_not_kept(self) -> None:
        """What autograd keeps between forward and backward shrinks."""

        def kept(**fields: object) -> int:
            owner = tiny.model(**{"dtype": "float64", **fields})
            sizes = []

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                owner(tiny.batch(owner))
            return sum(sizes)

        assert kept(activation_checkpointing=True) < kept() / 3


FLAGS = {
    **tiny.SIZES,
    "steps": 12,
    "batch_size": 10,
    "validations": 2,
    "checkpoint_seconds": 0.0,
    "dtype": "float64",
    "dropout": 0.0,
    "probe_tasks": "classification",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("store") / "tiny")


def torchrun(ranks: int, *flags: str, **fields: object) -> subprocess.Popen:
    """A job; the last seconds that torchrun leaves a process that does not end are few."""
    words = [*flags, *(f"--{name}={value}" for name, value in fields.items())]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
            *("-m", "unicode_fast.train", *words),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(job: subprocess.Popen, seconds: float = 120) -> tuple[str, str]:
    """What a job printed on its two streams."""
    try:
        return job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
