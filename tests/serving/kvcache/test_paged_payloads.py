"""Prompts in pages that become payloads, move through a tier and come back into pages, by the kernels."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict
from tenure.eviction.ops import copy_entries
from tenure.eviction.storage.paged_store import PagedStore
from tenure.retention import RetentionGates
from tenure.retention.ops.kernel_choice import interpreting
from tenure.serving import MemoryPool, TensorPayload
from tenure.serving.kvcache.base import KVPayload
from tenure.serving.prompt_cache import Compression, PromptKV

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LAYERS = 2
DEVICE = "cpu" if interpreting() else "cuda"


def through_host(payload: KVPayload) -> KVPayload:
    """A copy in the host's pool and from there in the device's, layer by layer as a transfer backend makes them."""
    for pool in (MemoryPool(10**6, pinned=DEVICE == "cuda"), MemoryPool(10**6, DEVICE)):
        builder = pool.new_builder(payload)
        for layer in range(len(payload.layers)):
            builder.write(layer, payload.read(layer))
        payload = builder.commit()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return payload


def assert_equal(one: KVPayload, other: KVPayload) -> None:
    assert isinstance(one, TensorPayload) and isinstance(other, TensorPayload)
    assert one.kinds() == other.kinds() and one.nbytes == other.nbytes
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, other.tensors[name]), name


@torch.no_grad()
def test_one_launch_a_layer_out_of_pages_and_back(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    launches: list[int] = []
    real = copy_entries._launch
    monkeypatch.setattr(copy_entries, "_launch", lambda *inputs: launches.append(inputs[-1]) or real(*inputs))
    model = tiny_model("llama", num_hidden_layers=LAYERS).to(DEVICE)
    torch.manual_seed(0)
    gates = RetentionGates.for_model(model, gate_width=8, initial_bias=1.0, init_std=0.5).to(DEVICE)
    ids = torch.randint(3, 128, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    with evict(model, "full", gates=gates, observe=["retention"]) as session:
        kv, cache = PromptKV(session), session.new_cache()
        kv.forward(cache, ids)
        assert all(isinstance(store, PagedStore) for store in cache.stores)

        def by_both(payload: str) -> KVPayload:
            """`plain` or `compressed`, by the kernel and by its twin."""
            made = []
            for kernels in ("reference", "triton"):
                monkeypatch.setenv("TENURE_KERNELS", kernels)
                launches.clear()
                made.append(kv.export_plain(cache, 5, 37) if payload == "plain" else kv.export_compressed(cache))
                assert len(launches) == (0 if kernels == "reference" else LAYERS)
            assert_equal(*made)
            return made[1]

        middle = by_both("plain")
        parts = [through_host(one) for one in (kv.export_plain(cache, 0, 5), middle, kv.export_plain(cache, 37, 41))]
        launches.clear()
        again = kv.import_payloads(parts)
        assert len(launches) == LAYERS and all(isinstance(store, PagedStore) for store in again.stores)
        assert_equal(kv.export_plain(again, 5, 37), middle)
        torch.testing.assert_close(kv.forward(again, ids[:3]), kv.forward(cache, ids[:3]))

        kv.compress(cache, Compression(budget=0.5, sinks=2, recent=4))
        assert len(set(cache.stores[0].lengths)) > 1, "heads keep different numbers of entries"
        compressed = through_host(by_both("compressed"))
        again = kv.import_payloads([compressed])
        assert_equal(kv.export_compressed(again), compressed)
        torch.testing.assert_close(kv.forward(again, ids[:3]), kv.forward(cache, ids[:3]))
