"""The state of a system at one moment, bounded in size and in the time that taking it needs.

`take_snapshot` is called by the thread that drives the scheduler, under the cache's lock. Names of agents, workflows
and clients are what clients have sent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice

from tenure.checked import Count, verify

from .kvcache.agent_index import AgentGroup
from .kvcache.base import Tier
from .kvcache.tiered_cache import TieredCache
from .metrics import Recent
from .scheduler.request_state import RequestState, RequestStatus
from .system import System
from .workflow.workflow import Workflow


@dataclass(frozen=True)
class SnapshotConfig:
    """The most of each kind that a snapshot lists; it says how many more there are.

    Attributes:
        max_nodes: nodes of the tree that are inspected, which takes most of the time of a snapshot.
        max_agents: agents of a tier, the largest first.
        max_transfers: copies in progress, the oldest first.
        max_requests: requests, the oldest first.
        max_workflows: workflows, the one with the latest event first.
        max_workflow_agents, max_workflow_edges: of a workflow.
    """

    max_nodes: Count = 4000
    max_agents: Count = 12
    max_transfers: Count = 12
    max_requests: Count = 40
    max_workflows: Count = 10
    max_workflow_agents: Count = 40
    max_workflow_edges: Count = 120

    def __post_init__(self) -> None:
        verify(self)


@dataclass(frozen=True)
class AgentBytes:
    """An agent's fixed prompt in a tier; a part that several agents share counts for each in equal shares.

    Attributes:
        nbytes: in the tier. pinned: of these, referenced by requests or copies.
    """

    agent: str
    nbytes: int
    pinned: int


@dataclass(frozen=True)
class TierState:
    """A tier's pool, in bytes.

    Attributes:
        tier: device, host or disk.
        capacity: used, and free ones. used: for copies and requests.
        reserved: of requests in progress, for what they compute.
        arriving: of copies that are being written.
        pinned: of copies that requests or transfers use. evictable: of all others.
        agents: the largest; `more_agents` others have `more_agent_bytes`.
        conversations: bytes of nobody's fixed prompt.
        not_inspected: bytes of nodes beyond `SnapshotConfig.max_nodes`, which belong to any of these.
    """

    tier: str
    capacity: int
    used: int
    reserved: int
    arriving: int
    pinned: int
    evictable: int
    agents: list[AgentBytes]
    more_agents: int
    more_agent_bytes: int
    conversations: int
    not_inspected: int


@dataclass(frozen=True)
class TransferState:
    """A copy in progress.

    Attributes:
        urgency: demand, write_back, prefetch or eager, see `Urgency`.
        agents: up to three of those whose fixed prompts it is part of.
        waiting: handles that wait for it.
    """

    source: str
    target: str
    urgency: str
    nbytes: int
    done: int
    tokens: int
    agents: list[str]
    waiting: int


@dataclass(frozen=True)
class AgentState:
    """An agent of a workflow.

    Attributes:
        steps, seconds: to its next call; None: none is expected.
        running: calls in progress. expected: it is called next, whatever the edges say.
        joins: it waits for all of its predecessors.
    """

    agent: str
    steps: float | None
    seconds: float | None
    running: int
    expected: bool
    joins: bool


@dataclass(frozen=True)
class WorkflowState:
    """A workflow; `edges` are (source, target, probability) with places in `agents`.

    Attributes:
        silent_s: seconds since its last event.
        more_agents, more_edges: that are not listed.
    """

    workflow: str
    client: str
    silent_s: float
    agents: list[AgentState]
    edges: list[tuple[int, int, float]]
    more_agents: int
    more_edges: int


@dataclass(frozen=True)
class RequestInProgress:
    """A request that has not ended.

    Attributes:
        id: the client's label.
        stage: queued, sharing (it waits for pages that another request computes), loading, loaded (it waits for a
            place in the batch), prefill or decode.
        age_s: seconds since it arrived.
        prompt_tokens, cached_tokens: of the prompt, and of these from the cache.
        computed_tokens: of prompt and answer whose KV is on the device. output_tokens: of the answer so far.
    """

    id: str
    client: str
    agent: str | None
    workflow: str | None
    stage: str
    age_s: float
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int
    max_new_tokens: int


@dataclass(frozen=True)
class SystemSnapshot:
    """The state of a system.

    Attributes:
        system: its preset's name.
        taken: seconds since 1970. cost_s: seconds that the snapshot took.
        stages: number of requests in each stage.
        nodes: of the tree; more_nodes: of these, not inspected.
        finished: requests since the start, by how they ended.
        recent: the last minute.
    """

    system: str
    taken: float
    cost_s: float
    tiers: list[TierState]
    transfers: list[TransferState]
    more_transfers: int
    workflows: list[WorkflowState]
    more_workflows: int
    requests: list[RequestInProgress]
    more_requests: int
    stages: dict[str, int]
    nodes: int
    more_nodes: int
    submitted: int
    finished: dict[str, int]
    preemptions: int
    prefetched: int
    prefetched_used: int
    evictions: int
    recent: Recent


_STAGES = {
    RequestStatus.WAITING: "queued", RequestStatus.LOADING: "loading", RequestStatus.LOADED: "loaded",
    RequestStatus.PREFILL: "prefill", RequestStatus.DECODE: "decode",
}  # fmt: skip
PAIRS = 2 * len(Tier)  # bytes and pinned bytes of each tier
STAGES: tuple[str, ...] = ("queued", "sharing", "loading", "loaded", "prefill", "decode")


def take_snapshot(system: System, config: SnapshotConfig) -> SystemSnapshot:
    """The state of `system` now; costs a few microseconds for each node, agent and request that it inspects."""
    with system.tiers.lock:
        begun = time.perf_counter()
        scheduler, tiers, now = system.scheduler, system.tiers, system.tiers.clock()
        requests = scheduler.requests()
        stages = dict.fromkeys(STAGES, 0)
        for state in requests:
            stages[_stage(system, state)] += 1
        jobs = list(tiers.transfers.jobs.values())
        workflows = nlargest(config.max_workflows, system.graph, key=lambda flow: flow.last_event_s)
        prefetched = None if system.prefetcher is None else system.prefetcher.statistics
        metrics = scheduler.metrics
        return SystemSnapshot(
            system=system.name,
            taken=time.time(),
            tiers=_tiers(tiers, config),
            transfers=[
                TransferState(
                    _name(job.source), _name(job.target), job.urgency.name.lower(), job.payload.nbytes,
                    job.payload.nbytes - job.remaining_bytes, job.payload.tokens,
                    [str(agent) for agent in islice(job.owner.group.agents, 3)], len(job.waiters),
                )
                for job in jobs[: config.max_transfers]
            ],
            more_transfers=max(0, len(jobs) - config.max_transfers),
            workflows=[_workflow(system, flow, config, now) for flow in workflows],
            more_workflows=len(system.graph) - len(workflows),
            requests=[_request(system, state, now) for state in islice(requests, config.max_requests)],
            more_requests=max(0, len(requests) - config.max_requests),
            stages=stages,
            nodes=tiers.tree.size,
            more_nodes=max(0, tiers.tree.size - config.max_nodes),
            submitted=metrics.submitted,
            finished={reason.name.lower(): number for reason, number in metrics.finished.items()},
            preemptions=metrics.preemptions,
            prefetched=0 if prefetched is None else prefetched.arrived,
            prefetched_used=0 if prefetched is None else prefetched.used,
            evictions=tiers.statistics.evicted_copies,
            recent=scheduler.recent.summary(now),
            cost_s=time.perf_counter() - begun,
        )  # fmt: skip


def _name(tier: Tier) -> str:
    return tier.name.lower()


def _stage(system: System, state: RequestState) -> str:
    if state.status is RequestStatus.WAITING and system.scheduler.is_sharing(state):
        return "sharing"
    return _STAGES[state.status]


def _request(system: System, state: RequestState, now: float) -> RequestInProgress:
    request = state.request
    return RequestInProgress(
        request.id, request.client, request.agent, request.workflow, _stage(system, state),
        max(0.0, now - state.times.arrived), state.num_prompt_tokens, state.cached_tokens, state.num_computed_tokens,
        state.num_output_tokens, request.max_new_tokens,
    )  # fmt: skip


def _workflow(system: System, flow: Workflow, config: SnapshotConfig, now: float) -> WorkflowState:
    predictor, shown = system.predictor, list(islice(flow.ids, config.max_workflow_agents))
    places = {flow.ids[agent]: place for place, agent in enumerate(shown)}
    agents = [
        AgentState(
            agent, _finite(predictor.next_steps(agent)), _finite(predictor.seconds_to_call(agent)),
            len(flow.running.get(flow.ids[agent], ())), flow.ids[agent] in flow.expected, flow.join(agent) == "and",
        )
        for agent in shown
    ]  # fmt: skip
    edges = (
        (places[source], places[target], probability)
        for source, row in flow.branches.items()
        if source in places
        for target, probability in row.items()
        if target in places
    )
    listed = list(islice(edges, config.max_workflow_edges))
    return WorkflowState(
        flow.name, flow.client, max(0.0, now - flow.last_event_s), agents, listed, len(flow.ids) - len(shown),
        sum(map(len, flow.branches.values())) - len(listed),
    )  # fmt: skip


def _finite(number: float) -> float | None:
    return None if math.isinf(number) else number


def _tiers(tiers: TieredCache, config: SnapshotConfig) -> list[TierState]:
    used = list(tiers.pools)
    groups: dict[AgentGroup, list[int]] = {}  # bytes and pinned bytes of each tier
    for node in islice(tiers.tree, config.max_nodes):
        counts = groups.get(node.group)
        if counts is None:
            counts = groups[node.group] = [0] * PAIRS
        pinned = node.ref_count > 0
        for tier in used:
            nbytes = node.allocated[tier]
            if nbytes:
                counts[2 * tier] += nbytes
                if pinned:
                    counts[2 * tier + 1] += nbytes
    arriving = dict.fromkeys(Tier, 0)
    for job in tiers.transfers.jobs.values():
        arriving[job.target] += job.allocated
    return [_tier(tier, tiers, groups.items(), arriving[tier], config) for tier in used]


def _tier(
    tier: Tier, tiers: TieredCache, groups: Iterable[tuple[AgentGroup, list[int]]], arriving: int,
    config: SnapshotConfig,
) -> TierState:  # fmt: skip
    pool = tiers.pools[tier]
    owned: dict[str, list[float]] = {}
    conversations = seen = 0
    for group, counts in groups:
        nbytes, pinned = counts[2 * tier], counts[2 * tier + 1]
        seen += nbytes
        if not group.agents:
            conversations += nbytes
        for agent in group.agents if nbytes else ():
            own = owned.setdefault(str(agent), [0.0, 0.0])
            own[0] += nbytes / len(group.agents)
            own[1] += pinned / len(group.agents)
    largest = nlargest(config.max_agents, owned.items(), key=lambda each: each[1][0])
    listed = [AgentBytes(agent, round(own[0]), round(own[1])) for agent, own in largest]
    more = sum(own[0] for own in owned.values()) - sum(own[0] for _, own in largest)
    return TierState(
        tier=_name(tier), capacity=pool.capacity, used=pool.used, reserved=pool.reserved, arriving=arriving,
        pinned=max(0, pool.used - pool.reserved - pool.evictable - arriving), evictable=pool.evictable, agents=listed,
        more_agents=len(owned) - len(listed), more_agent_bytes=max(0, round(more)), conversations=conversations,
        not_inspected=max(0, pool.used - pool.reserved - arriving - seen),
    )  # fmt: skip
