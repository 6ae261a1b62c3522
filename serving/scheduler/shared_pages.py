"""Pages that several requests need and one of them computes: the others wait until these are stored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from ..kvcache.radix_tree import TOKEN_BYTES, Pages, common_pages
from .request_state import RequestState, RequestTimers


class SharedPages:
    """Requests that compute what others need, and those that wait for it. Used under the cache's lock.

    A request *leads* from its admission until its prompt is computed. One that begins with the same pages, and does not
    find them in the cache, *follows*: it holds nothing, and waits until the common pages are stored, or until the
    leader has passed them without storing them, has ended, or has completed no chunk for `patience_s`. Then it is
    released, to be admitted with what the cache has by then. After having waited in vain it does not follow again.

    Only admitted requests lead and only waiting ones follow, so nobody waits in a circle.

    Args:
        patience_s: `SchedulerConfig.page_patience_s`; 0: nobody follows.
    """

    def __init__(self, patience_s: float, page_size: int, timers: RequestTimers, clock: Callable[[], float]) -> None:
        self.patience_s, self.page_size, self.timers, self.clock = patience_s, page_size, timers, clock
        self._leaders: dict[Hashable, dict[RequestState, Pages]] = {}  # their pages, by namespace and first page
        self._followers: dict[RequestState, dict[RequestState, int]] = {}  # by leader: the end of the common pages
        self._leader_of: dict[RequestState, RequestState] = {}

    def __len__(self) -> int:
        """Requests that follow another one."""
        return len(self._leader_of)

    def __iter__(self) -> Iterator[RequestState]:
        """The requests that follow another one."""
        return iter(self._leader_of)

    def __contains__(self, state: RequestState) -> bool:
        return state in self._leader_of

    def lead(self, state: RequestState) -> None:
        """`state` has been admitted, and computes what its handle does not cover."""
        if self.patience_s and state.lookup_key:
            state.progressed_at = self.clock()
            known = min(state.num_known_tokens, state.prefill_end)
            self._leaders.setdefault(self._group(state), {})[state] = state.pages(state.storable_end(known))

    def find(self, state: RequestState, found: int) -> tuple[RequestState, int] | None:
        """The leader that will store most of the pages of `state` behind the first `found` tokens, and their end."""
        best = None
        if not state.waits_for_pages or len(state.lookup_key) <= found * TOKEN_BYTES:
            return None
        for leader, pages in self._leaders.get(self._group(state), {}).items():
            end = common_pages(pages, state.lookup_key, 0, self.page_size * TOKEN_BYTES) * self.page_size
            if end > max(found, leader.num_computed_tokens, 0 if best is None else best[1]):
                best = leader, end
        return best

    def follow(self, state: RequestState, leader: RequestState, end: int) -> None:
        """`state` waits until `leader` has stored the tokens up to `end`."""
        self._leader_of[state], state.followed_since = leader, self.clock()
        self._followers.setdefault(leader, {})[state] = end
        self.timers.set(self.clock() + self.patience_s, state)

    def remove(self, state: RequestState) -> list[RequestState]:
        """`state` neither leads nor follows any more; returns those that followed it, which are released."""
        group = self._leaders.get(self._group(state), {})
        if group.pop(state, None) is not None and not group:
            del self._leaders[self._group(state)]
        self._release(state)
        return self._release_all(list(self._followers.get(state, ())))

    def progress(self, leader: RequestState) -> list[RequestState]:
        """`leader` has completed a chunk; returns the requests that are released by it."""
        followers = self._followers.get(leader, {})
        return self._release_all([state for state, end in followers.items() if leader.num_computed_tokens >= end])

    def has_lost_patience(self, state: RequestState) -> bool:
        """Whether a follower's leader has stopped making progress; then it is released and does not follow again."""
        due = self._leader_of[state].progressed_at + self.patience_s
        if self.clock() < due:
            self.timers.set(due, state)
            return False
        self._release(state)
        state.waits_for_pages = False
        return True

    def _release_all(self, followers: list[RequestState]) -> list[RequestState]:
        for state in followers:
            self._release(state)
        return followers

    def _release(self, state: RequestState) -> None:
        leader = self._leader_of.pop(state, None)
        if leader is not None:
            state.shared_s += self.clock() - state.followed_since
            del self._followers[leader][state]
            if not self._followers[leader]:
                del self._followers[leader]

    def _group(self, state: RequestState) -> Hashable:
        return state.request.namespace, bytes(state.lookup_key[: self.page_size * TOKEN_BYTES])

    def check(self) -> None:
        """Raises AssertionError unless leaders and followers agree."""
        leaders = {state for group in self._leaders.values() for state in group}
        assert all(self._leaders.values()) and all(self._followers.values()), "nothing empty is kept"
        assert self._followers.keys() <= leaders, "only admitted requests are waited for"
        pairs = {(state, leader) for leader, states in self._followers.items() for state in states}
        assert pairs == set(self._leader_of.items()), "who waits for whom is known both ways"
