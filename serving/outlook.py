"""What is known of the agents' next calls, from graphs, hints and queues: one answer for eviction and prefetch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable
from enum import Enum
from typing import TYPE_CHECKING, Any

from .durations import Duration
from .hints.board import HintBoard
from .hints.hint import Hint, SessionAction
from .learned_prefix import LearnedPrefixes
from .markov import LearnedTransitions
from .pages import Pages
from .shares import Shares
from .steps import LEAST, SILENT_S, StepGraph
from .tiers import TieredTree

if TYPE_CHECKING:
    from .scheduling.request import Request

logger = logging.getLogger(__name__)
SOON = 0.1  # of 1/γ, and of the look-ahead: what lacks no more than that is in sight
CAPPED_REUSE = 0.01  # of an agent beyond its client's share


class Measure(Enum):
    """What an agent is measured by."""

    NOTHING = "nothing"
    STEPS = "steps to execution"
    TIME = "expected time"


class Outlook:
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
        self.board = HintBoard(clock)
        self.step = Duration(step_s, step_s)
        self._opened = opened
        self._waiting: dict[str, int] = {}
        self._news: set[str] = set()
        self._rate = graph.rate
        self._clock, self._swept = clock, clock()
        self._shares: Shares | None = None
        self._prefixes: LearnedPrefixes | None = None

    def attach(self, tiers: TieredTree) -> None:
        """The tree whose order asks here; called once."""
        self._shares = Shares(tiers, self._worth)
        self._prefixes = LearnedPrefixes(tiers.tree.page_size)

    @property
    def by_time(self) -> bool:
        return self.measure is Measure.TIME

    @property
    def shares(self) -> Shares:
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
            news.update(map(str, self.shares.tiers.tree.groups.agents))
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
