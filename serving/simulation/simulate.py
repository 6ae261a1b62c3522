"""Runs set-ups, policies and traces: builds the server, warms it up, lets the clients call, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..eviction import Room
from ..orders import LinearCosts
from ..payload import Phantom
from ..scheduling.limits import Limits
from ..systems import System
from ..virtual import VirtualClock
from .clients import Client, clients_of
from .costs import Batch, Links
from .driver import Driver
from .fitting import fit
from .machine import Machine
from .results import Before, Outcome, outcome_of
from .sources import ClientCalls, TracedCalls, WarmUp
from .workload import Workload

if TYPE_CHECKING:
    from .driver import Ask
    from .recording import TraceRecorder
    from .timeline import Timeline
    from .traces import Trace


def simulate(
    machine: Machine,
    workload: Workload,
    policy: str,
    seed: int = 0,
    *,
    warm: bool = True,
    recorder: TraceRecorder | None = None,
    timeline: Timeline | None = None,
) -> Outcome:
    """One run of `policy` (`system_names`).

    Args:
        warm: every agent's fixed prompt is asked for once before anything is counted.
        recorder, timeline: see `Driver`; the timeline begins with the end of the warm-up.
    """
    prompts = prompts_of(machine, workload, seed, warm) if policy == "belady" else None
    return _run(machine, workload, policy, seed, warm, prompts, recorder, timeline)[0]


def prompts_of(machine: Machine, workload: Workload, seed: int, warm: bool = True) -> list[np.ndarray]:
    """The prompts of a workload in the order in which a server with least-recently-used eviction gets them.

    The order of a single workflow depends on no policy; that of several does, and an oracle that was told it is then
    only nearly one.
    """
    return _run(machine, workload, "lru", seed, warm, None, None, None)[1]


def replay(
    machine: Machine,
    trace: Trace,
    policy: str,
    *,
    closed: bool = True,
    recorder: TraceRecorder | None = None,
    timeline: Timeline | None = None,
) -> Outcome:
    """The calls of a trace on `machine`; see `TracedCalls`."""
    prompts = [call.prompt for call in trace.calls] if policy == "belady" else None
    system, clock = machine.build(policy, prompts)
    _store(trace, system, clock, machine.copy_parts)
    before = Before.read(system)
    run = Driver(machine, system, clock, recorder, timeline).run(TracedCalls(trace, closed))
    system.scheduler.check()
    return outcome_of(run, before)


def _store(trace: Trace, system: System, clock: VirtualClock, parts: int) -> None:
    """Puts the prompts into the tiers that were there before the first call."""
    tiers = system.tiers
    for agent, prompt, nbytes in trace.stored:
        if system.prefetcher is not None:
            system.prefetcher.register(agent, prompt)
        room = Room.PENDING
        while room is Room.PENDING:
            with tiers.open(prompt) as lease:
                new = tiers.whole_pages(len(prompt)) - lease.length
                payload = Phantom(new, nbytes * new // len(prompt), parts) if new else None
                room = tiers.insert(lease, prompt, payload, agent, len(prompt))
            due = tiers.transfers.mover.next_time()
            if room is Room.PENDING and due is not None:
                clock.advance_to(due)
    while (due := tiers.transfers.mover.next_time()) is not None:
        clock.advance_to(due)
        tiers.poll()


def machine_of(trace: Trace) -> Machine:
    """The machine that a trace was recorded on, with rates that are fitted to its batches.

    Raises:
        ValueError: the trace does not say how large the pools were, or has too few batches.
    """
    about = trace.about
    if not isinstance(about.get("device_bytes"), int):
        raise ValueError(f"the trace does not say `device_bytes` in `about`: it says {', '.join(about) or 'nothing'}")
    links = Links(about.get("link_bytes_per_s", 0.0), about.get("disk_bytes_per_s", 0.0), about.get("latency_s", 0.0))
    limits = Limits(**about.get("limits", {}))
    believed = about.get("believed")
    return Machine(
        fit(trace.batches, links),
        links,
        about["device_bytes"],
        about.get("host_bytes", 0),
        about.get("disk_bytes", 0),
        trace.bytes_per_token,
        trace.page_size,
        about.get("copy_parts", 4),
        limits,
        believed=LinearCosts(believed[0], (believed[1], believed[2]), believed[3]) if believed else None,
    )


def answer_seconds(machine: Machine) -> Callable[[Client], float]:
    """What clients tell the server of a call's duration: an undisturbed one of mean length, with its prompt cached."""

    def seconds(client: Client) -> float:
        workload = client.workload
        cached = round(workload.fixed_tokens.mean)
        prompt = cached + max(1, round(workload.dynamic_tokens.mean))
        steps = max(1, round(workload.output_tokens.mean))
        first = machine.costs.batch_s(Batch(chunks=((cached, prompt),)))
        return first + machine.costs.batch_s(Batch(contexts=(prompt,), steps=steps))

    return seconds


class _Listing(ClientCalls):
    """Notes the prompts in the order of their submission."""

    prompts: list[np.ndarray]

    def submitting(self, ask: Ask) -> None:
        super().submitting(ask)
        self.prompts.append(np.asarray(ask.request.prompt))


def _run(
    machine: Machine,
    workload: Workload,
    policy: str,
    seed: int,
    warm: bool,
    prompts: Sequence[np.ndarray] | None,
    recorder: TraceRecorder | None,
    timeline: Timeline | None,
) -> tuple[Outcome, list[np.ndarray]]:
    system, clock = machine.build(policy, prompts)
    clients = clients_of(workload, seed)
    asked: list[np.ndarray] = []
    before = Before()
    if warm:
        run = Driver(machine, system, clock, recorder).run(WarmUp(clients))
        asked += [np.asarray(ended.request.prompt) for ended in run.ended]
        before = Before.read(run.system)
    source = _Listing(clients, answer_seconds(machine))
    source.prompts = asked
    if timeline is not None:
        timeline.begin(system, [agent for client in clients for agent in client.agents], clock.now)
    run = Driver(machine, system, clock, recorder, timeline).run(source)
    system.scheduler.check()
    outcome = outcome_of(run, before)
    return outcome, asked
