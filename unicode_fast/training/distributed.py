"""Ranks, the processes that `torchrun` starts to train one model: their start, their agreement and their end.

`unicode_fast.training.shard` has the collectives of a training step.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from unicode_fast.config import TrainConfig
from unicode_fast.training.shard import Shard, own_clips

if dist.is_available():
    # torch's optimisers import this module. Imported after `init_process_group`, its default arguments keep the group
    # and its threads alive until the interpreter ends, which can abort the process.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")

# Environment variable: the seconds that a rank waits for another rank outside the training loop.
WAIT_VARIABLE = "UNICODE_FAST_WAIT_SECONDS"
_WAIT_SECONDS = 3600.0
# The tasks after training may take many times longer; the model is saved before them.
_WAIT_FACTORS = {"measuring": 24}
# Limit for the connection of all ranks to the key-value store of torchrun.
_RENDEZVOUS_SECONDS = 60.0
# A training step may take this many times as long as the second step of the run, and the second as long as the first.
_STALL_FACTOR = 4
_LONGEST_SECONDS = 10_000_000
# The gloo group times out this much earlier than NCCL's, because gloo gives a message and NCCL none.
_LATER_SECONDS = 2.0
# Once one rank has failed: seconds until the other live ranks have failed too, and until they leave without a message.
_NAMING_SECONDS, _LEAVE_SECONDS = 4.0, 8.0
_RESUME = "checkpoints are kept, continue with --resume"


class DistContext:
    """A rank and its connection to all ranks of a run; a process without torchrun is the only rank.

    Attributes:
        rank: number of this process.
        size: number of ranks.
        phase: current phase of the run, for error messages.
        failing: whether this rank has failed.
        cpu_group: gloo group of all ranks, beside the group that trains; None before `join`.
    """

    def __init__(self, rank: int = 0, size: int = 1, wait_seconds: float = _WAIT_SECONDS) -> None:
        self.rank, self.size, self.phase, self.failing = rank, size, "opening data", False
        self.wait_seconds, self.limit = wait_seconds, datetime.timedelta(seconds=wait_seconds)
        self.timeout_seconds, self.steps = TrainConfig.rank_timeout_seconds, 0
        self.key_value_store: dist.Store | None = None
        self.cpu_group: dist.ProcessGroup | None = None
        self._reports = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files, shows progress and measures."""
        return self.rank == 0

    def bounds(self, clips: int) -> slice:
        """The clips of a batch that this rank holds; ranks hold equally many, or one more or less."""
        return own_clips(clips, self.rank, self.size)

    def shard(self, clips: int) -> Shard | None:
        """The clips of this rank for a training step; None where it holds all."""
        group = dist.group.WORLD if self.size > 1 else None
        return None if group is None else Shard(clips, group)

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank, from the device of the run.

        Raises:
            ValueError: there are more ranks on this machine than GPUs.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        local, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"nproc-per-node must be at most the {there} GPUs of this machine, got local rank {local}")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def run_on_rank0(self, make: Callable[[], T] | None, phase: str | None = None) -> T:
        """Runs `make` on the first rank while the others wait, and returns its result on every rank.

        Args:
            make: the function; may be None on the other ranks.
            phase: name of what the first rank does, for the error message of a time-out.
        """
        if self.cpu_group is None:
            return cast(Callable[[], T], make)()
        before, self.phase = self.phase, phase or self.phase
        made: list[Any] = [make() if self.first and make else None]
        # The other ranks also wait for `make`, the first rank for the broadcast alone.
        long = datetime.timedelta(seconds=self.wait_seconds * _WAIT_FACTORS.get(self.phase, 1))
        self.cpu_group.set_timeout(self.limit if self.first else long)
        dist.broadcast_object_list(made, src=0, group=self.cpu_group, device=torch.device("cpu"))
        self.phase = before
        return made[0]

    def broadcast_parameters(self, model: torch.nn.Module) -> None:
        """Broadcasts the parameters and buffers of the first rank to all ranks."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def begin(self, timeout_seconds: float) -> None:
        """Resets the time-outs for a run. Its first step may compile, so the time-out outside steps holds for it."""
        self.phase, self.steps, self.timeout_seconds = "opening data", 0, timeout_seconds
        self._limit(self.wait_seconds)

    @contextlib.contextmanager
    def step(self, number: int, device: torch.device) -> Iterator[None]:
        """Context of a training step and the reading of its batch; the first two steps may lengthen the time-out."""
        self.phase, begun = f"training at step {number}", time.monotonic()
        yield
        self.steps += 1
        if self.cpu_group is not None and self.steps <= 2:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._limit(max(self.timeout_seconds, _STALL_FACTOR * (time.monotonic() - begun)))

    def agree(self, wish: bool) -> bool:
        """The flag of the first rank, on every rank; before each step it synchronises the ranks within the time-out."""
        if self.cpu_group is None:
            return wish
        flag = torch.tensor(int(wish and self.first))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.cpu_group, async_op=True).wait(self.limit)
        return bool(flag)

    def _limit(self, seconds: float) -> None:
        """Sets the time-out of the following steps."""
        self.limit = datetime.timedelta(seconds=min(seconds, _LONGEST_SECONDS))
        if dist.group.WORLD is not None and self.cpu_group is not None:
            dist.group.WORLD.set_timeout(self.limit + datetime.timedelta(seconds=_LATER_SECONDS))

    def fails_first(self) -> bool:
        """Marks this rank as failed; True if no other rank failed before it, so that it prints the error."""
        if not self.failing:
            self.failing = True
            self._reports = self._call_kv_store(self._note_failure, True)
        return self._reports

    def lose(self, error: BaseException) -> NoReturn:
        """Ends this process because another rank ended or hangs; the first rank to fail names that rank."""
        if not self.fails_first():
            _leave()
        missing = self._call_kv_store(self._missing, list[int]())
        who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
        self._end(f"{who} ended or hangs, {self.phase} ({_first_sentence(error)})", 1)

    def end_by_signal(self, number: int) -> None:
        """Ends this process after SIGTERM, which torchrun sends when one rank has ended; one rank prints the error."""
        if self.failing:
            # This rank prints its error and ends by itself.
            return
        if self.fails_first():
            self._end(f"rank {self.rank} got SIGTERM, as when another rank ended, {self.phase}", 128 + number)
        os._exit(128 + number)

    def _end(self, message: str, status: int) -> NoReturn:
        # A new line ends that of a progress bar. `os._exit` runs no clean-up, which could wait for another rank.
        print(f"\nerror: {message}; {_RESUME}", file=sys.__stderr__, flush=True)  # noqa: T201
        os._exit(status)

    def _call_kv_store(self, function: Callable[[dist.Store], T], default: T) -> T:
        """Calls a function of the key-value store; the default if the store, or the machine that holds it, hangs."""
        found = [default]

        def call(kv_store: dist.Store) -> None:
            with contextlib.suppress(RuntimeError):
                found[0] = function(kv_store)

        if self.key_value_store is not None:
            thread = threading.Thread(target=call, args=(self.key_value_store,), daemon=True)
            thread.start()
            thread.join(2 * _NAMING_SECONDS)
            self.key_value_store = None if thread.is_alive() else self.key_value_store
        return found[0]

    def _note_failure(self, kv_store: dist.Store) -> bool:
        kv_store.set(f"failed-{self.rank}", "")
        return kv_store.add("failures", 1) == 1

    def _missing(self, kv_store: dist.Store) -> list[int]:
        """The ranks that have not reported a failure once all waiting ranks have."""
        deadline = time.monotonic() + _NAMING_SECONDS
        while True:
            missing = [rank for rank in range(self.size) if not kv_store.check([f"failed-{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


@contextlib.contextmanager
def join() -> Iterator[DistContext]:
    """Context of the ranks that torchrun has started; without torchrun, one rank.

    Rank 0 alone prints. If ranks fail, the first of them prints its error and the others end without a message. A rank
    whose connection to another rank breaks or times out ends its process.

    Raises:
        ValueError: the environment variable WAIT_VARIABLE is not a number of seconds.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield DistContext()
        return
    wait_seconds = _wait_seconds()
    kv_store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=_RENDEZVOUS_SECONDS)))
    ranks = DistContext(rank, size, wait_seconds)
    # NCCL refuses to start on a machine without a GPU, where builds of torch with CUDA have it too.
    nccl = dist.is_nccl_available() and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=kv_store, rank=rank, world_size=size, timeout=ranks.limit)
    ranks.key_value_store, ranks.cpu_group = dist.PrefixStore("unicode_fast", kv_store), dist.new_group(backend="gloo")
    _handle_sigterm(ranks)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.first:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield ranks
            # The other ranks wait here until the first has finished.
            ranks.run_on_rank0(lambda: None, "ending")
    except SystemExit:
        raise
    except BaseException as error:
        # gloo raises plain RuntimeErrors.
        if isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and re.search("gloo|timed out", str(error))
        ):
            ranks.lose(error)
        if not ranks.fails_first():
            _leave()
        raise
    ranks.cpu_group = None
    dist.destroy_process_group()


def _wait_seconds() -> float:
    text = os.environ.get(WAIT_VARIABLE, str(_WAIT_SECONDS))
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= _LONGEST_SECONDS:
            return float(text)
    raise ValueError(f"{WAIT_VARIABLE} must be between 1 and {_LONGEST_SECONDS} seconds, got {text!r}")


def _handle_sigterm(ranks: DistContext) -> None:
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != process:
            # A worker that reads batches, forked from this process.
            os._exit(128 + number)
        ranks.end_by_signal(number)

    # Python allows signal handlers in the main thread only, where commands run.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _leave() -> NoReturn:
    """Ends this process without a message, after the failing rank has had time to print its own."""
    time.sleep(_LEAVE_SECONDS)
    os._exit(1)


def _first_sentence(error: BaseException) -> str:
    # gloo puts its source file and line first.
    text = re.sub(r"^\[\S*:\d+\] ", "", str(error).strip())
    return text.split("\n")[0].split(". ")[0] or type(error).__name__
