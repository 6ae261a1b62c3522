"""Requests that are answered together: rows of one cache, a token each at every step.

Answers requests with a transformers model on what the tiers hold, driven by the scheduler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..eviction import get_policy, policy_text
from ..retention.seams import end_tokens
from .kvcache.eviction_policy import AllocStatus
from .prompt_cache import Compression, PromptKV
from .request import Ended, Request, StorePolicy
from .scheduler.request_state import Decode, Prefill

if TYPE_CHECKING:
    from ..eviction import RaggedCache, Session
    from .kvcache.base import TensorPayload
    from .system import System


class DecodeBatch:
    """The caches of the requests that are decoded.

    One request goes on in the cache that its prompt made. Several become the rows of a stack; whoever joins or leaves
    it costs a copy of the others' entries, about what a step reads.

    Attributes:
        rows: ids of the requests in the order of the cache's rows.
        cache: None if there are no rows.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[str] = []
        self.cache: RaggedCache | None = None

    def arrange(self, ids: Sequence[str], prompts: Mapping[str, RaggedCache]) -> list[str]:
        """Makes `ids` the rows, in an order that is returned; those that are no rows yet bring their prompts' caches.

        The caches of `prompts` belong to the batch from now on.
        """
        wanted = set(ids)
        stay = [place for place, row in enumerate(self.rows) if row in wanted]
        new = [one for one in ids if one not in self.rows]
        if not stay:
            self.cache = None
        elif len(stay) < len(self.rows):
            assert self.cache is not None, "there are rows"
            self.cache.select_rows(torch.tensor(stay))
        self.rows = [self.rows[place] for place in stay] + new
        if new:
            caches = [] if self.cache is None else [self.cache]
            caches += [prompts[one] for one in new]
            self.cache = caches[0] if len(caches) == 1 else self.session.stack(caches)
        return self.rows

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Extends every row by a token; logits `(rows, vocab)`."""
        assert self.cache is not None and len(tokens) == len(self.rows), "a token for each row"
        return self.session.extend(self.cache, torch.tensor(tokens).unsqueeze(1))[:, -1]

    def clear(self) -> None:
        """Drops all rows, as after a step that has failed."""
        self.rows, self.cache = [], None


logger = logging.getLogger(__name__)
Choose = Callable[[Request, torch.Tensor], int]


def greedy(request: Request, logits: torch.Tensor) -> int:
    """The most likely token of `logits`, `(vocab,)`."""
    return int(logits.argmax())


class Engine:
    """Computes what the scheduler hands out, prompts one by one and answers together, and ends what is answered.

    The tokens of an answer are those that the model gives without any cache, up to the rounding of a prompt computed in
    pieces: what is reused is what was computed, wherever it has been meanwhile.

    With a `compression`, the fixed prompt of every request that names one is compressed and stored so; suffix and
    answer are then not stored. Plain and compressed prompts, and those of different lengths, are never mixed.

    Args:
        session: inside an `evict(model, "full", observe=[…])` block that records what the compression's policy needs.
        system: whose tiers and scheduler are used, see `build_system`; its device pool must be on the model's device.
        compression: of fixed prompts; None: they are stored as they are.
        choose: picks the next token from logits `(vocab,)`.
    Attributes:
        busy_s: seconds spent on work of the scheduler so far, the copies of caches that it takes included.
    Raises:
        ValueError: the session evicts by itself, or the model or the policy cannot be used, see `PromptKV`.
    """

    def __init__(
        self,
        session: Session,
        system: System,
        compression: Compression | None = None,
        choose: Choose = greedy,
    ) -> None:
        if session.plan.evicts:
            raise ValueError(
                f"got a session under policy {session.plan.policy.name!r}; accepted: evict(model, 'full', observe=…), "
                "as the engine says what is compressed"
            )
        self.session, self.system, self.compression, self.choose = session, system, compression, choose
        self.kv = PromptKV(session)
        self.busy_s = 0.0
        if compression is not None:
            session.require_recorded(get_policy(compression.policy))
        self._ends = end_tokens(session.model)
        self._caches: dict[str, RaggedCache] = {}  # of prompts, until they are decoded
        self._answering = DecodeBatch(session)
        self._compressed: dict[str, TensorPayload] = {}

    def submit(self, request: Request) -> None:
        """Takes over a request; from any thread.

        Raises:
            ValueError: see `Scheduler.submit`; a prompt longer than the model's context.
        """
        limit = getattr(self.session.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        wanted = len(request.prompt) + request.max_new_tokens
        if limit is not None and wanted > limit:
            raise ValueError(f"got {wanted} tokens of prompt and answer; accepted: the model's {limit}")
        boundary = self._boundary(request)
        if boundary:
            namespace = self._namespace(request.namespace, boundary)
            request = replace(request, namespace=namespace, fixed_tokens=boundary, keep=StorePolicy.DISCARD)
        self.system.scheduler.submit(request)

    def prepare(self, prompt: Sequence[int]) -> TensorPayload:
        """The KV of a fixed prompt, whole pages of it, computed now and compressed as its requests would be."""
        tokens = self.system.tiers.whole_pages(len(prompt))
        if not tokens:
            page = self.system.tiers.page_size
            raise ValueError(f"got a fixed prompt of {len(prompt)} tokens; accepted: a page of {page} at the least")
        return self.kv.computed(prompt[:tokens], self.compression)

    def store(
        self, agent: str, prompt: Sequence[int], payload: TensorPayload, namespace: Hashable = None
    ) -> AllocStatus:
        """Offers the tiers an agent's fixed prompt, so that it is there before the agent's first request.

        Args:
            payload: what `prepare` made of the prompt; the tiers own it if they take it.

        Returns:
            READY, or why not, see `TieredCache.insert`.
        """
        tiers = self.system.tiers
        if self.compression is not None:
            namespace = self._namespace(namespace, payload.tokens)
        fixed = list(prompt[: payload.tokens])
        if self.system.prefetcher is not None:
            self.system.prefetcher.register(agent, fixed, namespace)
        with tiers.open(fixed, namespace) as handle:
            if handle.length == len(fixed):
                return AllocStatus.READY
            if handle.length and not payload.divisible:
                return AllocStatus.REFUSED
            rest = payload.split(handle.length)[1] if handle.length else payload
            return tiers.store(handle, fixed, rest, agent, len(fixed))

    def step(self, patience_s: float = 0.1) -> list[Ended]:
        """Computes the next piece of work, or waits for one; returns the requests that have ended."""
        scheduler = self.system.scheduler
        work = scheduler.next_work()
        if work is None:
            ended = self._take_ended()
            if not ended:
                scheduler.wait(patience_s)
            return ended
        begun = time.perf_counter()
        try:
            for item in work.prefills:
                self._run(item, lambda item=item: self._prefill(item))
            if work.decodes:
                self._decode(work.decodes)
        except BaseException as error:
            scheduler.complete(work, error=error)
            raise
        finally:
            self.busy_s += time.perf_counter() - begun
        scheduler.complete(work)
        return self._take_ended()

    def run(self) -> Iterator[Ended]:
        """Steps until all requests have ended; more may be submitted meanwhile."""
        while len(self.system.scheduler):
            yield from self.step()
        yield from self._take_ended()

    def _take_ended(self) -> list[Ended]:
        ended = self.system.scheduler.take_ended()
        for each in ended:
            self._caches.pop(each.request.id, None)
            self._compressed.pop(each.request.id, None)
        if not len(self.system.scheduler):
            self._answering.clear()
        return ended

    def _run(self, item: Prefill | Decode, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            logger.warning("request %r failed: %r", item.request.id, error)
            item.error = error

    @torch.no_grad()
    def _prefill(self, item: Prefill) -> None:
        request = item.request
        if item.first:
            self._caches[request.id] = self.kv.cache(item.handle.payloads())
        cache, start, boundary = self._caches[request.id], item.start, self._boundary(request)
        logits = None
        if item.start < boundary <= item.end:
            logits = self.kv.forward(cache, request.prompt[start:boundary])
            assert self.compression is not None
            self.kv.compress(cache, self.compression)
            self._compressed[request.id] = self.kv.compressed(cache)
            start = boundary
        if start < item.end:
            logits = self.kv.forward(cache, request.prompt[start : item.end])
        if item.store is not None:
            # What is refused room is offered once, though the next chunk would have to begin with it.
            item.payload = self._compressed.pop(request.id, None) if boundary else self.kv.plain(cache, *item.store)
        if item.last:
            assert logits is not None, "a prompt's last token is always computed"
            token = self.choose(request, logits)
            item.tokens, item.finished = [token], token in self._ends

    def _decode(self, items: Sequence[Decode]) -> None:
        """A token for each of `items`; if the model fails, all of them have."""
        of = {item.request.id: item for item in items}
        batch = self._answering
        try:
            rows = list(batch.arrange(list(of), self._caches))
            for one in rows:
                self._caches.pop(one, None)
            logits = batch.step([of[one].entry.tokens[-1] for one in rows])
        except Exception as error:
            logger.warning("requests %s failed: %r", ", ".join(map(repr, of)), error)
            batch.clear()
            for item in items:
                item.error = error
            return
        for row, one in enumerate(rows):
            self._run(of[one], lambda item=of[one], row=row: self._take(item, logits[row], row))

    def _take(self, item: Decode, logits: torch.Tensor, row: int) -> None:
        token = self.choose(item.request, logits)
        item.tokens, item.finished = [token], token in self._ends
        span = None if self._boundary(item.request) else item.store_span()
        if span is not None:
            assert self._answering.cache is not None, "it has just been extended"
            item.payload = self.kv.plain(self._answering.cache, *span, row=row)

    def _namespace(self, namespace: Hashable, boundary: int) -> Hashable:
        """Keeps apart what was compressed in another way, or together with other tokens."""
        how = self.compression
        assert how is not None
        policy = policy_text(get_policy(how.policy))
        return namespace, policy, how.budget, how.scope, how.sinks, how.recent, boundary

    def _boundary(self, request: Request) -> int:
        """Where the part of the prompt ends that is compressed; 0 if none is."""
        if self.compression is None or request.agent is None:
            return 0
        return self.system.tiers.whole_pages(min(request.fixed_tokens, len(request.prompt) - 1))
