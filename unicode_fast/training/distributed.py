"""The processes that `torchrun` starts to train one model together: which clips each holds, and who of them speaks.

What they compute together is in `unicode_fast.training.shard`; here is how they meet, agree and end.
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
    # Imported by torch's optimisers later on, it would keep the process group as a default argument, and so threads
    # that still run when the interpreter ends, which can abort the process.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")

# Variable of the environment: seconds that a rank waits for another one outside the training loop.
WAIT_VARIABLE = "UNICODE_FAST_WAIT_SECONDS"
_WAIT_SECONDS = 3600.0
# The tasks at the end may take longer than all else, and nothing is lost then.
_TIMES_LONGER = {"measuring": 24}
# Within which the ranks find the store that they share, in seconds.
_MEETING_SECONDS = 60.0
# A step may take this many times what the second one took.
_STEPS_OF_A_STALL = 4
# Nothing is waited for longer, in seconds.
_LONGEST_SECONDS = 10_000_000
# A collective of a step ends so much later than the meeting of hosts, which has a message where NCCL has none.
_LATER_SECONDS = 2.0
# Within which all ranks that are alive have failed, too, and how long the others leave the first one to say why.
_NAMING_SECONDS, _LAST_WORDS_SECONDS = 4.0, 8.0
_RESUME = "what was saved before is there, go on with --resume"


class Ranks:
    """One rank's view of all of them; a process that torchrun has not started is the only one.

    Attributes:
        rank: of this process.
        size: number of ranks.
        phase: what the run is at, for the message that ends it.
        failing: whether this rank has failed.
    """

    def __init__(self, rank: int = 0, size: int = 1, wait_seconds: float = _WAIT_SECONDS) -> None:
        self.rank, self.size, self.phase, self.failing = rank, size, "opening data", False
        self.wait_seconds, self.limit = wait_seconds, datetime.timedelta(seconds=wait_seconds)
        self.timeout_seconds, self.steps = TrainConfig.rank_timeout_seconds, 0
        # The store of torchrun, and a group of the hosts beside the one that trains.
        self.store: dist.Store | None = None
        self.hosts: dist.ProcessGroup | None = None
        self._speaks = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files, shows progress and measures."""
        return self.rank == 0

    def bounds(self, clips: int) -> slice:
        """Which clips of a batch this rank holds: as many as any other, or one more or less."""
        return own_clips(clips, self.rank, self.size)

    def shard(self, clips: int) -> Shard | None:
        """The same for a training step; None where this rank holds all."""
        group = dist.group.WORLD if self.size > 1 else None
        return None if group is None else Shard(clips, group)

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank, where `device` is that of the run.

        Raises:
            ValueError: there are more ranks on this machine than GPUs.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        local, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"nproc-per-node must be at most the {there} GPUs of a machine, got rank {local} there")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def from_first(self, make: Callable[[], T] | None, phase: str | None = None) -> T:
        """What `make` returns on the first rank, on every rank; it runs there alone while the others wait.

        Args:
            make: may be None on the others.
            phase: what the first rank does, for the message of a rank that waits in vain.
        """
        if self.hosts is None:
            return cast(Callable[[], T], make)()
        before, self.phase = self.phase, phase or self.phase
        made: list[Any] = [make() if self.first and make else None]
        # Those that the first rank has let wait are there.
        long = datetime.timedelta(seconds=self.wait_seconds * _TIMES_LONGER.get(self.phase, 1))
        self.hosts.set_timeout(self.limit if self.first else long)
        dist.broadcast_object_list(made, src=0, group=self.hosts, device=torch.device("cpu"))
        self.phase = before
        return made[0]

    def copy_from_first(self, model: torch.nn.Module) -> None:
        """Parameters and buffers of the first rank, on every rank."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def begin(self, timeout_seconds: float) -> None:
        """A run begins, maybe not the first; its first two steps may compile, and have the time-out outside steps."""
        self.phase, self.steps, self.timeout_seconds = "opening data", 0, timeout_seconds
        self._limit(self.wait_seconds)

    @contextlib.contextmanager
    def step(self, number: int, device: torch.device) -> Iterator[None]:
        """A training step, with the reading of its batch; what the second one takes may lengthen the time-out."""
        self.phase, begun = f"training at step {number}", time.monotonic()
        yield
        self.steps += 1
        if self.hosts is not None and self.steps == 2:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self._limit(max(self.timeout_seconds, _STEPS_OF_A_STALL * (time.monotonic() - begun)))

    def agree(self, wish: bool) -> bool:
        """What the first rank wishes, on every rank; hosts meet here before each step, within the time-out."""
        if self.hosts is None:
            return wish
        flag = torch.tensor(int(wish and self.first))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.hosts, async_op=True).wait(self.limit)
        return bool(flag)

    def _limit(self, seconds: float) -> None:
        """From now on a step waits so long for other ranks."""
        self.limit = datetime.timedelta(seconds=min(seconds, _LONGEST_SECONDS))
        if dist.group.WORLD is not None and self.hosts is not None:
            dist.group.WORLD.set_timeout(self.limit + datetime.timedelta(seconds=_LATER_SECONDS))

    def fails_first(self) -> bool:
        """Whether no other rank has failed before this one, which then says why."""
        if not self.failing:
            self.failing = True
            self._speaks = self._answer(self._note_failure, True)
        return self._speaks

    def lose(self, error: BaseException) -> NoReturn:
        """Ends this process as another one ended or hangs; the first rank to notice says which."""
        if not self.fails_first():
            _leave()
        missing = self._answer(self._missing, list[int]())
        who = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
        self._end(f"{who} ended or hangs, {self.phase} ({_first_sentence(error)})", 1)

    def end_by_signal(self, number: int) -> None:
        """Torchrun ends the other ranks, too, where one was killed; the first of them says so before it goes."""
        if self.failing:
            # What this rank is about to say ends it.
            return
        if self.fails_first():
            self._end(f"rank {self.rank} got SIGTERM, as where another rank ended, {self.phase}", 128 + number)
        os._exit(128 + number)

    def _end(self, message: str, status: int) -> NoReturn:
        # On a line of its own, below a progress bar. Nothing is left to do that may wait for another rank.
        print(f"\nerror: {message}; {_RESUME}", file=sys.__stderr__, flush=True)  # noqa: T201
        os._exit(status)

    def _answer(self, question: Callable[[dist.Store], T], otherwise: T) -> T:
        """What the store answers; where it stands still, as where its machine does, each rank is on its own."""
        found = [otherwise]

        def ask(store: dist.Store) -> None:
            with contextlib.suppress(RuntimeError):
                found[0] = question(store)

        if self.store is not None:
            thread = threading.Thread(target=ask, args=(self.store,), daemon=True)
            thread.start()
            thread.join(2 * _NAMING_SECONDS)
            self.store = None if thread.is_alive() else self.store
        return found[0]

    def _note_failure(self, store: dist.Store) -> bool:
        store.set(f"failed-{self.rank}", "")
        return store.add("failures", 1) == 1

    def _missing(self, store: dist.Store) -> list[int]:
        """Ranks that have not failed when those that wait for them have."""
        deadline = time.monotonic() + _NAMING_SECONDS
        while True:
            missing = [rank for rank in range(self.size) if not store.check([f"failed-{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks of the job that torchrun has started, until they part; one rank where it has not.

    The first rank alone prints. Where ranks fail, the first to do so says why, and the others leave without a word; a
    rank whose connection to another one breaks or times out ends its process.

    Raises:
        ValueError: the variable WAIT_VARIABLE holds no number of seconds.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    wait_seconds = _wait_seconds()
    store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=_MEETING_SECONDS)))
    ranks = Ranks(rank, size, wait_seconds)
    backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=ranks.limit)
    ranks.store, ranks.hosts = dist.PrefixStore("unicode_fast", store), dist.new_group(backend="gloo")
    _listen(ranks)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.first:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield ranks
            # The others wait here for what the first does last.
            ranks.from_first(lambda: None, "ending")
    except SystemExit:
        raise
    except BaseException as error:
        # Errors of gloo have no class of their own.
        if isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and re.search("gloo|timed out", str(error))
        ):
            ranks.lose(error)
        if not ranks.fails_first():
            _leave()
        raise
    ranks.hosts = None
    dist.destroy_process_group()


def _wait_seconds() -> float:
    text = os.environ.get(WAIT_VARIABLE, str(_WAIT_SECONDS))
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= _LONGEST_SECONDS:
            return float(text)
    raise ValueError(f"{WAIT_VARIABLE} must be between 1 and {_LONGEST_SECONDS} seconds, got {text!r}")


def _listen(ranks: Ranks) -> None:
    """Has SIGTERM end this rank with a message."""
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != process:
            # A process that reads batches, forked from this one.
            os._exit(128 + number)
        ranks.end_by_signal(number)

    # Only the main thread may, and only there do commands run.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _leave() -> NoReturn:
    """Ends this process without a word, after another one has had time for the last."""
    time.sleep(_LAST_WORDS_SECONDS)
    os._exit(1)


def _first_sentence(error: BaseException) -> str:
    # Without the file of gloo that it is from.
    text = re.sub(r"^\[\S*:\d+\] ", "", str(error).strip())
    return text.split("\n")[0].split(". ")[0] or type(error).__name__
