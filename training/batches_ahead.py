"""The next batch, made in a thread while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from .batching import Batch


class BatchesAhead:
    """Makes batches by number of their first example, one ahead of the one that is asked for.

    Reading, tokenising synthetic documents and collating run in one thread; moving to the device is left to the caller.
    An error of a batch is raised when that batch is asked for.

    Args:
        make: the batch that begins with an example.
    """

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def get(self, first: int, following: int | None) -> Batch:
        """The batch that begins with example `first`; `following` is the one to begin with next, None for none."""
        number, future = self._ahead or (None, None)
        if future is None or number != first:
            future = self._thread.submit(self.make, first)
        batch = future.result()
        self._ahead = None if following is None else (following, self._thread.submit(self.make, following))
        return batch

    def close(self) -> None:
        """Waits for the batch that is being made, and drops it."""
        self._thread.shutdown(cancel_futures=True)
