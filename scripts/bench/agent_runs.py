"""Agent workflows for `tenure bench agents` and `bench trace`: sequences of calls, and running one on a system."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ...eviction import Session
    from ...serving import RequestOutput, System, TensorPayload, WorkflowSpec
    from ...serving.kvcache.eviction_policy import Costs
    from ...serving.prompt_cache import Compression

AGENTS = 10
RING = [(f"agent{i}", f"agent{(i + 1) % AGENTS}", 1.0) for i in range(AGENTS)]
BRANCHES = [
    ("planner", "search", 0.5), ("planner", "code", 0.3), ("planner", "math", 0.2), ("search", "reader", 0.7),
    ("search", "planner", 0.3), ("reader", "writer", 1.0), ("code", "tester", 1.0), ("tester", "code", 0.4),
    ("tester", "writer", 0.6), ("math", "checker", 1.0), ("checker", "writer", 1.0), ("writer", "critic", 1.0),
    ("critic", "planner", 0.5), ("critic", "editor", 0.5), ("editor", "planner", 1.0),
]  # fmt: skip
WORKFLOWS = {"ring": RING, "branching": BRANCHES}


@dataclass(frozen=True)
class BenchCall:
    """One request: the calling agent, and the suffix after its fixed prompt."""

    agent: str
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class AgentWorkload:
    """A workflow and the calls of a run, all drawn before it.

    Attributes:
        fixed: each agent's fixed prompt.
        calls: in the order in which they come; each comes when the one before is answered.
    """

    name: str
    spec: WorkflowSpec
    fixed: Mapping[str, tuple[int, ...]]
    calls: tuple[BenchCall, ...]
    answer_tokens: int

    def prompt(self, call: BenchCall) -> tuple[int, ...]:
        return self.fixed[call.agent] + call.suffix


def make_workload(
    name: str,
    text: Sequence[int],
    rounds: int,
    fixed: int,
    suffix: int,
    answer: int,
    wrong: float,
    seed: int,
    habit: bool = False,
) -> AgentWorkload:
    """`rounds` times as many calls as there are agents.

    Args:
        name: one of `WORKFLOWS`, perhaps with the share of calls that no edge foresees behind it.
        text: token ids to take prompts from.
        fixed, suffix, answer: tokens of a fixed prompt, of what follows it, and of an answer.
        wrong: the share of calls that go to any agent instead of one that an edge names.
        habit: these go, for each agent, to always the same one, which no edge names.
    """
    from ...serving import AgentSpec, EdgeSpec, WorkflowSpec

    edges = WORKFLOWS[name]
    agents = list(dict.fromkeys(edge[0] for edge in edges))
    draws = random.Random(f"{seed}/{name}/{wrong}")
    needed = len(agents) * (fixed + rounds * suffix)
    if len(text) < needed:
        raise ValueError(f"the texts have {len(text)} tokens, {needed} are needed: fewer --rounds or shorter --fixed")
    prompts = {agent: tuple(text[i * fixed : (i + 1) * fixed]) for i, agent in enumerate(agents)}
    habits = _habits(edges, random.Random(f"{seed}/{name}/habits"))
    at, calls, agent = len(agents) * fixed, [], agents[0]
    for _ in range(rounds * len(agents)):
        calls.append(BenchCall(agent, tuple(text[at : at + suffix])))
        at += suffix
        ways = [(target, weight) for source, target, weight in edges if source == agent]
        if draws.random() < wrong:
            agent = habits[agent] if habit else draws.choice([other for other in agents if other != agent])
        else:
            agent = draws.choices([target for target, _ in ways], [weight for _, weight in ways])[0]
    spec = WorkflowSpec(name, [AgentSpec(each) for each in agents], [EdgeSpec(*edge) for edge in edges])
    title = name if not wrong else f"{name}/{wrong:.0%}_{'habit' if habit else 'wrong'}"
    return AgentWorkload(title, spec, prompts, tuple(calls), answer)


def _habits(edges: Sequence[tuple[str, str, float]], draws: random.Random) -> dict[str, str]:
    """For each agent one that it has no edge to."""
    agents, named = list(dict.fromkeys(edge[0] for edge in edges)), {edge[:2] for edge in edges}
    return {one: draws.choice([o for o in agents if o != one and (one, o) not in named]) for one in agents}


@dataclass(frozen=True)
class AgentRunSetting:
    """The system, memory and links on which a workload runs.

    Attributes:
        system: a name of `system_names()`.
        compression: of the fixed prompts, or None.
        device_bytes, host_bytes: capacities.
        host_to_device, device_to_host: bytes/s that the links are held to.
        costs: what the system believes that computing and loading take.
    """

    system: str
    compression: Compression | None
    device_bytes: int
    host_bytes: int
    host_to_device: float
    device_to_host: float
    costs: Costs


@dataclass(frozen=True)
class AgentRun:
    """Times, counts and answers of one run.

    Attributes:
        busy_s: seconds of the makespan in which the model computed; in the rest it waited.
        computed: tokens of prompts and answers that it computed.
    """

    makespan_s: float
    busy_s: float
    computed: int
    hit_rate: float
    stall_s: float
    bytes_moved: int
    bytes_wasted: int
    ttft_s: tuple[float, ...]
    answers: tuple[tuple[int, ...], ...]


def copied(payload: TensorPayload) -> TensorPayload:
    """With memory of its own."""
    tensors = {name: tensor.clone() for name, tensor in payload.tensors.items()}
    return replace(payload, tensors=tensors)


def one_run(
    session: Session,
    workload: AgentWorkload,
    setting: AgentRunSetting,
    warm: Mapping[str, TensorPayload],
    watch: Callable[[System], System] = lambda system: system,
) -> AgentRun:
    """Runs the calls one after the other on a new system whose tiers have been offered every agent's fixed prompt.

    Args:
        session: `evict(model, "full", …)`.
        warm: the KV of each agent's fixed prompt, as `setting.compression` leaves it; copied.
        watch: is given the system before anything happens on it; what it returns is used, e.g. one that records.

    Raises:
        RuntimeError: a call was not answered.
    """
    from ...serving import AllocStatus, MemoryPool, Request, StorePolicy, ThreadedTransfer, Tier, build_system
    from ...serving.engine import Engine
    from ...serving.prompt_cache import PromptKV
    from ...serving.simulation.results import TransferSnapshot

    down, up = (Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE)
    place = session.model.device
    device = MemoryPool(setting.device_bytes, place)
    host = MemoryPool(setting.host_bytes, pinned=place.type == "cuda")
    system = build_system(
        setting.system,
        {Tier.DEVICE: device, Tier.HOST: host},
        ThreadedTransfer({down: setting.device_to_host, up: setting.host_to_device}),
        costs=setting.costs,
        bytes_per_token=PromptKV(session).bytes_per_token(),
        clock=time.monotonic,
        prompts=[workload.prompt(call) for call in workload.calls] if setting.system == "belady" else None,
    )
    try:
        system.graph.add_workflow(workload.spec)
        system = watch(system)
        engine = Engine(session, system, setting.compression)
        for agent, payload in warm.items():
            while engine.store(agent, workload.fixed[agent], copied(payload)) is AllocStatus.PENDING:
                system.scheduler.wait(1.0)
        while system.tiers.has_transfers:
            system.scheduler.wait(1.0)
            system.tiers.poll()
        before, asked = TransferSnapshot.take(system), system.tiers.statistics.tokens_asked
        ended: list[RequestOutput] = []
        # No call continues another one. Behind compressed prompts, what follows them would take most of the memory.
        store = StorePolicy.NEUTRAL if setting.compression is None else StorePolicy.DISCARD
        start = time.monotonic()
        for number, call in enumerate(workload.calls):
            engine.submit(
                Request(
                    f"call{number}", workload.prompt(call), workload.answer_tokens, workflow=workload.spec.name,
                    agent=call.agent, fixed_tokens=len(workload.fixed[call.agent]), store_policy=store,
                )
            )  # fmt: skip
            ended += engine.run()
        makespan = time.monotonic() - start
    finally:
        system.scheduler.close("the run is over")
        system.tiers.close()
    failed = [each for each in ended if each.error is not None]
    if failed:
        raise RuntimeError(f"{failed[0].request.id} was not answered: {failed[0].error}")
    moved, wasted = before.until_now(system)
    on_device = sum(each.cached_tokens - each.loaded_tokens for each in ended)
    return AgentRun(
        makespan_s=makespan,
        busy_s=engine.busy_s,
        computed=sum(len(each.request.prompt) - each.cached_tokens + len(each.tokens) for each in ended),
        hit_rate=on_device / max(1, system.tiers.statistics.tokens_asked - asked),
        stall_s=sum(each.stalled_s for each in ended),
        bytes_moved=moved,
        bytes_wasted=wasted,
        ttft_s=tuple((each.times.first_token or 0.0) - each.times.arrived for each in ended),
        answers=tuple(tuple(each.tokens) for each in ended),
    )
