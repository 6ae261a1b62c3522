"""The namespaces that each client has used lately: its prompts may be cached in another one than it asks for."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from .kvcache.eviction_history import MissReason


class ClientNamespaces:
    """A bounded record; the least recently used are forgotten. Used under the cache's lock.

    Args:
        max_clients: clients remembered. max_namespaces: of each client.
    Attributes:
        own: the client's namespace inside one that an engine has made of it, to separate plain and compressed prompts.
    """

    def __init__(self, max_clients: int, max_namespaces: int) -> None:
        self.own: Callable[[Hashable], Hashable] = lambda namespace: namespace
        self._max_clients, self._max_namespaces = max_clients, max_namespaces
        self._used: dict[str, dict[Hashable, None]] = {}  # the least recently used first

    def observe(self, client: str, namespace: Hashable) -> None:
        """A request of `client` in `namespace` has arrived."""
        used = self._used.pop(client, None)
        used = self._used[client] = {} if used is None else used
        used.pop(namespace, None)
        used[namespace] = None
        if len(used) > self._max_namespaces:
            del used[next(iter(used))]
        if len(self._used) > self._max_clients:
            del self._used[next(iter(self._used))]

    def others(self, client: str, namespace: Hashable) -> list[tuple[Hashable, MissReason]]:
        """The other namespaces of `client`, and the reason to give for what is cached there.

        Those that differ in how prompts are compressed come first; of each kind, the latest.
        """
        own, same, different = self.own(namespace), [], []
        for other in reversed(self._used.get(client, {})):
            if other != namespace and self.own(other) == own:
                same.append((other, MissReason.OTHER_COMPRESSION))
            elif other != namespace:
                different.append((other, MissReason.OTHER_NAMESPACE))
        return same + different
