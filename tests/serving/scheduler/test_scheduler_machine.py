"""Tree, tiers, prefetch and scheduler together under random steps and faults; after each, everything is counted anew.

The same world is driven by hypothesis, which shrinks what fails, and by `tenure soak`, whose steps are cheaper.
`TENURE_SOAK_STEPS` asks for a longer run than the one of continuous integration.
"""

from __future__ import annotations

import logging
import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tenure.scripts.soak import run_soak
from tenure.scripts.soak.world import AGENTS, BELOW, FAULTS, HINTS, SYSTEMS, World
from tenure.serving import StorePolicy

STEPS = int(os.environ.get("TENURE_SOAK_STEPS", "50000"))  # that do not shrink; those that do are a tenth of it
STEPS_EACH = 50  # of hypothesis, at most: many examples are shorter


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "tenure.serving")  # faults are planned here


class SchedulerMachine(RuleBasedStateMachine):
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    @initialize(
        name=st.sampled_from(SYSTEMS), below=st.sampled_from(BELOW), compressed=st.booleans(), pages=st.booleans()
    )
    def begin(self, name, below, compressed, pages):
        self.world = World(name, below, self.folder.name, compressed, pages)

    @rule(
        suffix=st.lists(st.integers(0, 2), max_size=6),
        agent=st.none() | st.sampled_from(AGENTS),
        number=st.integers(0, 59),
        client=st.sampled_from(["", "x", "y"]),
        timeout_s=st.none() | st.sampled_from([0.5, 3.0]),
        keep=st.sampled_from(StorePolicy),
    )
    def submit(self, suffix, agent, number, client, timeout_s, keep):
        self.world.submit(suffix, agent, number, {"client": client, "timeout_s": timeout_s, "store_policy": keep})

    @precondition(lambda self: self.world.out is None)
    @rule(max_steps=st.sampled_from([1, 1, 3]))
    def next_batch(self, max_steps):
        self.world.begin(max_steps)

    @precondition(lambda self: self.world.out is not None)
    @rule(seed=st.integers(0, 2**16), fails=st.sampled_from(["", "", "", "", "item", "batch", "payload"]))
    def complete(self, seed, fails):
        self.world.finish(seed, fails)

    @rule(seconds=st.sampled_from([0.02, 0.1, 0.5, 5.0, 100.0, -3.0]))
    def time_passes(self, seconds):
        self.world.time_passes(seconds)

    @rule()
    def wait(self):
        self.world.wait()

    @rule(choice=st.integers(0, 8))
    def cancel(self, choice):
        self.world.cancel(choice)

    @rule(choice=st.integers(0, len(HINTS) - 1), client=st.sampled_from(["", "x", "y"]))
    def hint(self, choice, client):
        self.world.hint(choice, client)

    @rule(choice=st.integers(0, len(FAULTS) - 1))
    def fault(self, choice):
        self.world.fault(choice)

    @rule(choice=st.integers(0, 8), how=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, choice, how):
        self.world.damage(choice, how)

    @rule(share=st.sampled_from([0.3, 1.0]))
    def make_room(self, share):
        self.world.make_room(share)

    @rule(name=st.sampled_from(["ring", "tree"]))
    def graph(self, name):
        self.world.add_workflow(name)

    @rule(agent=st.sampled_from(AGENTS))
    def register(self, agent):
        self.world.register(agent)

    @invariant()
    def everything_is_counted(self):
        type(self).steps += 1
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.end()
        self.folder.cleanup()


def test_random_steps_that_shrink():
    machine = type("Machine", (SchedulerMachine,), {"steps": 0})
    run(
        machine,
        settings=settings(
            max_examples=max(1, STEPS // 10 // STEPS_EACH),
            stateful_step_count=STEPS_EACH,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
    assert machine.steps >= STEPS // 20


@pytest.mark.timeout(900)  # one run, as some counters move once in ten thousand steps
def test_many_random_steps():
    """Every counter must have moved: what never happens is not tested."""
    counts = run_soak.worlds(STEPS, seed=1)
    still = [name for name, value in counts.items() if not value]
    rare = {"stores_refused", "tiers: refused", "prefetch: over_budget", "length", "predictions_failed"}
    assert set(still) <= rare, still
    ends = ("answered", "length", "failed", "timed out", "cancelled", "refused")
    assert counts["submitted"] == sum(counts.get(name, 0) for name in ends)


def test_the_command_counts_and_writes(tmp_path, capsys):
    target = tmp_path / "soak.json"
    assert run_soak.main(run_soak.SoakConfig(steps=300, seconds=0, json=target)) == 0
    assert "steps" in capsys.readouterr().out and '"steps": 300' in target.read_text()
    with pytest.raises(ValueError, match="got --steps -1"):
        run_soak.SoakConfig(steps=-1)
