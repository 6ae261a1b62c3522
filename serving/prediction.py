"""Where an agent's fixed prompt ends, learned from its calls: the prefix that they have in common.

Whose agents are whose, and how much one client may protect.

What is known of the agents' next calls, from graphs, hints and queues: one answer for eviction and prefetch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any

from .hints.hint import Hint, HintStore, SessionAction
from .kvcache.radix_tree import TOKEN_BYTES, Pages, common_pages
from .kvcache.tiered_cache import TieredCache
from .workflow.durations import Duration
from .workflow.graph import LEAST, SILENT_S, StepGraph
from .workflow.markov import LearnedTransitions

if TYPE_CHECKING:
    from .request import Request


MAX_AGENTS = 10_000  # beyond, the one that was called first is forgotten
MAX_BYTES = 1 << 28  # of prompts that are remembered


class LearnedPrefixes:
    """The longest prefix that an agent's last two prompts share, but no longer than any such prefix before.

    Args:
        page_size: tokens a page.
    """

    def __init__(self, page_size: int) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self._last: dict[Hashable, bytes] = {}
        self._bytes = 0

    def observe(self, agent: Hashable, key: Pages) -> int:
        """`agent` is called with the prompt `key`; returns the tokens of its fixed prompt, 0 if they are not known.

        What is remembered shrinks to what was shared, so a fixed prompt that is replaced is learned anew.
        """
        before = self._last.pop(agent, None)
        if before is None:
            self._remember(agent, key)
            return 0
        self._bytes -= len(before)
        shared = common_pages(before, key, 0, self.page_bytes) * self.page_bytes if before and key else 0
        self._remember(agent, key[:shared] if shared else key)
        return shared // TOKEN_BYTES

    def _remember(self, agent: Hashable, key: bytes) -> None:
        self._last[agent] = key
        self._bytes += len(key)
        while len(self._last) > MAX_AGENTS or self._bytes > MAX_BYTES:
            self._bytes -= len(self._last.pop(next(iter(self._last))))


MAX_OWNED = 100_000  # agents whose owner is remembered


class ClientQuotas:
    """Of the agents of one client, the most valuable count until their prompts fill its share of the device.

    The share is one part in as many as there are clients with agents; what is beyond it is worth as much as an agent of
    which nothing is known, so it stays while nobody else needs the room. Agents of no client ("") have no cap, and a
    client that is alone has none. An agent belongs to the client that called it first, or else to the one that spoke of
    it first, until that has forgotten it.

    Args:
        worth: of an agent, larger = keep; what the cap is applied to.
    """

    def __init__(self, tiers: TieredCache, worth: Callable[[str], float]) -> None:
        self.tiers, self._worth = tiers, worth
        self.capped: set[str] = set()
        self._owner: dict[str, str] = {}
        self._agents: dict[str, set[str]] = {}
        self._only_named: set[str] = set()  # agents that their owners have never called
        self._clients = 0  # at the last update

    def call(self, agent: str, client: str) -> bool:
        """A request of `client` calls `agent`; whether that takes it from a client that has only spoken of it."""
        taken = agent in self._only_named and self._owner[agent] != client
        if taken:
            self._forget(agent)
        self.own(agent, client)
        self._only_named.discard(agent)
        return taken

    def name(self, agent: str, client: str) -> bool:
        """`client` speaks of `agent`; whether it is its own (or nobody's)."""
        known = agent in self._owner
        own = self.own(agent, client)
        if not known and agent in self._owner:
            self._only_named.add(agent)
        return own

    def own(self, agent: str, client: str) -> bool:
        """Whether `agent` is of `client` (or nobody's); it is from now on if nobody has it."""
        owner = self._owner.get(agent)
        if owner is not None or not client:
            return owner is None or owner == client
        if len(self._owner) >= MAX_OWNED:
            self._forget(next(iter(self._owner)))
        self._owner[agent] = client
        self._agents.setdefault(client, set()).add(agent)
        return True

    def owner(self, agent: str) -> str:
        return self._owner.get(agent, "")

    def part(self, client: str) -> float:
        """The share of `client`, of 1."""
        return 1 / max(1, len(self._agents)) if client else 1.0

    def update(self, agents: Collection[str]) -> set[str]:
        """The values of `agents` are new; returns those that a cap begins or ceases to apply to."""
        moved = self.tiers.take_moved_agents()
        counts, self._clients = self._clients, len(self._agents)
        if counts == self._clients and ((self._clients < 2 and not self.capped) or (not agents and not moved)):
            return set()
        clients = {self._owner[agent] for agent in (*agents, *moved) if isinstance(agent, str) and agent in self._owner}
        if counts != self._clients:  # everybody's share is another one
            clients = set(self._agents)
        changed: set[str] = set()
        for client in clients:
            mine = self._agents[client]
            capped = self._beyond(client) if len(self._agents) > 1 else set()
            changed |= (self.capped & mine) ^ capped
            self.capped = (self.capped - mine) | capped
        return changed

    def _beyond(self, client: str) -> set[str]:
        room = self.part(client) * self.tiers.capacity()
        beyond: set[str] = set()
        for agent in sorted(self._agents[client], key=lambda agent: (-self._worth(agent), agent)):
            end = self.tiers.lookup_agent(agent)
            if end is not None:
                room -= sum(node.nbytes for node in end.path())
                if room < 0:
                    beyond.add(agent)
        return beyond

    def _forget(self, agent: str) -> None:
        client = self._owner.pop(agent)
        self.capped.discard(agent)
        self._only_named.discard(agent)
        self._agents[client].discard(agent)
        if not self._agents[client]:
            del self._agents[client]


logger = logging.getLogger(__name__)
SOON = 0.1  # of 1/γ, and of the look-ahead: what lacks no more than that is in sight
CAPPED_REUSE = 0.01  # of an agent beyond its client's share


class Measure(Enum):
    """What an agent is measured by."""

    NOTHING = "nothing"
    STEPS = "steps to execution"
    TIME = "expected time"


class NextCallPredictor:
    """Listens to calls and hints, and says how soon an agent is called again.

    Used under the lock of the tiers, as the graph is not for several threads.

    Args:
        graph: the workflows. The outlook is the one who drains its changes.
        measure: by steps or by time.
        learned: learns the transitions of sessions for which no workflow is declared.
        opened: called for each request just before its prompt is looked up (Belady's order counts them).
        step_s: guessed seconds of one step, until calls have been seen.
    """

    def __init__(
        self,
        graph: StepGraph,
        measure: Measure,
        clock: Callable[[], float],
        learned: LearnedTransitions | None = None,
        opened: Callable[[], None] | None = None,
        step_s: float = 5.0,
    ) -> None:
        self.graph, self.measure, self.learned = graph, measure, learned
        self.board = HintStore(clock)
        self.step = Duration(step_s, step_s)
        self._opened = opened
        self._waiting: dict[str, int] = {}
        self._news: set[str] = set()
        self._rate = graph.rate
        self._clock, self._swept = clock, clock()
        self._shares: ClientQuotas | None = None
        self._prefixes: LearnedPrefixes | None = None

    def attach(self, tiers: TieredCache) -> None:
        """The tree whose order asks here; called once."""
        self._shares = ClientQuotas(tiers, self._worth)
        self._prefixes = LearnedPrefixes(tiers.page_size)

    @property
    def by_time(self) -> bool:
        return self.measure is Measure.TIME

    @property
    def shares(self) -> ClientQuotas:
        assert self._shares is not None, "attached to a tree"
        return self._shares

    # What is asked ----------------------------------------------------------------------------------------------

    def steps(self, agent: Any) -> float:
        """Steps to the next call of `agent`, for eviction; infinity: not in sight, or beyond its client's share."""
        return math.inf if agent in self.shares.capped else self.next_steps(agent)

    def reuse(self, agent: Any) -> float:
        """What `agent` is worth by its expected discounted reuse, 0 to 1, for eviction."""
        worth = 1.0 if agent in self._waiting else self.board.reuse(agent, self.graph.worth(agent))
        return min(worth, CAPPED_REUSE) if agent in self.shares.capped else worth

    def is_near(self, agent: str) -> bool:
        """Whether `agent` follows by habit what runs: that is seen by time only."""
        return self.by_time and self.graph.is_near(agent)

    def next_steps(self, agent: str) -> float:
        """Steps to the next call of `agent`, as if everything went its way; infinity where nothing is known."""
        if agent in self._waiting:
            return 0.0
        return self.board.steps(agent, self.graph.next_steps(agent))

    def due(self, agent: str) -> float:
        """Expected seconds to the next call of `agent`, for prefetching; by steps, so many mean calls."""
        return self._seconds(agent) if self.by_time else self.next_steps(agent) * self._step_s

    def wait(self, agent: str, seconds: float, look_ahead_s: float, least_reuse: float) -> float:
        """Seconds until the next call of `agent` is in sight, if nothing happens meanwhile; by steps always 0.

        Args:
            seconds: when it is due.
            look_ahead_s, least_reuse: expected seconds to the call at the most, and discounted reuse at the least.
        """
        if not self.by_time or seconds == math.inf:
            return seconds if self.by_time else 0.0
        missing = math.log(least_reuse / max(self._reuse(agent), LEAST))
        # What is expected stands still between two readings of the graph: without `SOON`, what is out of sight by a
        # rounding error would be looked at again and again at (nearly) the same time.
        far = seconds - look_ahead_s if seconds > (1 + SOON) * look_ahead_s else 0.0
        return max(far, missing / self.graph.rate if missing > SOON else 0.0)

    def _reuse(self, agent: str) -> float:
        return 1.0 if agent in self._waiting else self.board.reuse(agent, self.graph.reuse(agent))

    def _seconds(self, agent: str) -> float:
        if agent in self._waiting:
            return 0.0
        return self.board.steps(agent, self.graph.seconds(agent) / self._step_s) * self._step_s

    @property
    def _step_s(self) -> float:
        return max(1e-9, self.step.mean)

    def _worth(self, agent: str) -> float:
        return self._reuse(agent) if self.by_time else -self.next_steps(agent)

    def fixed_tokens(self, agent: str | None, namespace: Hashable, key: Pages) -> int:
        """How much of a prompt is the fixed prompt of `agent`, where the request does not say so: learned."""
        assert self._prefixes is not None, "attached to a tree"
        return 0 if agent is None else self._prefixes.observe((namespace, agent), key)

    def changed(self) -> set[str]:
        """The agents whose values may be other ones than at the last call."""
        now = self._clock()
        if now - self._swept > SILENT_S / 10:
            self._swept = now
            self.graph.stop()
        if self.measure is Measure.NOTHING:
            return set()
        graph = self.graph
        news, self._news = self._news, set()
        news |= graph.changed_reuse() if self.by_time else graph.changed_steps()
        if graph.rate != self._rate:  # values that were read by the old one cannot be compared with new ones
            self._rate = graph.rate
            news.update(map(str, self.shares.tiers.agents()))
        news |= self.board.expired()
        return news | self.shares.update(news)

    # What is heard ----------------------------------------------------------------------------------------------

    def called(self, request: Request) -> tuple[str | None, bool]:
        """A request has come.

        Returns:
            Whose call it counts as, nobody's where the agent is another client's; whether a workflow counts it as a
            call under way.
        """
        agent = request.agent
        if agent is None:
            return None, False
        if self.shares.call(agent, request.client):
            self.board.forget(agent)
            self._news.add(agent)
        if not self.shares.own(agent, request.client):
            return None, False
        self.board.served(agent)
        self._news.add(agent)
        name = request.workflow
        try:
            if name is not None and name in self.graph and agent in self.graph[name].ids:
                self.graph[name].start(agent, request.id)
                return agent, True
            if self.learned is not None:
                self.learned.observe((request.client, request.session or name or ""), agent)
        except ValueError as error:  # the graph is full: a request is answered all the same
            logger.debug("the call of the request %s: %s", request.id, error)
        return agent, False

    def waits(self, agent: str | None) -> None:
        """A request of `agent` waits to be admitted: what the agent has cached is needed next."""
        if agent is not None:
            self._waiting[agent] = self._waiting.get(agent, 0) + 1
            self._news.add(agent)

    def opened(self, request: Request) -> None:
        if self._opened is not None:
            self._opened()

    def admitted(self, agent: str | None) -> None:
        """It does not wait any more: its lease keeps what it needs."""
        if agent is not None:
            self._waiting[agent] -= 1
            if not self._waiting[agent]:
                del self._waiting[agent]
            self._news.add(agent)

    def answered(self, request: Request, seconds: float, well: bool) -> None:
        """A call that a workflow counts is over; one that was not answered leads nowhere."""
        assert request.workflow is not None and request.agent is not None, "what was started has both"
        self.step.observe(seconds)
        try:
            self.graph[request.workflow].finish(request.agent, request.id, None if well else ())
        except ValueError as error:  # the workflow has ended or changed meanwhile
            logger.debug("the end of the request %s: %s", request.id, error)

    def hinted(self, hint: Hint) -> None:
        """Takes in what a client says about its own agents."""
        own = {agent for agent in hint.agents() if self.shares.name(agent, hint.client)}
        self._news |= self.board.take(hint, own)
        if hint.pause_s is not None and hint.agent in own:
            self.graph.observe_pause(hint.agent, hint.pause_s)
        if hint.session_action is SessionAction.CLOSE and hint.session is not None and self.learned is not None:
            self.learned.end((hint.client, hint.session))
