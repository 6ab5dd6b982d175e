"""Ranks that share a batch train the model of one; they end together, and with less memory the step is the same."""

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_close
from test_ranks import count_collectives
from tolerances import EXACT, SHARED_BATCH, Tolerance

from unicode_fast import UniCode, checkpoint
from unicode_fast.data import open_dataset, open_store
from unicode_fast.data.stream import write_shards
from unicode_fast.train import main
from unicode_fast.training.checks import check_ranks
from unicode_fast.training.distributed import WAIT_VARIABLE, DistContext, join
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.trainer import Trainer, initialise_codebook

NAMES = ("audio", "video", "text")
CPU = torch.device("cpu")
# Clips of the batches; with three ranks neither is shared evenly.
BATCHES = (8, 8, 5)
# By preset: are there masks, and steps of modalities that differ from the others. With "absent" clips lack modalities.
CASES: dict[str, tuple[str, bool, dict[str, int]]] = {
    "recommended": ("recommended", False, {}),
    "recommended, masks": ("recommended", True, {}),
    "recommended, unequal lengths": ("recommended", False, {"text": 3}),
    "official": ("official", False, {}),
    "official, masks": ("official", True, {}),
    "paper": ("paper", False, {}),
    "paper, masks": ("paper", True, {}),
    "recommended, absent": ("recommended", True, {}),
    "paper, absent": ("paper", True, {}),
}
State = dict[str, torch.Tensor]


def trainer_of(preset: str, device: torch.device = CPU, **fields: object) -> Trainer:
    given = {"dropout": 0.0, "dtype": "float64", "reset_after": 1, **fields}
    return tiny.trainer(preset, device=str(device), **given)


def batch_of(owner: UniCode, case: str, step: int) -> tuple[State, State | None]:
    """Features and masks of a whole batch."""
    _, masked, lengths = CASES[case]
    features = tiny.batch(owner, BATCHES[step], lengths=lengths, seed=step)
    if not masked:
        return features, None
    generator = torch.Generator().manual_seed(step)
    least = 0 if case.endswith("absent") else 1
    return features, {
        name: tiny.mask_of(torch.randint(least, 6, (BATCHES[step],), generator=generator).tolist(), 5) for name in NAMES
    }


def trained(
    case: str, ranks: DistContext, device: torch.device = CPU, **fields: object
) -> tuple[State, list[StepResult]]:
    """The model of a rank after a few steps, and their results."""
    trainer = trainer_of(CASES[case][0], device, **fields)
    results = []
    for step, clips in enumerate(BATCHES):
        own = ranks.bounds(clips)
        features, mask = batch_of(trainer.model, case, step)
        own_features = {name: values[own].to(device) for name, values in features.items()}
        valid = None if mask is None else {name: values[own].to(device) for name, values in mask.items()}
        results.append(trainer.train_step(own_features, valid, 1e-3, ranks.shard(clips)))
    return trainer.model.state_dict(), results


def compare(
    found: tuple[State, list[StepResult]], expected: tuple[State, list[StepResult]], tolerance: Tolerance = SHARED_BATCH
) -> None:
    for name, value in expected[0].items():
        assert_close(found[0][name], value, tolerance if value.is_floating_point() else EXACT, name)
    for result, truth in zip(found[1], expected[1], strict=True):
        for group in ("terms", "recognised", "usage"):
            ours, theirs = getattr(result, group), getattr(truth, group)
            assert list(ours) == list(theirs)
            for name, value in theirs.items():
                assert_close(ours[name], value, tolerance, f"{group} {name}")


class Kept:
    """A tensor that autograd keeps; the class counts the numbers that are kept, now and at most."""

    now = most = 0

    def __init__(self, tensor: torch.Tensor, owned: set[int]) -> None:
        self.tensor, self.size = tensor, 0 if tensor.data_ptr() in owned else tensor.numel()
        Kept.now += self.size
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self) -> None:
        Kept.now -= self.size


