"""Predicts each agent's next call from step graphs, hints and the queue: one answer for eviction and prefetch.

`NextCallPredictor` combines the sources and pushes changed values to the cache. `LearnedPrefixes` finds the end of an
agent's fixed prompt where requests do not give it. `ClientQuotas` bounds how much device memory one client's agents
can protect.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from tenure.checked import Count, Positive, verify

from .conversations import Conversations, Session
from .hints.hint import SESSION, ActionKind, Hint, HintAction, HintConfig, HintStore, SessionAction, session_agent
from .kvcache.radix_tree import TOKEN_BYTES, Node, Pages, common_pages
from .kvcache.tiered_cache import TieredCache
from .request import Request
from .session_tree import SessionTree, SessionTreeConfig
from .workflow.durations import Duration
from .workflow.graph import MIN_CHANCE, StepGraph
from .workflow.markov import LearnedTransitions
from .workflow.workflow import Workflow

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionConfig:
    """Tuned numbers of a `NextCallPredictor` and its parts.

    Attributes:
        step_s: seconds; guessed duration of one step, until calls have been observed.
        capped_reuse: expected discounted reuse (0 to 1) of an agent over its client's quota in every tier, at most.
        held_reuse, held_steps: the same of an agent that is over the quota of the device only, and its steps to the
            next call, at least.
        sight_margin: in 1/γ, and relative to the look-ahead; an agent that misses the thresholds of prefetching by no
            more than this counts as within them. Expected times stand still between two reads of the graph: without a
            margin an agent that misses by a rounding error would be checked again and again at the same time.
        silence_check_s: seconds between two checks for workflows without events.
        max_agents_per_update: agents whose values are read again in one step though nothing has happened in their
            workflows (γ has changed, or time has passed); the others follow in the next steps. The same for the agents
            of clients whose quotas have changed because there is another client.
        max_prefix_agents, max_prefix_bytes: agents and bytes of prompts stored by `LearnedPrefixes`.
        max_owned_agents: agents whose owner is stored by `ClientQuotas`.
        max_sessions, max_session_bytes: sessions and bytes of their prompts stored by `Conversations`.
    """

    step_s: Positive = 5.0
    capped_reuse: Positive = 0.01
    held_reuse: Positive = 0.05
    held_steps: Positive = 32.0
    sight_margin: Positive = 0.1
    silence_check_s: Positive = 360.0
    max_agents_per_update: Count = 32
    max_prefix_agents: Count = 10_000
    max_prefix_bytes: Count = 1 << 28
    max_owned_agents: Count = 100_000
    max_sessions: Count = 10_000
    max_session_bytes: Count = 1 << 28
    hints: HintConfig = field(default_factory=HintConfig)
    session_tree: SessionTreeConfig = field(default_factory=SessionTreeConfig)

    def __post_init__(self) -> None:
        verify(self)


class LearnedPrefixes:
    """Learns each agent's fixed prompt: the longest prefix shared by its last two prompts, and by those before.

    Args:
        config: bounds.
    """

    def __init__(self, page_size: int, config: PredictionConfig) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.config = config
        self._prefixes: dict[Hashable, bytes] = {}  # least recently called first
        self._bytes = 0

    def observe(self, agent: Hashable, key: Pages) -> int:
        """`agent` is called with the prompt `key`; returns the tokens of its fixed prompt, 0 if unknown.

        The stored prefix shrinks to the shared part, so a fixed prompt that is replaced is learned again.
        """
        before = self._prefixes.pop(agent, None)
        if before is None:
            self._store(agent, key)
            return 0
        self._bytes -= len(before)
        shared = common_pages(before, key, 0, self.page_bytes) * self.page_bytes if before and key else 0
        self._store(agent, key[:shared] if shared else key)
        return shared // TOKEN_BYTES

    def _store(self, agent: Hashable, key: bytes) -> None:
        self._prefixes[agent] = key
        self._bytes += len(key)
        while len(self._prefixes) > self.config.max_prefix_agents or self._bytes > self.config.max_prefix_bytes:
            self._bytes -= len(self._prefixes.pop(next(iter(self._prefixes))))


class ClientQuotas:
    """Separates the clients' agents, and caps those of a client at its fair fraction of memory, most valuable first.

    An agent's name means the agent of the client that uses it. The first client to use a name has the agent of that
    name; an agent that another client calls so is named `name@client` (`key`). A client that has only sent hints about
    an agent gives the name up to one that calls it. Agents of no client ("") are everybody's that gives no client.

    The fraction is 1 / (number of clients with agents). Agents over it on the device are still to be held in the
    largest tier, as far as the client's fraction of that, and what the other clients leave of theirs, has room for
    them: they count as called in a long time. Those beyond count as much as agents without a prediction. All stay while
    there is no demand for the memory. A single client is not capped, nor are agents of no client. Agents that share a
    part of their prompts are charged equal shares of it.

    Args:
        value: of an agent, larger = keep.
        config: bounds.
    Attributes:
        capped: agents over their client's quota of the device.
        capped_everywhere: of these, the agents for which the largest tier has no room either.
    """

    def __init__(self, value: Callable[[str], float], config: PredictionConfig) -> None:
        self.capped: set[str] = set()
        self.capped_everywhere: set[str] = set()
        self._value = value
        self._max_agents, self._max_per_update = config.max_owned_agents, config.max_agents_per_update
        self._owner: dict[str, str] = {}
        self._agents: dict[str, set[str]] = {}
        self._hinted_only: set[str] = set()  # agents that their owners have never called
        self._num_clients = 0  # at the last update
        self._due: dict[str, None] = {}  # clients whose caps are to be computed again, as there is another client
        self._used: dict[str, float] = {}  # bytes of the agents' prompts, by client, when they were last added up

    def key(self, agent: str, client: str) -> str:
        """The agent that `client` means by a name."""
        while self._owner.get(agent, client) != client:
            agent = f"{agent}@{client}"
        return agent

    def claim_by_call(self, agent: str, client: str) -> tuple[str, bool]:
        """`client` calls an agent; returns its key, and whether the name was taken from a client that only sent hints
        about it."""
        taken = agent in self._hinted_only and self._owner[agent] != client
        if taken:
            self._forget(agent)
        key = self.key(agent, client)
        self._claim(key, client)
        self._hinted_only.discard(key)
        return key, taken

    def claim_by_hint(self, agent: str, client: str) -> str:
        """`client` sends a hint about an agent; returns its key."""
        key = self.key(agent, client)
        if client and key not in self._owner:
            self._claim(key, client)
            self._hinted_only.add(key)
        return key

    def _claim(self, key: str, client: str) -> None:
        if not client or key in self._owner:
            return
        if len(self._owner) >= self._max_agents:
            self._forget(next(iter(self._owner)))
        self._owner[key] = client
        self._agents.setdefault(client, set()).add(key)

    def owner(self, agent: str) -> str:
        """The client that owns `agent`, "" if there is none."""
        return self._owner.get(agent, "")

    def fraction(self, client: str) -> float:
        """Fraction of a tier's memory that `client` may protect whatever others do, 0 to 1."""
        return 1 / max(1, len(self._agents)) if client else 1.0

    @property
    def has_due(self) -> bool:
        """Whether `update` has more to compute, without any change."""
        return bool(self._due)

    def update(self, agents: Collection[str], tiers: TieredCache) -> set[str]:
        """Recomputes the caps after the values of `agents` changed; returns the agents capped or released by it.

        Args:
            tiers: gives the sizes of prompts; its record of moved prompts is consumed.
        """
        moved = tiers.take_moved_agents()
        before, self._num_clients = self._num_clients, len(self._agents)
        if before != self._num_clients:  # all quotas have changed
            self._due.update(dict.fromkeys(self._agents))
        elif self._num_clients < 2 and not self.capped:
            self._due.clear()
            return set()
        elif not (agents or moved or self._due):
            return set()
        changed: set[str] = set()
        for client in self._clients_of({*agents, *moved}):
            owned = self._agents[client]
            capped, everywhere = self._over_quota(client, tiers) if len(self._agents) > 1 else (set(), set())
            changed |= (self.capped & owned) ^ capped | (self.capped_everywhere & owned) ^ everywhere
            self.capped = (self.capped - owned) | capped
            self.capped_everywhere = (self.capped_everywhere - owned) | everywhere
        return changed

    def _clients_of(self, agents: Collection[Any]) -> list[str]:
        """The clients that own these agents, and some of those that are due."""
        clients = sorted({self._owner[agent] for agent in agents if isinstance(agent, str) and agent in self._owner})
        for client in clients:
            self._due.pop(client, None)
        left = self._max_per_update
        while self._due and left > 0:
            client = next(iter(self._due))
            del self._due[client]
            clients.append(client)
            left -= len(self._agents[client])
        return clients

    def _over_quota(self, client: str, tiers: TieredCache) -> tuple[set[str], set[str]]:
        """The agents over the quota of the device, and of these the ones for which the largest tier has no room."""
        largest, used = max(map(tiers.capacity, tiers.pools)), 0.0
        device, share = self.fraction(client) * tiers.capacity(), self.fraction(client) * largest
        room = largest - sum(min(share, nbytes) for other, nbytes in self._used.items() if other != client)
        capped: set[str] = set()
        everywhere: set[str] = set()
        for agent in sorted(self._agents[client], key=lambda agent: (-self._value(agent), agent)):
            end = tiers.lookup_agent(agent)
            if end is not None:
                used += sum(node.nbytes / max(1, len(node.group.agents)) for node in end.path())
                if used > device:
                    capped.add(agent)
                if used > max(share, room):
                    everywhere.add(agent)
        self._used[client] = used
        return capped, everywhere

    def _forget(self, agent: str) -> None:
        client = self._owner.pop(agent)
        self.capped.discard(agent)
        self.capped_everywhere.discard(agent)
        self._hinted_only.discard(agent)
        self._agents[client].discard(agent)
        if not self._agents[client]:
            del self._agents[client]
            self._used.pop(client, None)
            self._due.pop(client, None)


