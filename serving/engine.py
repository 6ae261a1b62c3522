"""Serves requests with a transformers model: computes the scheduler's batches on KV that lies in the tiered cache.

Prompts are computed one by one, in the chunks that the scheduler asks for; all answers are decoded together, as rows of
one cache.
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
from .kvcache.base import TensorPayload
from .kvcache.eviction_policy import AllocStatus
from .prompt_cache import Compression, PromptKV
from .request import Request, RequestOutput, StorePolicy
from .scheduler.request_state import ScheduledDecode, ScheduledPrefill
from .system import System

if TYPE_CHECKING:
    from ..eviction import RaggedCache, Session

logger = logging.getLogger(__name__)
Sampler = Callable[[Request, torch.Tensor], int]


def greedy(request: Request, logits: torch.Tensor) -> int:
    """The most likely token of `logits`, `(vocab,)`."""
    return int(logits.argmax())


class DecodeBatch:
    """The caches of the requests that are decoded together.

    A single request continues in the cache of its prompt. Several become the rows of one stacked cache; when a request
    joins or leaves, the entries of the others are copied, which costs about as much as a step reads.

    Attributes:
        rows: ids of the requests in the order of the cache's rows.
        cache: owned by the batch; None if there are no rows.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[str] = []
        self.cache: RaggedCache | None = None

    def arrange(self, ids: Sequence[str], prompts: Mapping[str, RaggedCache]) -> list[str]:
        """Makes `ids` the rows and returns their order.

        Args:
            prompts: caches of the ids that are not rows yet; the batch owns them from now on.
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
        """Extends every row by one token; returns the logits `(rows, vocab)`."""
        assert self.cache is not None and len(tokens) == len(self.rows), "a token for each row"
        return self.session.extend(self.cache, torch.tensor(tokens).unsqueeze(1))[:, -1]

    def clear(self) -> None:
        self.rows, self.cache = [], None


class Engine:
    """A transformers model behind the scheduler.

    An answer's tokens are those of the model without any cache, up to the rounding of a prompt computed in chunks:
    reused KV is bit for bit the KV that was computed, wherever it has been stored meanwhile.

    With a `compression`, the fixed prompt of every request that names an agent is compressed and stored so; suffix and
    answer are then not stored. Plain and compressed prompts, and prompts compressed at different lengths, are never
    mixed: they are kept in different namespaces.

    `submit` may be called from any thread; `step` and `run` from one thread only. `prepare` and `store` run the model
    or copy into the cache, and belong to the same thread.

    Args:
        session: inside an `evict(model, "full", observe=[...])` block that records what the compression's policy needs.
        system: from `build_system`; its device pool must be on the model's device. The caller closes it.
        compression: of fixed prompts; None: they are stored as they are.
        sampler: picks the next token of a request from its logits `(vocab,)`.
    Attributes:
        busy_s: seconds spent on batches so far, including copies between caches and payloads.
    Raises:
        ValueError: the session evicts by itself, or the model or the policy cannot be used, see `PromptKV`.
    """

    def __init__(
        self, session: Session, system: System, compression: Compression | None = None, sampler: Sampler = greedy
    ) -> None:
        if session.plan.evicts:
            raise ValueError(
                f"got a session under policy {session.plan.policy.name!r}; accepted: evict(model, 'full', observe=…), "
                "as the engine itself decides what is compressed"
            )
        self.session, self.system, self.compression, self.sampler = session, system, compression, sampler
        self.kv = PromptKV(session)
        self.busy_s = 0.0
        if compression is not None:
            session.require_recorded(get_policy(compression.policy))
        self._ends = end_tokens(session.model)
        self._caches: dict[str, RaggedCache] = {}  # of prompts, until they are decoded; by request id
        self._decoding = DecodeBatch(session)
        self._compressed: dict[str, TensorPayload] = {}  # fixed prompts until they are offered; by request id

    def submit(self, request: Request) -> None:
        """Submits a request.

        Raises:
            ValueError: see `Scheduler.submit`; prompt and answer exceed the model's context.
        """
        limit = getattr(self.session.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        wanted = len(request.prompt) + request.max_new_tokens
        if limit is not None and wanted > limit:
            raise ValueError(f"got {wanted} tokens of prompt and answer; accepted: the model's {limit}")
        boundary = self._boundary(request)
        if boundary:
            namespace = self._namespace(request.namespace, boundary)
            request = replace(request, namespace=namespace, fixed_tokens=boundary, store_policy=StorePolicy.DISCARD)
        self.system.scheduler.submit(request)

    def prepare(self, prompt: Sequence[int]) -> TensorPayload:
        """Computes the KV of a fixed prompt's whole pages, compressed as for its requests.

        Raises:
            ValueError: the prompt is shorter than a page.
        """
        tokens = self.system.tiers.whole_pages(len(prompt))
        if not tokens:
            page = self.system.tiers.page_size
            raise ValueError(f"got a fixed prompt of {len(prompt)} tokens; accepted: a page of {page} at the least")
        return self.kv.compute(prompt[:tokens], self.compression)

    def store(
        self, agent: str, prompt: Sequence[int], payload: TensorPayload, namespace: Hashable = None
    ) -> AllocStatus:
        """Stores an agent's fixed prompt before its first request.

        Args:
            payload: `prepare(prompt)`; the cache owns it if it takes it.

        Returns:
            READY if the whole prompt is cached now; otherwise why not, see `TieredCache.insert`.
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

    def step(self, patience_s: float = 0.1) -> list[RequestOutput]:
        """Computes the next batch and returns the requests that have ended.

        Args:
            patience_s: seconds to wait for something to change if there is nothing to compute.
        """
        scheduler = self.system.scheduler
        batch = scheduler.next_batch()
        if batch is None:
            finished = self._take_finished()
            if not finished:
                scheduler.wait(patience_s)
            return finished
        begun = time.perf_counter()
        try:
            for item in batch.prefills:
                self._guard(item, lambda item=item: self._prefill(item))
            if batch.decodes:
                self._decode(batch.decodes)
        except BaseException as error:
            scheduler.complete(batch, error=error)
            raise
        finally:
            self.busy_s += time.perf_counter() - begun
        scheduler.complete(batch)
        return self._take_finished()

    def run(self) -> Iterator[RequestOutput]:
        """Steps until all requests have ended, yielding each output; requests may be submitted meanwhile."""
        while len(self.system.scheduler):
            yield from self.step()
        yield from self._take_finished()

    def _take_finished(self) -> list[RequestOutput]:
        finished = self.system.scheduler.take_finished()
        for each in finished:
            self._caches.pop(each.request.id, None)
            self._compressed.pop(each.request.id, None)
        if not len(self.system.scheduler):
            self._decoding.clear()
        return finished

    def _guard(self, item: ScheduledPrefill | ScheduledDecode, call: Callable[[], None]) -> None:
        """Runs `call`; an exception ends this item's request only."""
        try:
            call()
        except Exception as error:
            logger.warning("request %r failed: %r", item.request.id, error)
            item.error = error

    @torch.no_grad()
    def _prefill(self, item: ScheduledPrefill) -> None:
        request = item.request
        if item.first:
            self._caches[request.id] = self.kv.import_payloads(item.handle.payloads())
        cache, start, boundary = self._caches[request.id], item.start, self._boundary(request)
        logits = None
        if item.start < boundary <= item.end:
            logits = self.kv.forward(cache, item.state.token_ids(start, boundary))
            assert self.compression is not None
            self.kv.compress(cache, self.compression)
            self._compressed[request.id] = self.kv.export_compressed(cache)
            start = boundary
        if start < item.end:
            logits = self.kv.forward(cache, item.state.token_ids(start, item.end))
        if item.store is not None:
            # Offered once only: after a refusal the next chunk would have to begin with it.
            item.payload = (
                self._compressed.pop(request.id, None) if boundary else self.kv.export_plain(cache, *item.store)
            )
        if item.last:
            assert logits is not None, "a prompt's last token is always computed"
            token = self.sampler(request, logits)
            item.tokens, item.finished = [token], token in self._ends

    def _decode(self, items: Sequence[ScheduledDecode]) -> None:
        """Decodes a token of each item; if the model fails, all of their requests fail."""
        of = {item.request.id: item for item in items}
        batch = self._decoding
        try:
            rows = list(batch.arrange(list(of), self._caches))
            for one in rows:
                self._caches.pop(one, None)
            logits = batch.step([of[one].state.output_tokens[-1] for one in rows])
        except Exception as error:
            logger.warning("requests %s failed: %r", ", ".join(map(repr, of)), error)
            batch.clear()
            for item in items:
                item.error = error
            return
        for row, one in enumerate(rows):
            self._guard(of[one], lambda item=of[one], row=row: self._finish_decode(item, logits[row], row))

    def _finish_decode(self, item: ScheduledDecode, logits: torch.Tensor, row: int) -> None:
        token = self.sampler(item.request, logits)
        item.tokens, item.finished = [token], token in self._ends
        span = None if self._boundary(item.request) else item.store_span()
        if span is not None:
            assert self._decoding.cache is not None, "it has just been extended"
            item.payload = self.kv.export_plain(self._decoding.cache, *span, row=row)

    def _namespace(self, namespace: Hashable, boundary: int) -> Hashable:
        """Separates fixed prompts by how, and up to which token, they were compressed."""
        how = self.compression
        assert how is not None
        policy = policy_text(get_policy(how.policy))
        return namespace, policy, str(how.budget), how.scope, how.sinks, how.recent, boundary

    def _boundary(self, request: Request) -> int:
        """Length of the compressed part of the prompt in tokens; 0 if nothing is compressed."""
        if self.compression is None or request.agent is None:
            return 0
        return self.system.tiers.whole_pages(min(request.fixed_tokens, len(request.prompt) - 1))
