"""The prompts that a prefetcher has on their way to the device, and what waits for a client's flights to end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .lease import Lease
from .wishes import Wish


@dataclass(eq=False)
class Flight:
    """A prompt on its way; the lease keeps it until it has arrived."""

    wish: Wish
    lease: Lease
    nbytes: int
    seconds: float
    client: str


class Flights:
    """By agent, by lease, and by client.

    Attributes:
        nbytes, seconds: of all of them together.
    """

    def __init__(self) -> None:
        self.nbytes, self.seconds = 0, 0.0
        self._by_agent: dict[str, Flight] = {}
        self._by_lease: dict[int, Flight] = {}
        self._parked: dict[str, dict[Wish, None]] = {}

    def __len__(self) -> int:
        return len(self._by_agent)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._by_agent.values()))

    def __contains__(self, agent: str) -> bool:
        return agent in self._by_agent

    def __getitem__(self, agent: str) -> Flight:
        return self._by_agent[agent]

    def of_lease(self, number: int) -> Flight | None:
        return self._by_lease.get(number)

    def leases(self) -> set[int]:
        """The numbers of their leases."""
        return set(self._by_lease)

    def of_client(self, client: str) -> int:
        """Bytes on their way for `client`."""
        return sum(flight.nbytes for flight in self._by_agent.values() if flight.client == client)

    def add(self, flight: Flight) -> None:
        self._by_agent[flight.wish.agent] = self._by_lease[flight.lease.number] = flight
        self.nbytes, self.seconds = self.nbytes + flight.nbytes, self.seconds + flight.seconds

    def park(self, wish: Wish, client: str) -> None:
        """It is beyond the share of `client`, which has flights: it waits for one of them to end."""
        self._parked.setdefault(client, {})[wish] = None

    def remove(self, flight: Flight) -> list[Wish]:
        """It is over; returns the wishes that waited for it."""
        del self._by_agent[flight.wish.agent], self._by_lease[flight.lease.number]
        self.nbytes, self.seconds = self.nbytes - flight.nbytes, self.seconds - flight.seconds
        return list(self._parked.pop(flight.client, {}))
