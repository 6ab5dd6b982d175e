"""The processes that `torchrun` starts to train one model together: which clips each holds, and who of them speaks.

What they compute together is in `unicode_fast.ops.sharded`; here is how they meet, agree and end.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from unicode_fast.activity import Activity
from unicode_fast.config import TrainConfig
from unicode_fast.training.shard import Shard, own_clips

if dist.is_available():
    # Imported by torch's optimisers later on, it would keep the process group as a default argument, and so threads
    # that still run when the interpreter ends, which can abort the process.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")

# Nothing in a run takes as long; `Watch` finds earlier whether a rank stalls, and knows what may take long.
_LONGEST_WAIT = datetime.timedelta(days=7)
# Within which the ranks find the store that they share, in seconds.
_MEETING_SECONDS = 60.0
# The rank that says why a run ends is left this long to do so, in seconds; torchrun ends the others then.
_LAST_WORDS_SECONDS = 5.0
# A step that takes this many times the mean of those before it is a stall, where that is longer than the time-out.
_STEPS_OF_A_STALL = 4
# How long a rank that is busy may come no further in what is no step, in seconds: data are read, or made on first use;
# a model is built and its first step compiles, for minutes on a CPU; the first rank saves or validates; it measures
# what has been trained, after which nothing is lost.
_LONGEST_PHASES = {"opening": 3600.0, "starting": 900.0, "alone": 3600.0, "measuring": 86400.0}
_FAILED = "failed"
_RESUME = "what was saved before is there, go on with --resume"


class RankLost(RuntimeError):
    """Another rank ended or lost its connection."""


class Ranks:
    """One rank's view of all of them; a process that torchrun has not started is the only one.

    Attributes:
        rank: of this process.
        size: number of ranks.
        step: batches that this rank has read, of the run that it is in.
        phase: "training" from the end of its first step on, "ended", or one of those that may take long.
        timeout_seconds: after which a rank that stalls ends the run.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.step, self.phase = 0, "opening"
        self.timeout_seconds = TrainConfig.rank_timeout_seconds
        self._watch: Watch | None = None

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

    def from_first(self, make: Callable[[], T], phase: str = "alone") -> T:
        """What `make` returns on the first rank, on every rank; it runs there alone while the others wait."""
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        if self.first:
            with self.alone(phase):
                made = [make()]

        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]

    @contextlib.contextmanager
    def alone(self, phase: str = "alone") -> Iterator[None]:
        """While the first rank does what others wait for."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def copy_from_first(self, model: torch.nn.Module) -> None:
        """Parameters and buffers of the first rank, on every rank."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def watch(self) -> None:
        """From now on a rank that stalls ends the job."""
        self._watch = Watch(self)
        self._watch.start()

    def begin(self, timeout_seconds: float) -> None:
        """A run begins, maybe not the first."""
        self.phase, self.timeout_seconds = "opening", timeout_seconds
        self.step = 0

    def fails_first(self) -> bool:
        """Whether no other rank has failed before this one, which then says why."""
        if self.store is None or self.store.add(_FAILED, 1) == 1:
            if self._watch is not None:
                self._watch.ended.set()
            return True
        return False

    def end(self, store: dist.Store) -> None:
        """The run is over for this rank."""
        if self._watch is not None:
            self._watch.ended.set()
            self._watch.join()
        self.phase = "ended"
        self.publish(store, 0, 0.0)

    def publish(self, store: dist.Store, beat: int, idle_seconds: float) -> None:
        """Tells the other ranks how far this one is."""
        state = (beat, self.step, self.phase, 0, idle_seconds)
        store.set(f"rank-{self.rank}", " ".join(map(str, state)))


class _State(NamedTuple):
    """What a rank tells the others: how often it has, where it is, and since when it does nothing."""

    beat: int
    step: int
    phase: str
    collectives: int
    idle_seconds: float

    @classmethod
    def read(cls, told: bytes) -> _State:
        beat, step, phase, collectives, idle_seconds = told.decode().split()
        return cls(int(beat), int(step), phase, int(collectives), float(idle_seconds))


