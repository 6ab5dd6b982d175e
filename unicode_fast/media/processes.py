"""Work on numbered items in processes of their own: one that dies costs its item, and ends with its parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import torch

# Seconds between two looks at the parent, and between two calls of `tick`.
_LOOK_S = 0.5
# Another process may have taken the memory when an item's process died first.
_TRIES = 2
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Died:
    """The result of an item whose process died twice.

    Attributes:
        status: exit status; negative for a signal.
    """

    status: int


@dataclass
class _Worker:
    process: ForkProcess
    connection: Connection
    number: int = -1


def in_processes(
    work: Callable[[int], Any],
    numbers: Sequence[int],
    workers: int,
    threads: int,
    tick: Callable[[], None] = lambda: None,
) -> Generator[tuple[int, Any], None, None]:
    """Results in the order in which they are ready.

    The processes are forked, so that `work` may hold any object. They ignore Ctrl-C, and end with this process or when
    the iterator is closed.

    Args:
        work: from a number to its result, which can be pickled.
        numbers: of the items.
        workers: most processes at once.
        threads: of torch in each process.
        tick: called about twice a second.

    Yields:
        Number and result; `Died` where the process of an item died twice.

    Raises:
        Exception: what `work` raises.
    """
    waiting = deque(numbers)
    tries = dict.fromkeys(numbers, 0)
    busy: dict[Connection, _Worker] = {}
    idle: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _start(work, threads)
                worker.number = waiting.popleft()
                tries[worker.number] += 1
                busy[worker.connection] = worker
                # A worker that has died in the meantime is found below.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    worker.connection.send(worker.number)
            ready = wait(list(busy), _LOOK_S)
            tick()
            for worker in [one for connection, one in busy.items() if connection in ready]:
                del busy[worker.connection]
                try:
                    found = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    worker.connection.close()
                    if tries[worker.number] < _TRIES:
                        waiting.append(worker.number)
                    else:
                        yield worker.number, Died(worker.process.exitcode or 0)
                    continue
                idle.append(worker)
                if isinstance(found, Exception):
                    raise found
                yield worker.number, found
    finally:
        for worker in (*busy.values(), *idle):
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def _start(work: Callable[[int], Any], threads: int) -> _Worker:
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_serve, args=(work, theirs, threads, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(work: Callable[[int], Any], connection: Connection, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # In a thread of its own: the threads of OpenMP that this process had before the fork are gone, and the thread that
    # owned them would wait for them.
    working = threading.Thread(target=_work, args=(work, connection, threads), daemon=True)
    working.start()
    while working.is_alive() and os.getppid() == parent:
        working.join(_LOOK_S)
    # At once, also in the middle of an item.
    os._exit(0)


def _work(work: Callable[[int], Any], connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number = connection.recv()
            try:
                found = work(number)
            except Exception as error:
                found = error
            connection.send(found)
