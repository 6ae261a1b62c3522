"""Sessions and their sub-agents: a session whose sub-agents are running waits for them, and is needed when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tenure.checked import Count, Positive, verify

from .conversations import Session
from .lazy_heap import LazyHeap


@dataclass(frozen=True)
class SessionTreeConfig:
    """Bounds of a `SessionTree`.

    Attributes:
        silence_s: seconds without a call or an answer, its own or of its sub-agents, after which one counts as ended.
        max_children: running sub-agents of all clients; beyond, the one that has been silent longest counts as ended.
        max_depth: levels of sub-agents above one another; activity is not passed on beyond.
    """

    silence_s: Positive = 300.0
    max_children: Count = 10_000
    max_depth: Count = 16

    def __post_init__(self) -> None:
        verify(self)


class SessionTree:
    """The running sub-agents of each session. Not thread-safe: used under the cache's lock.

    A child runs until it ends, or is silent for `silence_s`. `clock` gives seconds.
    """

    def __init__(self, clock: Callable[[], float], config: SessionTreeConfig | None = None) -> None:
        self.config = config or SessionTreeConfig()
        self._clock = clock
        self._parents: dict[Session, Session] = {}
        self._children: dict[Session, set[Session]] = {}
        self._silent: LazyHeap[Session] = LazyHeap()  # children, by the time at which they count as ended

    def __len__(self) -> int:
        """Number of running sub-agents."""
        return len(self._parents)

    def __contains__(self, session: object) -> bool:
        """Whether `session` waits for sub-agents."""
        return session in self._children

    def children(self, session: Session) -> list[Session]:
        """The running sub-agents of `session`, sorted."""
        return sorted(self._children.get(session, ()))

    def parent(self, session: Session) -> Session | None:
        """The session that waits for `session`."""
        return self._parents.get(session)

    def link(self, child: Session, parent: Session) -> list[Session]:
        """`child` is a sub-agent of `parent` from now on; no effect if it is `parent` itself or above it.

        Returns:
            The sessions that wait for nobody any more: a parent that the child had before, or one beyond the bounds.
        """
        if child[0] != parent[0] or child in (parent, *self._above(parent)):
            return []
        released: list[Session] = []
        if self._parents.get(child) != parent:
            released += self._unlink(child)
            self._parents[child] = parent
            self._children.setdefault(parent, set()).add(child)
        self.observe(child)
        while len(self._parents) > self.config.max_children:
            first = self._silent.peek()
            assert first is not None, "every child ends"
            released += self._unlink(first)
        return [one for one in released if one not in self._children]

    def observe(self, session: Session) -> None:
        """`session` calls or is answered: it runs, and so do those that wait for it."""
        if not self._parents:
            return
        ends = self._clock() + self.config.silence_s
        for one in (session, *self._above(session)):
            if one in self._parents:
                self._silent.push(one, ends)

    def end(self, child: Session) -> list[Session]:
        """A sub-agent has ended; returns its parent if it waits for nobody any more."""
        return self._unlink(child)

    def release(self, session: Session) -> list[Session]:
        """`session` no longer waits for its sub-agents; returns it, if it did."""
        children = self._children.pop(session, None)
        for child in children or ():
            del self._parents[child]
            self._silent.discard(child)
        return [] if children is None else [session]

    def pop_silent(self) -> list[Session]:
        """Ends the children that have been silent; returns the sessions that wait for nobody any more."""
        released: list[Session] = []
        for child in self._silent.pop_until(self._clock()):
            released += self._unlink(child)
        return released

    def _above(self, session: Session) -> Iterator[Session]:
        """The sessions that wait for `session`, the nearest first."""
        for _ in range(self.config.max_depth):
            above = self._parents.get(session)
            if above is None:
                return
            yield above
            session = above

    def _unlink(self, child: Session) -> list[Session]:
        """Removes a child; returns its parent if that was the last one."""
        self._silent.discard(child)
        parent = self._parents.pop(child, None)
        if parent is None:
            return []
        self._children[parent].discard(child)
        if self._children[parent]:
            return []
        del self._children[parent]
        return [parent]
