"""Units shared among processes, one a device; each writes a file of its own."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from ..cases import Record
from .sweep_folder import append_unit, part_path
from .units import Failure, Unit


class Runner(Protocol):
    """Runs units, such as `UnitRunner`."""

    def run(self, unit: Unit) -> Sequence[Record | Failure]:
        """One result for each cell, or one failure of the whole unit."""
        ...


# Given a device's name, loads what is needed there. Sent to other processes, so a module's function or a partial of it.
Prepare = Callable[[str], Runner]


@dataclass(frozen=True)
class Finished:
    """A unit that has been run and written, and what failed in it."""

    unit: Unit
    seconds: float
    failures: tuple[Failure, ...]


Progress = Callable[[Finished], None]


def run_units(
    prepare: Prepare, devices: Sequence[str], units: Sequence[Unit], folder: Path, progress: Progress
) -> list[Unit]:
    """Runs all units and writes their results to the parts of `folder`.

    With one device in this process; with several in a process for each, which is given the next unit of the list when
    it is done with one. So a unit may run in another process, with the same results.

    Returns:
        Units that were lost with a process that died; the other processes went on.
    Raises:
        ValueError: a process could not load its model, or could not write; the others are stopped.
    """
    if len(devices) == 1:
        runner = prepare(devices[0])
        for unit in units:
            progress(_finish(runner, unit, part_path(folder, 0)))
        return []
    return _Pool(prepare, devices, folder).run(units, progress)


def _finish(runner: Runner, unit: Unit, path: Path) -> Finished:
    start = time.perf_counter()
    results = runner.run(unit)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise EOFError("the parent is gone: the process in its place runs the unit again, and may write this file")
    append_unit(path, results)
    failures = tuple(one for one in results if isinstance(one, Failure))
    return Finished(unit, time.perf_counter() - start, failures)


def _work(prepare: Prepare, device: str, path: Path, pipe: Connection) -> None:
    """A process: says that it is ready, then replies to every unit with its outcome, until it is sent None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then ends this process
    try:
        runner = prepare(device)
        pipe.send(None)
        while (unit := pipe.recv()) is not None:
            pipe.send(_finish(runner, unit, path))
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except Exception as error:
        pipe.send(f"{device}: {error}" if isinstance(error, (ValueError, OSError)) else f"{device}: {error!r}")


class _Pool:
    """Processes and the pipes to them; pipes and not queues, since no lock is left behind by a process that dies."""

    def __init__(self, prepare: Prepare, devices: Sequence[str], folder: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process can use neither CUDA nor torch's threads
        self.busy: dict[Connection, Unit | None] = {}
        self.processes: list[Any] = []
        for number, device in enumerate(devices):
            ends: tuple[Any, Any] = context.Pipe()
            ours, theirs = ends
            arguments = prepare, device, part_path(folder, number), theirs
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.busy[ours] = None  # loading

    def run(self, units: Sequence[Unit], progress: Progress) -> list[Unit]:
        waiting, lost = deque(units), []
        try:
            while self.busy:
                for pipe in wait(list(self.busy)):
                    assert isinstance(pipe, Connection)
                    if not self._hear(pipe, progress):
                        unit = self.busy.pop(pipe)
                        lost += [] if unit is None else [unit]
                    elif waiting:
                        self._send(pipe, waiting.popleft())
                    else:
                        self._send(pipe, None)
                        del self.busy[pipe]
            for process in self.processes:
                process.join()
        finally:
            for process in self.processes:
                process.terminate()
        return lost + list(waiting)

    def _hear(self, pipe: Connection, progress: Progress) -> bool:
        """Takes a message; False if the process is gone."""
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):
            return False
        if isinstance(message, str):
            raise ValueError(message)
        if message is not None:
            progress(message)
        return True

    def _send(self, pipe: Connection, unit: Unit | None) -> None:
        self.busy[pipe] = unit
        try:
            pipe.send(unit)
        except (BrokenPipeError, ConnectionResetError):
            return  # heard of as its end when the pipe is waited for
