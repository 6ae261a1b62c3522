"""The steps of a random life of a `World`."""

from __future__ import annotations

from random import Random
from typing import Any

from ..serving import StorePolicy
from .soak_world import AGENTS, FAULTS, HINTS, World


def random_step(world: World, random: Random) -> str:
    """Does one thing, more often what a server does in peace; returns its name."""
    name = random.choices(STEPS, WEIGHTS)[0]
    if name == "submit":
        options: dict[str, Any] = {"client": random.choice(["", "", "x", "y"]), "priority": random.random()}
        if random.random() < 0.2:
            options |= {"timeout_s": random.choice([0.5, 3.0]), "expected_tokens": 2}
            options |= {"store_policy": StorePolicy.DISCARD}
        suffix = [random.randrange(3) for _ in range(random.randrange(7))]
        world.submit(suffix, random.choice([*AGENTS, None]), random.randrange(60), options)
    elif name == "work":
        if world.out is None:
            world.begin(random.choice([1, 1, 3]))
        world.finish(random.randrange(2**32), random.choice([""] * 12 + ["item", "batch", "payload"]))
    elif name == "begin":
        if world.out is None:
            world.begin()
    elif name == "time":
        world.time_passes(random.choice([0.0, 0.02, 0.02, 0.1, 0.1, 1.0, 5.0]))
    elif name == "jump":
        world.time_passes(random.choice([-3.0, 100.0]))
    elif name == "wait":
        world.wait()
    elif name == "cancel":
        world.cancel(random.randrange(8))
    elif name == "hint":
        world.hint(random.randrange(len(HINTS)), random.choice(["", "x", "y"]))
    elif name == "fault":
        world.fault(random.randrange(len(FAULTS)))
    elif name == "damage":
        world.damage(random.randrange(8), random.choice(["flip", "cut", "remove"]))
    elif name == "room":
        world.make_room(random.choice([0.3, 1.0]))
    elif name == "graph":
        world.add_workflow(random.choice(["ring", "tree"]))
    else:
        world.register(random.choice(AGENTS))
    return name


STEPS = (
    "submit", "work", "begin", "time", "jump", "wait", "cancel", "hint", "fault", "damage", "room", "graph", "register"
)  # fmt: skip
WEIGHTS = (20, 40, 6, 25, 0.5, 10, 4, 4, 2, 2, 2, 1, 1)
