"""Simulation set-ups from YAML: a machine, the workload of each cell of a table, policies, and a paper's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tenure.checked import Count, NotNegative, NumbersToo, Positive, Range, read
from tenure.documents import load_yaml, parse_yaml

from ..prefetch import PrefetchConfig
from ..scheduler.scheduler_config import SchedulerConfig
from ..system import system_names
from .cost_model import Links, RooflineCosts, get_card, get_model_spec
from .simulator import MAX_COPY_PARTS, SimulatedMachine
from .workload import WorkloadConfig

MAX_TOKENS = 1e12  # of a pool
Gigabytes = Annotated[float, Range(0, 1e6)]
DEFAULT_POLICIES = ("lru", "lru_reactive", "lru_prefetch", "ste", "ste_prefetch", "expected_time")


@dataclass(frozen=True)
class SimulationCell:
    """One cell of a set-up: a workload on a machine.

    Attributes:
        paper: speed-ups that a paper reports, by baseline.
        paper_policy: the policy of this package that corresponds to the paper's.
        why: explains differences from the paper, as text.
    """

    name: str
    machine: SimulatedMachine
    workload: WorkloadConfig
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_policy: str = "ste_prefetch"
    why: str = ""


@dataclass(frozen=True)
class SimulationSetup:
    """The runs of one `tenure simulate`.

    Attributes:
        title, source: printed above the tables.
        policies: names of systems. baselines: of these, the ones that the others are compared with.
        repeats: number of seeds: `seed`, `seed` + 1, ...

    Raises:
        ValueError: an unknown policy, a baseline that is not among the policies, or no cells or repeats.
    """

    name: str
    title: str
    source: str
    cells: tuple[SimulationCell, ...]
    policies: tuple[str, ...] = DEFAULT_POLICIES
    baselines: tuple[str, ...] = ("lru", "lru_reactive")
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*self.policies, *self.baselines):
            if name not in system_names():
                raise ValueError(f"unknown policy {name!r:.60}; known: {', '.join(system_names())}")
        missing = [name for name in self.baselines if name not in self.policies]
        if missing:
            raise ValueError(f"the baseline {missing[0]!r:.60} is not among the policies {', '.join(self.policies)}")
        if not self.cells or self.repeats < 1:
            raise ValueError(f"got {len(self.cells)} cells and {self.repeats} repeats; accepted: 1 or more of both")

    def with_policies(self, names: tuple[str, ...]) -> SimulationSetup:
        """A copy with these policies and the baselines only."""
        chosen = tuple(dict.fromkeys((*self.baselines, *names)))
        return replace(self, policies=chosen)


@dataclass(frozen=True)
class MachineFields:
    """A machine as a set-up has it: a card and a model of `cost_model`, and sizes in GB (10^9 bytes).

    Attributes:
        card_share: of the card's memory, for weights and KV; the KV's part is `pool_tokens` where that is given.
        host_copy_gb_s: bytes are gathered in host memory at that rate before they cross the link, so the two times add
            up; None: they are not.
        copy_parts: of a node; None: it is copied layer by layer.
    """

    card: str = "h100"
    model: str = "llama-3.1-8b"
    card_share: Annotated[float, Range(0, 1, above=True)] = 0.88
    pool_tokens: Annotated[float, Range(0, MAX_TOKENS)] | None = None
    host_gb: Gigabytes = 0
    disk_gb: Gigabytes = 0
    link_gb_s: NotNegative = 0
    disk_gb_s: NotNegative = 0
    host_copy_gb_s: Positive | None = None
    latency_s: NotNegative = 0.0
    compute_share: float = RooflineCosts.compute_share
    memory_share: float = RooflineCosts.memory_share
    overhead_s: float = RooflineCosts.overhead_s
    page_size: Count = SimulatedMachine.page_size
    copy_parts: Annotated[int, Range(1, MAX_COPY_PARTS)] | None = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    prefetch: PrefetchConfig | None = None

    def machine(self) -> SimulatedMachine:
        """The machine.

        Raises:
            ValueError: an unknown card or model, or one that does not fit in the other.
        """
        link = self.link_gb_s
        if link > 0:
            link = 1 / (1 / link + 1 / (self.host_copy_gb_s or math.inf))
        links = Links(1e9 * link, 1e9 * self.disk_gb_s, self.latency_s)
        shape = get_model_spec(self.model)
        costs = RooflineCosts(get_card(self.card), shape, links, self.compute_share, self.memory_share, self.overhead_s)
        rate = shape.kv_bytes_per_token
        device = costs.pool_bytes(self.card_share) if self.pool_tokens is None else self.pool_tokens * rate
        return SimulatedMachine(
            costs,
            links,
            int(device),
            int(1e9 * self.host_gb),
            int(1e9 * self.disk_gb),
            rate,
            self.page_size,
            self.copy_parts or shape.layers,
            self.scheduler,
            self.prefetch,
        )


@dataclass(frozen=True)
class CellFields:
    """A cell as a set-up has it, on top of the set-up's own machine and workload."""

    name: Annotated[str, NumbersToo()] | float = ""
    machine: Mapping[str, Any] | None = None
    workload: Mapping[str, Any] | None = None
    paper: Mapping[str, Positive] = field(default_factory=dict)
    paper_policy: str = SimulationCell.paper_policy
    why: str = SimulationCell.why


