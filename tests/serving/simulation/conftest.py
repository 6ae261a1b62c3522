"""Small machines and workloads: a call takes a tenth of a second, a prompt is 64 tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tenure.serving import SchedulerConfig
from tenure.serving.simulation.cost_model import FittedCosts, Links
from tenure.serving.simulation.simulator import SimulatedMachine
from tenure.serving.simulation.workload import Distribution, WorkloadConfig

FIXED, DYNAMIC, OUTPUT, RATE = 64, 16, 16, 1000


@dataclass(frozen=True)
class Small:
    """What the tests build."""

    machine: Callable[..., SimulatedMachine]
    workload: Callable[..., WorkloadConfig]
    fixed: int = FIXED
    rate: int = RATE


@pytest.fixture
def small() -> Small:
    def machine(prompts: float, host: int = 1000, bytes_per_s: float = 1e6, running: int = 1) -> SimulatedMachine:
        """Room for so many fixed prompts, and one request beside them."""
        links = Links(bytes_per_s)
        room = int((prompts * FIXED + DYNAMIC + OUTPUT) * RATE)
        scheduler = SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=256)
        return SimulatedMachine(
            FittedCosts(0.005, 1e-3, 0.0, 0.0, links), links, room, host * FIXED * RATE, 0, RATE, scheduler=scheduler
        )

    def workload(**values) -> WorkloadConfig:
        sizes = {"fixed_tokens": FIXED, "dynamic_tokens": DYNAMIC, "output_tokens": OUTPUT}
        spreads = {name: values.pop(name, Distribution(size)) for name, size in sizes.items()}
        return WorkloadConfig(**{"agents": 10, "rounds": 12, **values}, **spreads)

    return Small(machine, workload)
