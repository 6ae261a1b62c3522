"""What follows fixed prompts: whether it is used again, learned, so that only what pays is saved in a tier below."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from .node import Node, Tier
from .orders import Costs

REMEMBERED = 64  # saved suffixes that the chance is read from
TRUST = 4.0  # saved suffixes of an agent that count as much as all that is known of the others
PRIOR = 4.0  # suffixes that count as much as what is believed before any has left the device
FADING = 0.98  # of what is known, with every suffix that leaves
HOPE, DOUBT = 0.5, 4.0  # of `DOUBT` suffixes before the first, `HOPE` are taken to have been used again
EXPLORE = 64  # one in so many that would be dropped is saved all the same


class SuffixReuse:
    """Learns from the suffixes that were saved how many of an agent's are used again.

    A suffix whose chance of being used again is p saves p · (recompute − reload) seconds and costs the link about
    reload seconds now: it pays if the former is more. Suffixes that were dropped tell nothing, as nobody could use
    them; so some are saved all the same, and an agent that begins to continue its conversations is found out.

    Read under the lock of the tiers.

    Args:
        costs: seconds to recompute or to reload.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self._saved: deque[tuple[Node, int, Hashable]] = deque(maxlen=REMEMBERED)
        self._dropped = 0
        self._used = self._left = 0.0

    def left(self, node: Node) -> None:
        """A suffix leaves the device."""
        self._used = FADING * self._used + (node.hits > 0)
        self._left = FADING * self._left + 1

    def used(self, believed: float) -> float:
        """The share of suffixes that were used again while they lay on the device; `believed` before any left."""
        return (self._used + PRIOR * believed) / (self._left + PRIOR)

    def pays(self, node: Node, tier: Tier) -> bool:
        """Whether a copy of `node` in the tier below `tier` is worth its time on the link."""
        if self._dropped >= EXPLORE:
            return True
        reload = self.costs.reload_s(node.nbytes, tier)
        gain = self.costs.recompute_s(node.end - node.covers, node.end) - reload
        return self.chance(node) * gain > reload

    def chance(self, node: Node) -> float:
        """That it is used again, 0 to 1: as often as other saved ones behind the same fixed prompt, and elsewhere."""
        key = _prompt(node)
        everywhere, own = [0, 0], [0, 0]
        for saved, hits, other in self._saved:
            used = saved.hits > hits
            everywhere[0] += used
            everywhere[1] += 1
            if other == key:
                own[0] += used
                own[1] += 1
        among_all = (everywhere[0] + HOPE) / (everywhere[1] + DOUBT)
        return (own[0] + TRUST * among_all) / (own[1] + TRUST)

    def saved(self, node: Node) -> None:
        """`node` is on its way into a tier below."""
        if self._dropped >= EXPLORE:
            self._dropped = 0
        self._saved.append((node, node.hits, _prompt(node)))

    def dropped(self) -> None:
        """A suffix was dropped because it did not pay."""
        self._dropped += 1


def _prompt(node: Node) -> Hashable:
    """The agents whose fixed prompt `node` follows."""
    for each in node.path():
        if each.fixed:
            return frozenset(each.group.agents)
    return frozenset()