class Watch(threading.Thread):
    """Looks whether the next rank lives and goes on, and ends this process where it does not.

    Every rank looks at the next one, so that the work does not grow with their number. Ranks call the same collectives
    in the same order, so those that have begun the fewest are the ones that the others wait for. They have stalled when
    they are not heard of, or do nothing, for the time-out. Where they are busy but come no further, they have stalled
    after several times what a step takes, if that is longer, or after what `_LONGEST_PHASES` leaves a phase of theirs
    or of the first; while no step has been seen whole, after that of "starting".

    Args:
        ranks: of this process.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(name="watch", daemon=True)
        self.ranks = ranks
        self.next = (ranks.rank + 1) % ranks.size
        self.ended = threading.Event()
        self.looks = 0

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(1.0, self.ranks.timeout_seconds / 10)

    def run(self) -> None:
        """Until the process ends."""
        threading.Thread(target=self._watch_the_store, name="watch of the watch", daemon=True).start()
        try:
            # A store of its own: one that a thread waits for another cannot use.
            store = _meet()
            beat, idle_seconds, seen, activity = 0, 0.0, _Seen(), Activity()
            while not self.ended.wait(self.interval):
                beat += 1
                self.looks = beat
                idle_seconds = 0.0 if activity.look(self.interval) else idle_seconds + self.interval
                self.ranks.publish(store, beat, idle_seconds)
                if store.check([_FAILED]):
                    self.ended.set()
                    _leave()
                message = self._look(store, seen)
                if message is not None:
                    self._end(message)
        except (RuntimeError, ValueError) as error:
            if not self.ended.is_set():
                self._end(f"the store of torchrun does not answer ({_first_sentence(error)})")

    def _watch_the_store(self) -> None:
        """Ends this process where a look takes too long: a machine that stands still does not close its connections."""
        looks, seconds = self.looks, 0.0
        while not self.ended.wait(self.interval):
            seconds = 0.0 if self.looks != looks else seconds + self.interval
            looks = self.looks
            if seconds > max(self.ranks.timeout_seconds, _MEETING_SECONDS if looks == 0 else 0.0):
                # Each rank for itself, as they cannot agree on who says it.
                self._leave_with(f"the store of torchrun has not answered rank {self.ranks.rank} for {seconds:.0f} s")

    def _look(self, store: dist.Store, seen: _Seen) -> str | None:
        """What is wrong with the next rank, or those that it waits for; None where nothing is."""
        state, first = self._states(store, [self.next, 0])
        seen.note(state, max(state.phase, first.phase, key=_longest), self.interval)
        if state.phase == "ended":
            return None
        timeout, step_seconds = self.ranks.timeout_seconds, seen.mean_step_seconds()
        if seen.silent_seconds > timeout:
            return f"rank {self.next} has not been heard of for {timeout:g} s"
        # A few looks later, as a rank that is not heard of keeps the others from going on too.
        late = 3 * self.interval
        steps = _LONGEST_PHASES["starting"] if step_seconds is None else _STEPS_OF_A_STALL * step_seconds
        longest = _longest(seen.phase) or max(timeout, steps)
        if state.idle_seconds > timeout + late or seen.still_seconds > longest + late:
            states = self._states(store, range(self.ranks.size))
            fewest = min(state.collectives for state in states)
            behind = {rank: state for rank, state in enumerate(states) if state.collectives == fewest}
            names, step = ", ".join(map(str, behind)), min(state.step for state in behind.values())
            if all(state.idle_seconds > timeout for state in behind.values()):
                return f"rank {names} has done nothing for {timeout:g} s, at step {step}"
            if seen.still_seconds > longest + late:
                return f"rank {names} came no further than step {step} for {longest:.0f} s"
        return None

    @staticmethod
    def _states(store: dist.Store, ranks: Iterable[int]) -> list[_State]:
        return [_State.read(told) for told in store.multi_get([f"rank-{rank}" for rank in ranks])]

    def _end(self, message: str) -> None:
        if self.ranks.fails_first():
            self._leave_with(message)
        self.ended.set()
        _leave()

    @staticmethod
    def _leave_with(message: str) -> None:
        # On a line of its own, below a progress bar.
        print(f"\nerror: {message}; {_RESUME}", file=sys.__stderr__, flush=True)  # noqa: T201
        os._exit(1)


class _Seen:
    """What a watch has seen of another rank, counted in its own looks: a process that was stopped itself sees none."""

    def __init__(self) -> None:
        self.beat = self.step = -1
        self.phase = "opening"
        self.silent_seconds = self.still_seconds = 0.0
        self.steps, self.seconds, self.whole = 0, 0.0, False

    def note(self, state: _State, phase: str, seconds: float) -> None:
        """A look, `seconds` after the one before; `phase` is the rank's or the first's, whichever may take longer."""
        beat, step = state.beat, state.step
        self.silent_seconds = 0.0 if beat != self.beat else self.silent_seconds + seconds
        self.still_seconds += seconds
        if phase in ("opening", "starting"):
            self.steps, self.seconds = 0, 0.0
        if (step, phase) != (self.step, self.phase):
            training = phase == self.phase == "training"
            if training and self.whole:
                self.steps += step - self.step
                self.seconds += self.still_seconds
            # A step after another phase may have begun long before.
            self.whole = training
            self.still_seconds = 0.0
        self.beat, self.step, self.phase = beat, step, phase

    def mean_step_seconds(self) -> float | None:
        """What a step takes; None before one has been seen from its beginning to its end."""
        return self.seconds / self.steps if self.steps > 0 else None


def _longest(phase: str) -> float:
    """Seconds that a phase may take; zero where it is that of steps."""
    return _LONGEST_PHASES.get(phase, 0.0)


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks of the job that torchrun has started, until they part; one rank where it has not.

    The first rank alone prints. Where ranks fail, the first to do so says why, and the others leave without a word.

    Raises:
        RankLost: the connection to another rank broke.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    store = _meet()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), store)
    ranks.publish(store, 0, 0.0)
    dist.init_process_group("cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo", timeout=_LONGEST_WAIT)
    ranks.watch()
    _explain_termination(ranks)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.first:
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield ranks
            # The others wait here for what the first does last.
            ranks.from_first(lambda: None)
    except SystemExit:
        raise
    except BaseException as error:
        if not ranks.fails_first():
            _leave()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise RankLost(
                f"another rank ended or lost its connection ({_first_sentence(error)}); {_RESUME}"
            ) from error
        raise
    ranks.end(store)
    dist.destroy_process_group()


def _explain_termination(ranks: Ranks) -> None:
    """Torchrun ends the other ranks, too, where one was killed; the first of them says so before it goes."""
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != process:
            # A process that reads batches, forked from this one.
            os._exit(128 + number)
        # Where another rank has failed or this one has, that is said, and the watch ends this process.
        with contextlib.suppress(RuntimeError):
            if not ranks.fails_first():
                return
        message = f"rank {ranks.rank} was ended by SIGTERM, as torchrun does where another rank ended; {_RESUME}"
        print(f"\nerror: {message}", file=sys.__stderr__, flush=True)  # noqa: T201
        os._exit(128 + number)

    # Only the main thread may, and only there do commands run.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def _meet() -> dist.Store:
    """A connection to the store that all ranks share."""
    store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=_MEETING_SECONDS)))
    return dist.PrefixStore("unicode_fast", store)


def _leave() -> None:
    """Ends this process without a word, after another one has had time for the last."""
    time.sleep(_LAST_WORDS_SECONDS)
    os._exit(1)


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
