"""A lease: one user of a prompt's cached part, from the match to the release."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from .copies import CopyJob, Urgency
from .eviction import Room
from .node import Node, Tier
from .payload import Payload
from .transfers import fastest

if TYPE_CHECKING:
    from .tiers import TieredTree


class LoadState(Enum):
    READY = "everything is on the device"
    LOADING = "copies are under way; ask again"
    WAITING = "room on the device is being made; ask again"
    NO_ROOM = "the device has no room, and nothing may go: compute it, or ask again when others are done"
    LOST = "a part cannot be read back: release the lease and open the prompt anew"


class Lease:
    """Keeps the first `length` tokens of a prompt from being evicted, from the tiers that hold them.

    Made by `TieredTree.open`. Its methods may be called from any thread.

    Attributes:
        number: among the leases of the tree.
        node: where the leased part ends; the root if it is empty.
    """

    def __init__(self, tiers: TieredTree, number: int, node: Node) -> None:
        self._tiers, self.number, self.node = tiers, number, node

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def length(self) -> int:
        """Tokens covered, from the beginning of the prompt."""
        return self.node.end

    @property
    def live(self) -> bool:
        return self.number in self._tiers.leases

    def nodes(self) -> list[Node] | None:
        """The nodes that hold the KV, in order; None if a part was lost."""
        with self._tiers.lock:
            return self.node.chain()

    def load(self, urgency: Urgency = Urgency.DEMAND, priority: float = 0.0, only_below: bool = False) -> LoadState:
        """Sees to it that everything leased comes to the device; to be called until it is READY.

        Either all that is missing has room and its copies begin, or none does. A demand takes the room of prefetches
        that are under way if there is no other. What is being loaded already is not
        loaded twice, but becomes as urgent as asked for here.

        Args:
            urgency, priority: of the copies, see `CopyJob`.
            only_below: evict only what the order lets go for the leased prompt (`Order.displaced`); for prefetching.
        """
        tiers = self._tiers
        with tiers.lock:
            self._require_live()
            tiers.poll()
            chain = self.node.chain()
            if chain is None:
                return LoadState.LOST
            missing = [node for node in chain if node.copies[Tier.DEVICE] is None]
            if not missing:
                return LoadState.READY
            for node in missing:
                self._join(node.flight, urgency, priority)
            return self._begin([node for node in missing if node.flight is None], urgency, priority, only_below)

    def _join(self, flight: CopyJob | None, urgency: Urgency, priority: float) -> None:
        transfers = self._tiers.transfers
        if flight is None:
            return
        flight.waiters.add(self.number)
        if flight.target is not Tier.DEVICE:
            transfers.mover.cancel(flight)  # on its way from the host to the disk; it keeps the copy it has
        elif (urgency, priority) < (flight.urgency, flight.priority):
            transfers.promote(flight, urgency, priority)

    def _begin(self, nodes: list[Node], urgency: Urgency, priority: float, only_below: bool) -> LoadState:
        tiers = self._tiers
        pool = tiers.pools[Tier.DEVICE]
        payloads = [node.copies[source] for node in nodes if (source := fastest(node)) is not None]
        needed = sum(pool.charge(payload) for payload in payloads if payload is not None)
        below = None
        if only_below:
            below = tiers.eviction.policy.order.displaced(tiers.residency.candidates[Tier.DEVICE].rank(self.node))
        room = tiers.eviction.make_room(Tier.DEVICE, needed, below, hurry=urgency is Urgency.DEMAND)
        if (
            room is Room.REFUSED
            and urgency is Urgency.DEMAND
            and tiers.transfers.cancel_prefetches(Tier.DEVICE, needed)
        ):
            return LoadState.WAITING
        if room is not Room.READY:
            return LoadState.WAITING if room is Room.PENDING else LoadState.NO_ROOM
        for node in nodes:
            if not tiers.transfers.start(node, Tier.DEVICE, urgency, priority):
                return LoadState.NO_ROOM
            if node.flight is not None:
                node.flight.waiters.add(self.number)
        return LoadState.LOADING

    def wait(self, timeout_s: float) -> LoadState:
        """Loads on demand and waits until the state is final, or for that long; returns the last state."""
        tiers = self._tiers
        deadline = tiers.clock() + timeout_s
        while True:
            ended = tiers.transfers.mover.ended
            state = self.load()
            left = deadline - tiers.clock()
            if state not in (LoadState.LOADING, LoadState.WAITING) or left <= 0:
                return state
            tiers.transfers.mover.wait(ended, left)

    def payloads(self) -> list[Payload]:
        """What the device holds of the leased tokens, in order; to be read before the release.

        Raises:
            ValueError: the lease is not READY.
        """
        with self._tiers.lock:
            self._require_live()
            chain = self.node.chain()
            found = [] if chain is None else [node.copies[Tier.DEVICE] for node in chain]
            payloads = [payload for payload in found if payload is not None]
            if chain is None or len(payloads) < len(chain):
                raise ValueError("the leased prompt is not on the device: call load() until it says READY")
            return payloads

    def shorten(self, node: Node) -> None:
        """Covers only what ends at `node`, one of `nodes()` or their root; the rest may be evicted again."""
        with self._tiers.lock:
            self._require_live()
            self.cancel()
            before, self.node = self.node, node
            self._tiers.residency.unlock(before, above=node)

    def cancel(self) -> None:
        """This lease does not wait for loads any more; those that nobody else waits for are cancelled."""
        with self._tiers.lock:
            for node in self.node.path():
                flight = node.flight
                if flight is not None and self.number in flight.waiters:
                    flight.waiters.remove(self.number)
                    if not flight.waiters:
                        self._tiers.transfers.mover.cancel(flight)

    def release(self) -> None:
        """Ends the lease, and its loads as `cancel`; nothing happens the second time."""
        with self._tiers.lock:
            if self._tiers.leases.pop(self.number, None) is not None:
                self.cancel()
                self._tiers.residency.unlock(self.node)
                self._tiers.save_ahead()

    def _require_live(self) -> None:
        if not self.live:
            raise ValueError("this lease has been released")
