"""KV whose content is derived from its prompt, and transfers that fail on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...serving import TensorPayload, Tier, VirtualTransfer
from ...serving.kvcache.base import KVPayload
from ...serving.kvcache.prompt_file import FilePayload
from ...serving.kvcache.radix_tree import Node
from ...serving.kvcache.transfer_queue import TransferJob

if TYPE_CHECKING:
    import torch

LAYERS = 2
TOKEN_BYTES = 16 * LAYERS  # of `kv_of`


class PagePayload(TensorPayload):
    """Tensors that the cache treats like lists of pages: it joins and splits them at every occasion."""

    @property
    def joins_freely(self) -> bool:
        return self.divisible

    def split(self, at: int) -> tuple[PagePayload, PagePayload]:
        first, rest = super().split(at)
        return self._of(first), self._of(rest)

    def join(self, other: KVPayload) -> PagePayload | None:
        whole = super().join(other)
        return None if whole is None else self._of(whole)

    @classmethod
    def _of(cls, payload: TensorPayload) -> PagePayload:
        return cls(payload.tensors, payload.tokens, payload.token_dim, payload.memory)


def kv_of(
    prompt: Sequence[int] | Any, start: int, end: int, compressed: bool = False, pages: bool = False
) -> TensorPayload:
    """KV of the tokens [start, end) of `prompt`, each depending on everything before it, as real KV does.

    Compressed, every other entry is kept, and the payload cannot be cut. `pages`: a `PagePayload`.
    """
    import torch

    state, numbers = 1, []
    for token in prompt[:end]:
        state = (state * 31 + int(token) + 7) % 9973
        numbers.append(state)
    entries = torch.tensor(numbers[start:end], dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, -1, 2)
    kept = entries[:, :, ::2] if compressed else entries
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.key"] = kept + layer
        tensors[f"layers.{layer}.value"] = -kept - layer
    return (PagePayload if pages else TensorPayload)(tensors, end - start, None if compressed else -2)


def assert_holds(payloads: Sequence[Any], prompt: Sequence[int] | Any) -> None:
    """The payloads, one after the other, are the KV of `prompt`."""
    import torch

    at = 0
    for payload in payloads:
        wanted = kv_of(prompt, at, at + payload.tokens, compressed=payload.token_dim is None)
        assert payload.tensors.keys() == wanted.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert torch.equal(payload.tensors[name].cpu(), tensor), f"{name} of [{at}, {at + payload.tokens})"
        at += payload.tokens
    assert at == len(prompt), f"{at} tokens of {len(prompt)}"


def damage(node: Node, how: str) -> None:
    """Has the last byte of the node's file changed ("flip") or missing ("cut"), or no file ("remove")."""
    file = node.copies[Tier.DISK]
    assert isinstance(file, FilePayload)
    path = file.path
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    if content and how != "remove":
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if how == "flip" else b""))


class FaultyTransfer(VirtualTransfer):
    """Transfers whose next layer fails with the planned fault."""

    fault: Exception | None = None

    def copy_layer(self, job: TransferJob) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault
        super().copy_layer(job)
