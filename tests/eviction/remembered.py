"""Whether two caches hold and remember the same."""

from __future__ import annotations

from dataclasses import fields

import torch

from tenure.eviction import LayerView, RaggedCache
from tenure.eviction.recorded import QueryStatistics


def assert_same(one: RaggedCache, other: RaggedCache, atol: float = 0.0, rtol: float = 0.0, window: int = 0) -> None:
    """Entries, everything that policies have accumulated, the last `window` queries and all counters."""
    one.check()
    other.check()
    assert one.columns_seen == other.columns_seen == one.get_seq_length()
    assert one.tokens_seen.tolist() == other.tokens_seen.tolist()
    assert (one.entries, one.report().evictions) == (other.entries, other.report().evictions)
    for mine, yours in zip(one.ragged, other.ragged, strict=True):
        assert mine.store is not None and yours.store is not None
        assert mine.store.lengths == yours.store.lengths
        for name in mine.store.buffers:
            a, b = (LayerView(x, c.tokens_seen)._dense(name) for x, c in ((mine, one), (yours, other)))
            valid = LayerView(mine, one.tokens_seen).valid
            torch.testing.assert_close(a[valid], b[valid], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
        assert (mine.statistics is None) == (yours.statistics is None)
        if mine.statistics is not None:
            for field in fields(QueryStatistics):
                a, b = (getattr(x.statistics, field.name) for x in (mine, yours))
                torch.testing.assert_close(a, b, atol=atol, rtol=rtol, msg=lambda m, n=field.name: f"{n}: {m}")
        if window:
            assert torch.equal(*(_newest(c, window)[0] for c in (one, other))), "the same queries are remembered"
            queries = _queries(mine, one, window), _queries(yours, other, window)
            torch.testing.assert_close(*queries, atol=atol, rtol=rtol)


def _newest(cache: RaggedCache, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and slots of the last `window` queries of each row."""
    return cache.query_positions.topk(window, dim=1)


def _queries(layer, cache: RaggedCache, window: int) -> torch.Tensor:
    places, slots = _newest(cache, window)
    index = slots[:, None, :, None].expand(-1, layer.window.shape[1], -1, layer.window.shape[3])
    found = layer.window.gather(2, index)
    return found * (places >= 0)[:, None, :, None]