@dataclass(frozen=True)
class SetupFields:
    """A set-up as its file has it; without cells, it is one itself."""

    title: str | None = None
    source: str = ""
    machine: Mapping[str, Any] | None = None
    workload: Mapping[str, Any] | None = None
    cells: tuple[CellFields, ...] | None = None
    policies: tuple[str, ...] = DEFAULT_POLICIES
    baselines: tuple[str, ...] = SimulationSetup.baselines
    repeats: Count = SimulationSetup.repeats
    seed: int = SimulationSetup.seed


def load_setup(path: str | Path, changes: Sequence[str] = ()) -> SimulationSetup:
    """Reads a set-up; docs/reference/config.md has the format.

    Args:
        changes: settings as `machine.link_gb_s=4` that replace those of the set-up and of all its cells.

    Raises:
        ImportError: PyYAML is missing; the message names the extra.
        ValueError: unknown names or wrong values; the message has the file's name.
    """
    given = load_yaml(path, extra="simulate")
    try:
        return read_setup(given, Path(path).stem, _parsed(changes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parsed(changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The values of changes by section and key."""
    found: dict[str, dict[str, Any]] = {"machine": {}, "workload": {}}
    for change in changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        if section not in found or not key or not value:
            raise ValueError(f"got the change {change!r:.60}; accepted: machine.KEY=VALUE or workload.KEY=VALUE")
        found[section][key] = parse_yaml(value, f"the change {change!r:.60}", "simulate")
    return found


def read_setup(given: Any, name: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> SimulationSetup:
    """A set-up from parsed YAML.

    Args:
        name: of the set-up, e.g. the file's stem.
        changes: by "machine" and "workload", fields that replace those of the set-up and of all its cells.

    Raises:
        ValueError: unknown names or wrong values.
    """
    setup = read(SetupFields, given)
    cells = []
    for number, cell in enumerate(setup.cells or [CellFields(name)]):
        parts = {
            part: {**(getattr(setup, part) or {}), **(getattr(cell, part) or {}), **(changes or {}).get(part, {})}
            for part in ("machine", "workload")
        }
        try:
            found = read(_CellParts, parts)
            machine = found.machine.machine()
        except ValueError as error:
            raise ValueError(f"cells[{number}]: {error}" if setup.cells else str(error)) from None
        more = (cell.paper, cell.paper_policy, cell.why)
        cells.append(SimulationCell(str(cell.name), machine, found.workload, *more))
    title = name if setup.title is None else setup.title
    runs = (setup.policies, setup.baselines, setup.repeats, setup.seed)
    return SimulationSetup(name, title, setup.source, tuple(cells), *runs)


@dataclass(frozen=True)
class _CellParts:
    """A cell's machine and workload, with what the set-up has for all cells."""

    machine: MachineFields
    workload: WorkloadConfig


def read_machine(given: Mapping[str, Any]) -> SimulatedMachine:
    """A machine from parsed YAML, see `MachineFields`.

    Raises:
        ValueError: unknown names or wrong values.
    """
    return read(MachineFields, given).machine()