def meet(rank: int, ranks: int, folder: str) -> DistContext:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    return DistContext(rank, ranks)


def check_dropout_after_a_resume(ranks: DistContext) -> None:
    """Draws depend on the step and the rank, not on what was drawn before."""
    trainers = [trainer_of("recommended", dropout=0.5) for _ in range(2)]
    for step, clips in enumerate(BATCHES):
        features, _ = batch_of(trainers[0].model, "recommended", step)
        own_features = {name: values[ranks.bounds(clips)] for name, values in features.items()}
        trainers[0].train_step(own_features, None, 1e-3, ranks.shard(clips))
        if step == 0:
            content = copy.deepcopy({"model": trainers[0].model.state_dict(), **trainers[0].state()})
            trainers[1].restore({**content, "rng": torch.Generator().manual_seed(9).get_state()})
        else:
            trainers[1].train_step(own_features, None, 1e-3, ranks.shard(clips))
            # Each rank draws its own.
            seeds: list[int] = [0] * ranks.size
            dist.all_gather_object(seeds, torch.initial_seed())
            assert len(set(seeds)) == ranks.size
    states = [trainer.model.state_dict() for trainer in trainers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def check_collectives(ranks: DistContext) -> None:
    """Of a step: features, their gradient, that of the parameters, codebook; and one for each inner step of CLUB.

    The loop adds one of a single number on the CPU before each step (`DistContext.agree`).
    """
    called = count_collectives(pytest.MonkeyPatch())
    for case in ("recommended, masks", "official", "paper"):
        trained(case, ranks)
        inner = tiny.config(CASES[case][0]).method.club_inner_steps
        assert len(called) == len(BATCHES) * (4 + inner), (case, called)
        called.clear()


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
    check_dropout_after_a_resume(ranks)
    check_collectives(ranks)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_the_model_of_one(size: int, tmp_path: Path) -> None:
    truths = {case: trained(case, DistContext()) for case in CASES}
    for case, (state, _) in truths.items():
        # Codewords were reset, or there would be nothing to agree on.
        without, _ = trained(case, DistContext(), reset_after=10**6)
        assert not torch.equal(state["codebook.codebook"], without["codebook.codebook"]), case
    mp.start_processes(check_rank, args=(size, str(tmp_path), truths), nprocs=size, start_method="fork")


def check_rank_on_gpus(rank: int, size: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    truths = {case: trained(case, DistContext(), device) for case in CASES}
    dist.init_process_group("cpu:gloo,cuda:nccl", f"file://{folder}/meeting", rank=rank, world_size=size)
    for case, truth in truths.items():
        compare(trained(case, DistContext(rank, size), device), truth)
    found = trained("official, masks", DistContext(rank, size), device, micro_batches=2, activation_checkpointing=True)
    compare(found, truths["official, masks"])
    dist.destroy_process_group()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not dist.is_nccl_available(), reason="CUDA with two GPUs and NCCL is not available"
)
def test_ranks_on_gpus_train_the_model_of_one(tmp_path: Path) -> None:
    mp.start_processes(check_rank_on_gpus, args=(2, str(tmp_path)), nprocs=2, start_method="spawn")


class TestLessMemory:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("number", [2, 3])
    def test_micro_batches(self, case: str, number: int) -> None:
        compare(trained(case, DistContext(), micro_batches=number), trained(case, DistContext()))

    @pytest.mark.parametrize("preset", ["recommended", "official", "paper"])
    def test_activation_checkpointing(self, preset: str) -> None:
        """Dropout is drawn again as it was."""
        kept = trained(f"{preset}, masks", DistContext(), dropout=0.1)
        compare(trained(f"{preset}, masks", DistContext(), dropout=0.1, activation_checkpointing=True), kept)

    def test_dropout_is_replayed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both times a micro-batch is encoded, it is encoded alike; the next one is not."""
        whole, semantic, seen = UniCode.encode_features, UniCode.encode_semantic, []

        def noted(self: UniCode, name: str, features: torch.Tensor, mask: torch.Tensor | None) -> object:
            found = whole(self, name, features, mask)
            seen.append((name, torch.is_grad_enabled(), found[0].detach()))
            return found

        def noted_again(self: UniCode, name: str, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            z = semantic(self, name, features, mask)
            seen.append((name, torch.is_grad_enabled(), z.detach()))
            return z

        monkeypatch.setattr(UniCode, "encode_features", noted)
        monkeypatch.setattr(UniCode, "encode_semantic", noted_again)
        first = trained("recommended, masks", DistContext(), dropout=0.5, micro_batches=2)
        for step in range(len(BATCHES)):
            calls = seen[12 * step : 12 * step + 12]
            assert [graph for _, graph, _ in calls] == [False] * 6 + [True] * 6
            for (name, _, before), (again, _, after) in zip(calls[:6], calls[6:], strict=True):
                assert name == again
                assert_close(after, before, SHARED_BATCH, name)
        compare(trained("recommended, masks", DistContext(), dropout=0.5, micro_batches=2), first, EXACT)
        other = trained("recommended, masks", DistContext(), dropout=0.0, micro_batches=2)
        assert not torch.allclose(other[0]["codebook.codebook"], first[0]["codebook.codebook"])

    def test_initial_codewords(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One rank encodes a whole batch for all, in micro-batches as small as theirs, and draws the same rows."""
        encode, clips, found = UniCode.forward, [], []

        def noted(self: UniCode, features: State, mask: State) -> object:
            clips.append(len(features["audio"]))
            return encode(self, features, mask)

        monkeypatch.setattr(UniCode, "forward", noted)
        for ranks, number in ((1, 1), (3, 1), (2, 2)):
            clips.clear()
            trainer = trainer_of("recommended", micro_batches=number)
            batches = open_dataset(tiny.config(data=str(store)).data).batches(
                "train", NAMES, 10, 0, dtype=torch.float64
            )
            initialise_codebook(trainer, batches, CPU, ranks)
            assert max(clips) == -(-10 // (ranks * number))
            found.append(trainer.model.codebook.codebook)
        for codebook in found[1:]:
            assert_close(codebook, found[0], SHARED_BATCH, "codebook")

    @pytest.mark.parametrize("fields", [{"micro_batches": 8}, {"activation_checkpointing": True}])
    def test_fewer_tensors_are_kept(self, fields: dict) -> None:
        """At the worst moment of a step, of what autograd keeps for the backward pass, parameters left aside."""

        def most_kept(**fields: object) -> int:
            # Convolutions that outweigh the rest, as at the published sizes.
            trainer = trainer_of("recommended", grid_hidden_width=64, **fields)
            features, owned = tiny.batch(trainer.model, 32), {p.data_ptr() for p in trainer.model.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, owned), lambda kept: kept.tensor):
                trainer.train_step(features, None, 1e-3)
            most, Kept.most = Kept.most, 0
            assert Kept.now == 0
            return most

        assert most_kept(**fields) < most_kept() / 3


FLAGS = {
    **tiny.SIZES,
    "steps": 16,
    "batch_size": 10,
    "validations": 2,
    "checkpoint_seconds": 0.0,
    "dtype": "float64",
    "dropout": 0.0,
    "probe_tasks": "classification",
}


class Job:
    """A run under torchrun, of the module that trains or of a script in its place."""

    def __init__(
        self,
        ranks: int,
        log: Path,
        *flags: str,
        script: tuple[str, ...] = ("-m", "unicode_fast.train"),
        wait_seconds: float = 3600,
        **fields: object,
    ) -> None:
        words = [*flags, *(f"--{name}={value}" for name, value in fields.items())]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [*torchrun, *script, *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", WAIT_VARIABLE: str(wait_seconds)},
                stdout=stream,
                stderr=stream,
            )

    def wait(self, seconds: float = 120) -> tuple[int, str]:
        """Its exit status and what it printed."""
        try:
            status = self.process.wait(seconds)
        finally:
            self.process.kill()
        return status, self.log.read_text()

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + 120
        while not (steps := checkpoint.steps_in(run)) or steps[-1] < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """To the process of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())
                variables = (folder / "environ").read_bytes().split(b"\0")
                if parent and int(parent[1]) == self.process.pid and f"RANK={rank}".encode() in variables:
                    os.kill(int(folder.name), number)
                    return
        raise AssertionError(f"rank {rank} has no process: {self.log.read_text()}")


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "error: " in line and not line.startswith("[rank")]


@pytest.mark.skipif(
    not (dist.is_gloo_available() and Path("/proc/self/environ").exists()), reason="needs gloo and /proc"
)
class TestTorchrun:
    def test_a_rank_dies_and_another_number_goes_on(self, store: Path, tmp_path: Path) -> None:
        """Two ranks, one of them killed, then three, whose shares are smaller: the model that one process trains."""
        out = tmp_path / "run"
        job = Job(2, tmp_path / "killed.txt", data=store, out=out, **FLAGS, micro_batches=5)
        job.wait_for_step(out, 3)
        job.signal(1, signal.SIGKILL)
        begun = time.monotonic()
        status, printed = job.wait()
        assert status != 0 and time.monotonic() - begun < 60
        (error,) = errors_in(printed)
        assert re.search(r"rank (1 )?ended.*, (training at|saving after|validating after) step \d+", error), printed
        assert "continue with --resume" in error and "Signal 9 (SIGKILL)" in printed
        saved = checkpoint.steps_in(out)[-1]
        content = checkpoint.read(checkpoint.find(out, "last"))
        assert 3 <= saved < FLAGS["steps"] and content["step"] == saved and content["progress"]["ranks"] == 2
        status, printed = Job(3, tmp_path / "resumed.txt", f"--resume={out}", micro_batches=3).wait()
        assert status == 0 and f"next: python -m unicode_fast.report {out} --out {out}-report\n" in printed, printed
        assert printed.count("\nclassification ") == 6 and printed.count(f"run {out}\n") == 1
        assert (
            main([f"--{name}={value}" for name, value in {**FLAGS, "data": store, "out": tmp_path / "one"}.items()])
            == 0
        )
        found, expected = (checkpoint.read(checkpoint.find(run, "last"))["model"] for run in (out, tmp_path / "one"))
        for name, value in expected.items():
            assert_close(found[name], value, SHARED_BATCH if value.is_floating_point() else EXACT, name)

    @pytest.mark.slow
    def test_a_rank_stalls(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        fields = {**FLAGS, "steps": 100000, "rank_timeout_seconds": 4.0}
        job = Job(2, tmp_path / "log.txt", data=store, out=out, **fields)
        job.wait_for_step(out, 2)
        job.signal(1, signal.SIGSTOP)
        begun = time.monotonic()
        while not errors_in(job.log.read_text()) and time.monotonic() - begun < 30:
            time.sleep(0.05)
        # torchrun kills a process that stands still after thirty seconds more, and ends one that goes on at once.
        job.signal(1, signal.SIGCONT)
        status, printed = job.wait()
        assert status != 0
        (message,) = errors_in(printed)
        found = r"error: rank 1 ended or hangs, (training at|saving after) step \d+ \(.*imed out.*\); .*with --resume"
        assert re.fullmatch(found, message)
        assert checkpoint.read(checkpoint.find(out, "last"))["step"] >= 2

    @pytest.mark.slow
    def test_the_first_machine_stands_still(self, store: Path, tmp_path: Path) -> None:
        """Torchrun, which holds the store, is stopped, and nothing is wrong yet; then the first rank is."""
        out = tmp_path / "run"
        fields = {**FLAGS, "steps": 100000, "rank_timeout_seconds": 4.0, "wait_seconds": 10.0}
        job = Job(2, tmp_path / "log.txt", data=store, out=out, **fields)
        job.wait_for_step(out, 3)
        job.process.send_signal(signal.SIGSTOP)
        job.wait_for_step(out, checkpoint.steps_in(out)[-1] + 3)
        job.signal(0, signal.SIGSTOP)
        begun = time.monotonic()
        while not errors_in(job.log.read_text()) and time.monotonic() - begun < 40:
            time.sleep(0.05)
        (message,) = errors_in(job.log.read_text())
        job.signal(0, signal.SIGKILL)
        job.process.send_signal(signal.SIGCONT)
        status, printed = job.wait()
        assert status != 0 and re.match(
            r"error: another rank ended or hangs, (training at|saving after) step \d+ \(.*[tT]imed out", message
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["opening", "loader", "step", "validation"])
    def test_a_rank_hangs(self, place: str, store: Path, tmp_path: Path) -> None:
        """Before the first step, before a step or in it, or between steps, where it may for longer."""
        script = tmp_path / "script.py"
        script.write_text(A_RANK_THAT_HANGS)
        fields = {**FLAGS, "steps": 1000, "validations": 100, "checkpoint_seconds": 1000.0, "rank_timeout_seconds": 2.0}
        fields |= {"script": (str(script), place), "wait_seconds": 3600.0 if place in ("loader", "step") else 10.0}
        job = Job(3 if place == "step" else 2, tmp_path / "log.txt", data=store, out=tmp_path / "run", **fields)
        status, printed = job.wait(60)
        assert status != 0
        (message,) = errors_in(printed)
        rank, phase = {
            "opening": (1, "opening data"),
            "loader": (1, "training at step 13"),
            "step": (1, "training at step 13"),
            "validation": (0, "validating after step 10"),
        }[place]
        assert message.startswith(f"error: rank {rank} ended or hangs, {phase} ("), printed

    @pytest.mark.slow
    def test_a_stream_goes_on_with_as_many_ranks(self, store: Path, tmp_path: Path) -> None:
        """Each rank reads files of its own, so that another number would read other batches."""
        write_shards(open_store(store), tmp_path / "shards", 5, progress=False)
        out = tmp_path / "run"
        fields = {**FLAGS, "data": f"webdataset:{tmp_path / 'shards'}", "probe_tasks": "none"}
        status, printed = Job(2, tmp_path / "log.txt", out=out, **fields).wait()
        assert status == 0, printed
        expected = checkpoint.read(checkpoint.find(out, "last"))["model"]
        first = str(checkpoint.steps_in(out)[0])
        status, printed = Job(2, tmp_path / "same.txt", f"--resume={out}", "--resume_step", first).wait()
        assert status == 0, printed
        found = checkpoint.read(checkpoint.find(out, "last"))["model"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        with pytest.raises(
            checkpoint.CheckpointError, match="number of ranks must be 2 as before, because .* of a stream, got 1"
        ):
            main([f"--resume={out}", "--resume_step", str(checkpoint.steps_in(out)[0])])

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_ends_all_with_one_message(self, store: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        fields = {**FLAGS, "dtype": "float32", "learning_rate": 1e30}
        status, printed = Job(2, tmp_path / "log.txt", data=store, out=out, **fields).wait()
        assert status != 0
        (message,) = errors_in(printed)
        assert re.search(r"error: loss term .* became .* at step \d+, in the batch of clips .*saved as", message)
        assert len(list((out / "checkpoints").glob("nonfinite-*.pt"))) == 1

    def test_no_thread_outlives_the_ranks(self, tmp_path: Path) -> None:
        """One that still runs when the interpreter ends can abort a process whose work is done."""
        script = tmp_path / "script.py"
        script.write_text(THREADS_AFTERWARDS)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        assert printed.count("during True, afterwards False") == 2, printed


A_RANK_THAT_HANGS = """
import os
import sys
import time
from unicode_fast import train
from unicode_fast.data import Batches
from unicode_fast.training import checks, run_log
from unicode_fast.training.trainer import Trainer

place, rank = sys.argv.pop(1), int(os.environ["RANK"])

def hanging(call, on, where=lambda *_: True):
    def called(*arguments, **options):
        if rank == on and where(*arguments):
            time.sleep(1000)
        return call(*arguments, **options)
    return called

if place == "opening":
    checks.open_run_data = hanging(checks.open_run_data, 1)
elif place == "loader":
    Batches.batch = hanging(Batches.batch, 1, lambda batches, step, *_: step == 12)
elif place == "step":
    Trainer.train_step = hanging(Trainer.train_step, 1, lambda trainer, *_: trainer.step == 12)
else:
    run_log.validate = hanging(run_log.validate, 0)
train.main()
"""


# An optimiser imports more of torch.distributed.
THREADS_AFTERWARDS = """
import pathlib
import sys
import torch
from unicode_fast.training import distributed

def gloo():
    return any("gloo" in name.read_text() for name in pathlib.Path("/proc/self/task").glob("*/comm"))

with distributed.join() as ranks:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.Adam([parameter]).step()
    ranks.broadcast_parameters(torch.nn.Linear(1, 1))
    during = gloo()
sys.__stdout__.write(f"during {during}, afterwards {gloo()}\\n")
"""


class TestTimeOut:
    def test_slow_steps_have_longer(self, tmp_path: Path) -> None:
        dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
        ranks, limits = DistContext(), []
        ranks.cpu_group = dist.group.WORLD
        for timeout_seconds in (1.0, 100.0):
            ranks.begin(timeout_seconds)
            for number, seconds in enumerate((0.0, 0.5, 0.0)):
                limits.append(ranks.limit.total_seconds())
                with ranks.step(number + 1, CPU):
                    time.sleep(seconds)
            limits.append(ranks.limit.total_seconds())
        dist.destroy_process_group()
        # The first step may compile, and the second one takes half a second.
        assert limits[:2] == [3600.0, 1.0] and limits[4:] == [3600.0, 100.0, 100.0, 100.0]
        assert 2.0 <= limits[2] == limits[3] < 20.0

    @pytest.mark.parametrize("text", ["soon", "0", "nan", "inf"])
    def test_a_variable_that_is_no_number_of_seconds(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", WAIT_VARIABLE: text}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"{WAIT_VARIABLE} must be between .* seconds, got '{text}'"), join():
            pass


def test_nccl_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch with CUDA has NCCL on machines without a GPU too."""
    begin = mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(KeyboardInterrupt), join():
            pass
    assert [call.args for call in begin.call_args_list] == [("gloo",), ("cpu:gloo,cuda:nccl",)]


class TestChecks:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"batch_size": 2}, "batch_size must be at least the 3 ranks, got 2"),
            ({"batch_size": 29, "keep_last_batch": True}, "needs 3 clips in the last batch, one a rank, got 2"),
            ({"batch_size": 10, "micro_batches": 4}, "micro_batches must be at most the 3 clips of a rank, got 4"),
        ],
    )
    def test_too_few_clips(self, fields: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_ranks(tiny.config(**fields), 60, DistContext(1, 3))
        check_ranks(tiny.config(**{**fields, "micro_batches": 1}), 60, DistContext())

    def test_every_clip_has_one_rank(self) -> None:
        clips = range(80)
        shares = [clips[DistContext(rank, 3).bounds(80)] for rank in range(3)]
        assert [len(share) for share in shares] == [26, 27, 27]
        assert [clip for share in shares for clip in share] == list(clips)
