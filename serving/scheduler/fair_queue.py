"""Fair shares among clients and their workflows, by the tokens served to each; age and priority within a workflow.

Virtual token counters (Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, algorithm 2) at two levels:
the client, and within it the workflow, that has been served the fewest tokens is next. One that returns from idleness
is lifted to the minimum of those that wait, so idleness saves up no claim; idle counters may be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from ..lazy_heap import LazyHeap
from .request_state import RequestState


def _priority(head: tuple[Any, object]) -> Any:
    return head[0]


class FairShareBranch:
    """A client, or a workflow of one.

    Attributes:
        served_tokens: tokens charged to it, or the floor it was lifted to.
        floor: the counter of the child served last; a child that begins to wait is lifted to it.
        waiting: number of requests below it; this and the following are pairs, for ready and for deferred requests.
        heaps: of a client, its workflows that wait, by counter. queues: of a workflow, its requests.
    """

    __slots__ = ("children", "floor", "heaps", "queues", "served_tokens", "waiting")

    def __init__(self) -> None:
        self.served_tokens = 0.0
        self.floor = 0.0
        self.waiting = [0, 0]
        self.children: dict[str, FairShareBranch] = {}
        self.heaps: tuple[LazyHeap[FairShareBranch], ...] = (LazyHeap(), LazyHeap())
        self.queues: tuple[LazyHeap[RequestState], ...] = (LazyHeap(), LazyHeap())


class FairQueue:
    """Waiting requests in order of fair share; every operation is O(log n) amortised. Used under the cache's lock.

    Deferred requests keep their place in the same order, but `pop` can skip them.

    Args:
        window_s, max_idle: `priority_window_s` and `max_idle_branches` of `SchedulerConfig`.
    """

    def __init__(self, window_s: float = 10.0, max_idle: int = 10_000) -> None:
        self.window_s, self.max_idle = window_s, max_idle
        self.root = FairShareBranch()
        self._numbers = count(1)
        self._queued: dict[RequestState, bool] = {}  # whether it was deferred

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, state: RequestState) -> bool:
        return state in self._queued

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self._queued)

    def push(self, state: RequestState) -> None:
        """Queues a request, as deferred if it is; one that was queued before returns to its old place."""
        deferred = self._queued[state] = state.deferred
        state.arrival_order = state.arrival_order or next(self._numbers)
        client, workflow = self._branches(state)
        key = state.times.arrived - self.window_s * state.request.priority
        workflow.queues[deferred].push(state, (key, state.arrival_order))
        for parent, branch in ((client, workflow), (self.root, client)):
            if not any(branch.waiting) and not deferred:  # a branch whose request is being deferred was not idle
                branch.served_tokens = max(branch.served_tokens, parent.floor)
            branch.waiting[deferred] += 1
            if branch.waiting[deferred] == 1:
                self._enter(parent, branch, deferred)
        self.root.waiting[deferred] += 1

    def remove(self, state: RequestState) -> bool:
        """Removes a request from anywhere in the queue; False if it is not queued."""
        deferred = self._queued.pop(state, None)
        if deferred is None:
            return False
        client, workflow = self._branches(state)
        workflow.queues[deferred].discard(state)
        self.root.waiting[deferred] -= 1
        for parent, branch in ((client, workflow), (self.root, client)):
            branch.waiting[deferred] -= 1
            if not branch.waiting[deferred]:
                parent.heaps[deferred].discard(branch)
        if not workflow.waiting[deferred]:
            workflow.queues[deferred].clear()
        return True

    def pop(self, deferred: bool = True) -> RequestState | None:
        """Removes and returns the next request; `deferred`: it may be a deferred one."""
        lanes = (False, True) if deferred else (False,)
        if not any(self.root.waiting[lane] for lane in lanes):
            return None
        workflow = self._first(self._first(self.root, lanes), lanes)
        heads = [(queue.peek_priority(), queue) for lane in lanes if (queue := workflow.queues[lane])]
        state = min(heads, key=_priority)[1].peek()
        assert state is not None, "a request of these lanes waits"
        self.remove(state)
        return state

    def charge(self, state: RequestState, tokens: float) -> None:
        """Charges weighted tokens to the client and workflow of a request; a negative number refunds them."""
        state.charged_tokens += tokens
        client, workflow = self._branches(state)
        for parent, branch in ((client, workflow), (self.root, client)):
            branch.served_tokens += tokens
            for lane in (False, True):
                if branch.waiting[lane]:
                    self._enter(parent, branch, lane)

    def _branches(self, state: RequestState) -> tuple[FairShareBranch, FairShareBranch]:
        name, part = state.account
        client = self._child(self.root, name)
        return client, self._child(client, part)

    def _child(self, parent: FairShareBranch, name: str) -> FairShareBranch:
        branch = parent.children.get(name)
        if branch is None:
            if len(parent.children) >= 2 * self.max_idle:
                self._forget_idle(parent)
            branch = parent.children[name] = FairShareBranch()
            branch.served_tokens = parent.floor
        return branch

    def _forget_idle(self, parent: FairShareBranch) -> None:
        """Drops idle branches, the least served first: those served most still owe something."""
        idle = sorted((b.served_tokens, name) for name, b in parent.children.items() if not any(b.waiting))
        for _, name in idle[: max(0, len(idle) - self.max_idle)]:
            del parent.children[name]

    def _enter(self, parent: FairShareBranch, branch: FairShareBranch, lane: bool) -> None:
        """Puts a branch at its present counter into its parent's heap; numbers order equal counters across lanes."""
        parent.heaps[lane].push(branch, (branch.served_tokens, next(self._numbers)))

    def _first(self, parent: FairShareBranch, lanes: Sequence[bool]) -> FairShareBranch:
        """The least served branch in which a request of these lanes waits."""
        heads = [(heap.peek_priority(), heap) for lane in lanes if (heap := parent.heaps[lane])]
        branch = min(heads, key=_priority)[1].peek()
        assert branch is not None, "a request of these lanes waits"
        parent.floor = max(parent.floor, branch.served_tokens)
        return branch

    def check(self) -> None:
        """Raises AssertionError unless the counts of waiting requests agree at every level."""
        assert sum(self.root.waiting) == len(self._queued), "what waits is counted"
        for lane in (False, True):
            clients = self.root.children.values()
            for client in clients:
                below = sum(branch.waiting[lane] for branch in client.children.values())
                assert client.waiting[lane] == below, "a client's requests are counted"
            assert self.root.waiting[lane] == sum(client.waiting[lane] for client in clients)