class PredictionMode(Enum):
    """How the next call of an agent is measured."""

    NONE = "nothing is predicted"
    STEPS = "steps to execution"
    TIME = "expected time"


class NextCallPredictor:
    """Combines step graph, hints and waiting requests into predictions of each agent's next call.

    The eviction policy reads `steps` or `reuse`; the prefetcher reads the rest. `push_values` tells the cache which of
    them have changed. Not thread-safe, like the graph: used under the lock of the cache.

    Args:
        graph: the workflows. The predictor is the only reader of its changes.
        mode: by steps or by time.
        learned: learns the transitions of sessions without a declared workflow.
        clock: seconds. page_size: tokens per page of the cache.
        on_lookup: called for each request just before the first lookup of its prompt (Belady's order counts them).
    Attributes:
        step: duration of one step, a call and the pause after it.
    """

    def __init__(
        self, graph: StepGraph, mode: PredictionMode, clock: Callable[[], float], page_size: int,
        learned: LearnedTransitions | None = None, on_lookup: Callable[[], None] | None = None,
        config: PredictionConfig | None = None,
    ) -> None:  # fmt: skip
        self.config = config = config or PredictionConfig()
        self.graph, self.mode, self.learned = graph, mode, learned
        self.hints = HintStore(clock, config.hints)
        self.quotas = ClientQuotas(self._quota_value, config)
        self.step = Duration(config.step_s, config.step_s)
        self.conversations = Conversations(config.max_sessions, config.max_session_bytes)
        self.session_tree = SessionTree(clock, config.session_tree)
        self._parents: dict[Session, str] = {}  # the agents of sessions that wait for their sub-agents
        self._parent_agents: set[str] = set()  # its values
        self._prefixes = LearnedPrefixes(page_size, config)
        self._on_lookup = on_lookup
        self._waiting: dict[str, int] = {}  # waiting requests by agent
        self._changed: set[str] = set()  # since the last push, other than by the graph
        self.clock, self._silence_checked_s = clock, clock()
        graph.separate_clients(self._claim)

    @property
    def by_time(self) -> bool:
        return self.mode is PredictionMode.TIME

    # Predictions ------------------------------------------------------------------------------------------------

    def steps(self, agent: Any) -> float:
        """Steps to the next call of `agent`, for eviction; infinity: none predicted, or over its client's quota."""
        if agent not in self.quotas.capped:
            return 0.0 if agent in self._parent_agents else self.next_steps(agent)
        everywhere = agent in self.quotas.capped_everywhere
        return math.inf if everywhere else max(self.next_steps(agent), self.config.held_steps)

    def reuse(self, agent: Any) -> float:
        """Value of the cache of `agent` by expected discounted reuse, 0 to 1, for eviction."""
        needed = agent in self._waiting or agent in self._parent_agents
        value = 1.0 if needed else self.hints.reuse(agent, self.graph.retention_value(agent))
        if agent not in self.quotas.capped:
            return value
        everywhere = agent in self.quotas.capped_everywhere
        return min(value, self.config.capped_reuse if everywhere else self.config.held_reuse)

    def next_steps(self, agent: str) -> float:
        """Steps to the next call of `agent` at the earliest, regardless of quotas; infinity if none is predicted."""
        if agent in self._waiting:
            return 0.0
        return self.hints.steps(agent, self.graph.next_steps(agent))

    def is_observed_successor(self, agent: str) -> bool:
        """Whether `agent` repeatedly followed one that is running now; by time only."""
        return self.by_time and self.graph.is_observed_successor(agent)

    def seconds_to_call(self, agent: str) -> float:
        """Expected seconds to the next call of `agent`; by steps, the steps times the mean duration of one."""
        return self._expected_seconds(agent) if self.by_time else self.next_steps(agent) * self._step_s

    def seconds_to_sight(self, agent: str, seconds: float, look_ahead_s: float, min_reuse: float) -> float:
        """Seconds until the next call of `agent` is near enough to prefetch, without further events; by steps 0.

        Args:
            seconds: to the call, see `seconds_to_call`.
            look_ahead_s: maximum of the expected seconds to the call.
            min_reuse: minimum of the expected discounted reuse, 0 to 1.
        """
        if not self.by_time or seconds == math.inf:
            return seconds if self.by_time else 0.0
        missing = math.log(min_reuse / max(self._expected_reuse(agent), MIN_CHANCE))
        margin = self.config.sight_margin
        far = seconds - look_ahead_s if seconds > (1 + margin) * look_ahead_s else 0.0
        return max(far, missing / self.graph.rate if missing > margin else 0.0)

    def fixed_tokens(self, agent: str | None, namespace: Hashable, key: Pages) -> int:
        """Tokens of the agent's fixed prompt, learned from its calls, for a request that does not give them."""
        return 0 if agent is None else self._prefixes.observe((namespace, agent), key)

    @property
    def _step_s(self) -> float:
        return max(1e-9, self.step.mean)

    def _expected_reuse(self, agent: str) -> float:
        return 1.0 if agent in self._waiting else self.hints.reuse(agent, self.graph.reuse(agent))

    def _expected_seconds(self, agent: str) -> float:
        if agent in self._waiting:
            return 0.0
        return self.hints.steps(agent, self.graph.seconds(agent) / self._step_s) * self._step_s

    def _quota_value(self, agent: str) -> float:
        if agent in self._parent_agents:
            return 1.0 if self.by_time else 0.0
        return self._expected_reuse(agent) if self.by_time else -self.next_steps(agent)

    # Changes ----------------------------------------------------------------------------------------------------

    def push_values(self, tiers: TieredCache) -> list[str]:
        """Tells `tiers` which agents' values may have changed since the last call.

        Returns:
            These agents, sorted, so that results do not depend on the seed of hashing.
        """
        expired = self.hints.pop_expired()
        self._changed |= expired
        self.conversations.expired(expired)
        self._release(self.session_tree.pop_silent())
        by_agents = self.mode is not PredictionMode.NONE
        self.conversations.apply(tiers, self.hints, self._parent_agents, by_agents)
        changed = sorted(self._changed_agents(tiers))
        if changed:
            tiers.values_changed(changed)
        return changed

    def _changed_agents(self, tiers: TieredCache) -> set[str]:
        now = self.clock()
        if now - self._silence_checked_s > self.config.silence_check_s:
            self._silence_checked_s = now
            self.graph.clear_silent()
        changed, self._changed = self._changed, set()
        if self.mode is PredictionMode.NONE:
            return set()
        graph = self.graph
        changed |= graph.changed_reuse(self.config.max_agents_per_update) if self.by_time else graph.changed_steps()
        return changed | self.quotas.update(changed, tiers)

    @property
    def has_due(self) -> bool:
        """Whether `push_values` has more to read, without any event."""
        return self.graph.has_due or self.quotas.has_due

    # Events -----------------------------------------------------------------------------------------------------

    def on_request(self, request: Request, number: int) -> tuple[str | None, bool]:
        """A request has arrived.

        Args:
            number: identifies it; `request.id` does not.

        Returns:
            The agent whose call it is (`ClientQuotas.key`); and whether a workflow counts it as a call in progress, so
            that `on_finish` must follow.
        """
        client, name = request.client, request.workflow
        if request.session is not None:
            self.session_tree.observe((client, session_agent(request.session)))
            standing = self.conversations.agent((client, session_agent(request.session)))
            if standing is not None:
                self._on_call(standing)
        if request.agent is None:
            return None, False
        workflow = self._workflow_of(request)
        agent = None if workflow is None else workflow.current_name(request.agent)
        if agent is None:
            agent = self._claim(request.agent, client)
        self._on_call(agent)
        try:
            if workflow is not None:
                workflow.start(agent, number)
                return agent, True
            if self.learned is not None:
                self.learned.observe((client, request.session or name or ""), agent)
        except ValueError as error:  # the graph is full: the request is answered all the same
            logger.debug("the call of the request %s: %s", request.id, error)
        return agent, False

    def _on_call(self, agent: str) -> None:
        self.hints.on_call(agent)
        self._changed.add(agent)

    def _workflow_of(self, request: Request) -> Workflow | None:
        """The workflow that counts the call: one that has the agent, and belongs to the request's client or to nobody.

        The first client that calls an agent in a workflow of nobody gets it, and the workflow's agents become its own.
        """
        name, agent, client = request.workflow, request.agent, request.client
        if name is None or agent is None or name not in self.graph:
            return None
        workflow = self.graph[name]
        if workflow.persistent or workflow.current_name(agent) is None or workflow.client not in ("", client):
            return None
        if not workflow.client and client:
            try:
                workflow.bind(client)
            except ValueError as error:  # a name with that of the client is too long
                logger.debug("the call of the request %s: %s", request.id, error)
                return None
        return workflow

    def _claim(self, agent: str, client: str) -> str:
        """The agent that `client` means by a name, which becomes the client's if nobody has called it."""
        key, taken = self.quotas.claim_by_call(agent, client)
        if taken:
            self.hints.discard(key)
            self._changed.add(key)
        return key

    def on_wait(self, agent: str | None) -> None:
        """A request of `agent` waits for admission: the agent's cache is needed next."""
        if agent is not None:
            self._waiting[agent] = self._waiting.get(agent, 0) + 1
            self._changed.add(agent)

    def on_lookup(self) -> None:
        if self._on_lookup is not None:
            self._on_lookup()

    def on_admit(self, agent: str | None) -> None:
        """A request of `agent` no longer waits: its handle protects what it needs."""
        if agent is not None:
            self._waiting[agent] -= 1
            if not self._waiting[agent]:
                del self._waiting[agent]
            self._changed.add(agent)

    def on_finish(self, request: Request, number: int, seconds: float, succeeded: bool) -> None:
        """A call that a workflow counts has ended after `seconds`; without success, no successor is predicted."""
        assert request.workflow is not None and request.agent is not None, "a started call has both"
        self.step.observe(seconds)
        try:
            self.graph[request.workflow].finish(request.agent, number, None if succeeded else ())
        except ValueError as error:  # the workflow has ended or changed meanwhile
            logger.debug("the end of the request %s: %s", request.id, error)

    def on_answer(self, request: Request, end: Node) -> None:
        """A request has been answered; the KV of its prompt and answer is cached up to the node `end`."""
        if request.session is not None and end.parent is not None:
            prompt = Pages(b"".join(reversed([node.span for node in end.path()])))
            session = request.client, session_agent(request.session)
            self.conversations.observe(session, prompt, request.namespace)
            self.session_tree.observe(session)

    def on_hint(self, hint: Hint) -> None:
        """Applies a hint to the agents that its client means by their names, and to its sessions."""
        client = hint.client
        if hint.session is not None and hint.parent_session is not None:
            self._link(client, session_agent(hint.session), session_agent(hint.parent_session))
        if hint.session_action is SessionAction.CLOSE and hint.session is not None:
            if self.learned is not None:
                self.learned.end((client, hint.session))
            ended = session_agent(hint.session)
            if all(action.agent != ended for action in hint.actions):
                hint = replace(hint, actions=(*hint.actions, HintAction(ActionKind.EVICT, ended)))
            self._release(self.session_tree.release((client, ended)))
            self._release(self.session_tree.end((client, ended)), fetch=True)
        for action in hint.actions:
            if action.kind is ActionKind.EVICT:
                self._release(self.session_tree.release((client, action.agent)))
        keys = {agent: self.quotas.claim_by_hint(agent, client) for agent in hint.agents()}
        hint = replace(
            hint,
            steps={keys[agent]: steps for agent, steps in hint.steps.items()},
            actions=tuple(replace(action, agent=keys[action.agent]) for action in hint.actions),
        )
        changed = self.hints.add(hint, keys.values())
        self._changed |= changed
        for agent, key in keys.items():
            if agent.startswith(SESSION) and key in changed:
                self.conversations.hinted((client, agent), key)
        if hint.pause_s is not None and hint.agent is not None:
            self.graph.observe_pause(keys[hint.agent], hint.pause_s)

    # Sub-agents -------------------------------------------------------------------------------------------------

    def _link(self, client: str, child: str, parent: str) -> None:
        """The session `child` is a sub-agent of `parent`, whose conversation is kept as if it were needed next."""
        self._release(self.session_tree.link((client, child), (client, parent)))
        session = client, parent
        if session in self.session_tree and session not in self._parents:
            key = self._parents[session] = self.quotas.claim_by_hint(parent, client)
            self._parent_agents.add(key)
            self.conversations.hinted(session, key)
            self._changed.add(key)

    def _release(self, sessions: Iterable[Session], fetch: bool = False) -> None:
        """These sessions wait for no sub-agents any more.

        Args:
            fetch: the last one has ended, so the session is called next: its conversation is loaded ahead of that.
        """
        for session in sessions:
            key = self._parents.pop(session)
            self._parent_agents.discard(key)
            if fetch:
                self.hints.add(Hint("server", actions=(HintAction(ActionKind.FETCH, key),)), {key})
            self.conversations.changed(key)
            self._changed.add(key)
