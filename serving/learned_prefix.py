"""Where an agent's fixed prompt ends, learned from its calls: the prefix that they have in common."""

from __future__ import annotations

from collections.abc import Hashable

from .pages import TOKEN_BYTES, Pages, common_pages

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
