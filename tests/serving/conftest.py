"""KV that can be told by its prompt, and tiers on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tenure.serving import (
    LRU,
    DiskPool,
    LinkSpeed,
    MemoryPool,
    Room,
    TensorPayload,
    Tier,
    TieredTree,
    TierPolicy,
    VirtualClock,
    VirtualCopies,
)
from tenure.serving.disk import FilePayload
from tenure.serving.node import Node
from tenure.serving.pools import Pool

LAYERS = 2
TOKEN_BYTES = 16 * LAYERS  # of `kv_of`
ALL_LINKS = {(a, b): LinkSpeed(1000.0) for a in Tier for b in Tier if a != b}


def kv_of(prompt: Sequence[int], start: int, end: int, compressed: bool = False) -> TensorPayload:
    """KV of the tokens [start, end) of `prompt`, each depending on everything before it, as real KV does.

    Compressed, every other entry is kept, and the payload cannot be cut.
    """
    state, numbers = 1, []
    for token in prompt[:end]:
        state = (state * 31 + int(token) + 7) % 9973
        numbers.append(state)
    entries = torch.tensor(numbers[start:end], dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, -1, 2)
    kept = entries[:, :, ::2] if compressed else entries
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.key"] = (kept + layer).clone()
        tensors[f"layers.{layer}.value"] = (-kept - layer).clone()
    return TensorPayload(tensors, end - start, None if compressed else -2)


def assert_holds(payloads: Sequence[TensorPayload], prompt: Sequence[int]) -> None:
    """The payloads, one after the other, are the KV of `prompt`."""
    at = 0
    for payload in payloads:
        wanted = kv_of(prompt, at, at + payload.tokens, compressed=payload.token_dim is None)
        assert payload.tensors.keys() == wanted.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert torch.equal(payload.tensors[name].cpu(), tensor), f"{name} of [{at}, {at + payload.tokens})"
        at += payload.tokens
    assert at == len(prompt)


def ids_of(node: Node) -> list[int]:
    """The prompt that ends at `node`."""
    return memoryview(b"".join(reversed([each.span for each in node.path()]))).cast("i").tolist()


def damage(node: Node, how: str) -> None:
    """Has the last byte of the node's file changed ("flip") or missing ("cut"), or no file ("remove")."""
    file = node.copies[Tier.DISK]
    assert isinstance(file, FilePayload)
    path = file.path
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if content and how != "remove":
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if how == "flip" else b""))


class FaultyCopies(VirtualCopies):
    """The next layer after a fault was planned fails with it."""

    fault: Exception | None = None

    def copy_layer(self, job) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        super().copy_layer(job)


class Kv:
    """What tests need of this file."""

    FaultyCopies = FaultyCopies
    ids_of = staticmethod(ids_of)
    damage = staticmethod(damage)

    of = staticmethod(kv_of)
    assert_holds = staticmethod(assert_holds)
    token_bytes = TOKEN_BYTES
    links = ALL_LINKS


@pytest.fixture
def kv() -> type[Kv]:
    return Kv


@pytest.fixture
def make_tiers(tmp_path: Path):
    """Tiers of so many tokens each (the disk: bytes) on a virtual clock; all is checked and closed at the end."""
    made: list[TieredTree] = []

    def make(
        device: int,
        host: int | None = None,
        disk: int | None = None,
        policy: TierPolicy | None = None,
        page_size: int = 2,
        copies: Callable[..., VirtualCopies] = VirtualCopies,
    ) -> TieredTree:
        pools: dict[Tier, Pool] = {Tier.DEVICE: MemoryPool(device * TOKEN_BYTES)}
        if host is not None:
            pools[Tier.HOST] = MemoryPool(host * TOKEN_BYTES)
        if disk is not None:
            pools[Tier.DISK] = DiskPool(disk, tmp_path)
        clock = VirtualClock()
        tiers = TieredTree(pools, copies(clock, ALL_LINKS), policy or TierPolicy(LRU()), page_size, clock)
        made.append(tiers)
        return tiers

    yield make
    for tiers in made:
        tiers.check()
        tiers.close()
        tiers.check()


@pytest.fixture
def cached():
    """Opens a prompt, stores its KV and releases it; False if there was no room."""

    def store(tiers: TieredTree, prompt: Sequence[int], agent=None, fixed: int = 0, compressed: bool = False) -> bool:
        with tiers.open(prompt) as lease:
            end = tiers.whole_pages(len(prompt))
            payload = kv_of(prompt, lease.length, end, compressed) if end > lease.length else None
            return tiers.insert(lease, prompt, payload, agent, fixed) is Room.READY

    return store
