"""`tenure soak fuzz`: hostile variants of every file and text that is read; each is refused in a sentence, or right."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, write_json

if TYPE_CHECKING:
    from .reader import Reader

MAX_MESSAGE = 1200  # characters of one sentence, without the path of the file


@dataclass
class FuzzConfig:
    """Try every reader of files, bodies and texts with hostile variants of valid ones.

    Each variant is refused with one sentence, or what was read can be used. A traceback, a message of many lines or
    thousands of characters, more CPU time or memory than the limits, and an accepted value that fails later are
    reported with the seed that makes the variant again.
    """

    attempts: int = 1_000_000
    """Variants to try."""
    seed: int = 0
    """Variant number N of seed S is the same in every run."""
    reader: str | None = None
    """Only readers with this text in their names."""
    only: int | None = None
    """Repeat a single attempt, with its traceback."""
    seconds: float = 10.0
    """CPU time of one attempt."""
    memory_gb: float = 1.0
    """Memory of all attempts, in addition to what is used before the first."""
    json: OutputFile | None = None
    """Also write the counts to this file."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.seconds > 0 or not self.memory_gb > 0:
            raise ValueError("--attempts, --seconds and --memory-gb take numbers above 0")


class OverTimeError(BaseException):
    """The CPU time of an attempt is over; no Exception, so that no reader takes it for one of its own."""


@dataclass
class Outcomes:
    """Numbers of attempts by reader and outcome, and the first failures of every kind."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(number for (_, outcome), number in self.counts.items() if outcome not in ("refused", "accepted"))

    def rows(self) -> dict[str, dict[str, int]]:
        """Counts by reader."""
        found: dict[str, dict[str, int]] = {}
        for (name, outcome), number in sorted(self.counts.items()):
            found.setdefault(name, {})[outcome] = number
        return found


def main(config: FuzzConfig) -> int:
    begun = time.monotonic()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files are written at every attempt
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        outcomes = fuzz(Path(folder), config)
    rows = outcomes.rows()
    for name, counts in rows.items():
        print(f"{name}: {', '.join(f'{number} {outcome}' for outcome, number in counts.items())}")
    for where, what in outcomes.failures.items():
        print(f"\n{where}\n{what}")
    total = sum(outcomes.counts.values())
    print(f"{total} variants, {outcomes.failed} failures, {time.monotonic() - begun:.0f} s")
    if config.json:
        write_json({"attempts": total, "failures": outcomes.failed, "seed": config.seed, "readers": rows}, config.json)
    return 1 if outcomes.failed else 0


def fuzz(folder: Path, config: FuzzConfig) -> Outcomes:
    """Runs the attempts in this process; limits of memory stay set."""
    from .untrusted_readers import all_readers

    outcomes, begun = Outcomes(), time.monotonic()
    (folder / "made").mkdir()
    with all_readers(folder / "made") as readers:
        chosen = [one for one in readers if config.reader is None or config.reader in one.name]
        if not chosen:
            raise ValueError(
                f"no reader has {config.reader!r} in its name; known: {', '.join(r.name for r in readers)}"
            )
        for reader in chosen:  # also imports what is needed before the limit is set
            own = folder / "work" / reader.name
            own.mkdir(parents=True)
            for name, content in reader.files.items():
                (own / name).write_bytes(content)
            reader.read(own)
        numbers: Sequence[int] = range(config.attempts) if config.only is None else [config.only]
        with limited(config.memory_gb), time_limit_handler():
            for done, number in enumerate(numbers):
                attempt(Random(f"{config.seed}/{number}"), number, chosen, folder / "work", config, outcomes)
                if done and done % 10_000 == 0:
                    print(f"{done} variants, {outcomes.failed} failures, {time.monotonic() - begun:.0f} s",
                          file=sys.stderr, flush=True)  # fmt: skip
    return outcomes


def attempt(
    random: Random, number: int, readers: Sequence[Reader], folder: Path, config: FuzzConfig, outcomes: Outcomes
) -> None:
    """One variant of one reader's input."""
    from .mutations import mutated

    reader = random.choices(readers, [one.share for one in readers])[0]
    folder = folder / reader.name
    name = random.choice(list(reader.files))
    (folder / name).write_bytes(mutated(random, name, reader.files[name]))
    if reader.seal is not None and random.random() < 0.7:
        with suppress(Exception):
            reader.seal(folder)
    outcome, error = outcome_of(reader, folder, config.seconds)
    for each, content in reader.files.items():
        if each == name or reader.seal is not None:
            (folder / each).write_bytes(content)
    outcomes.counts[reader.name, outcome] += 1
    if outcome not in ("refused", "accepted"):
        again = f"tenure soak fuzz --seed {config.seed} --only {number}"
        again += f" --reader '{config.reader}'" if config.reader else ""
        place = traceback.extract_tb(error.__traceback__)[-1:] if error else []
        kind = f"{reader.name}: {outcome}{''.join(f' in {Path(at.filename).name}:{at.lineno}' for at in place)}"
        if kind not in outcomes.failures:
            shown = (
                "".join(traceback.format_exception(error)) if error and config.only is not None else f"{error!s:.600}"
            )
            outcomes.failures[kind] = f"{again}\n{shown}"
            print(f"{kind}\n{again}", file=sys.stderr, flush=True)  # a long run may be ended before its summary


def outcome_of(reader: Reader, folder: Path, seconds: float) -> tuple[str, BaseException | None]:
    """The outcome of one attempt in words, "refused" and "accepted" being right, and the error."""
    from ...serving.kvcache.base import LostPayloadError
    from .reader import WrongResult

    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reader.read(folder)
    except (ValueError, LostPayloadError) as error:
        return ("refused" if is_sentence(str(error), folder) else "refused at length"), error
    except WrongResult as error:
        return f"accepted, but {error}", error
    except OverTimeError as error:
        return "over the time", error
    except MemoryError as error:
        return "over the memory", error
    except Exception as error:
        return type(error).__name__, error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted", None


def is_sentence(message: str, folder: Path) -> bool:
    """Whether a message can be shown to a user as it is: a line of bounded length without control characters."""
    shown = message.replace(str(folder), "")
    return 0 < len(shown) <= MAX_MESSAGE and all(one.isprintable() for one in shown)


@contextmanager
def limited(memory_gb: float) -> Iterator[None]:
    """Limits this process's memory to that much more than it has now."""
    used = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmSize"))  # fmt: skip
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(memory_gb * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def time_limit_handler() -> Iterator[None]:
    """Within the block the timer of an attempt raises OverTimeError."""

    def over(number: int, frame: Any) -> None:
        raise OverTimeError("the limit of CPU time is reached")

    before = signal.signal(signal.SIGPROF, over)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
