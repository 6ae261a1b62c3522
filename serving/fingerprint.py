"""Fingerprints of everything that makes KV, which no other model, and no other weights, may read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..eviction import Session

# Counted up when the same weights begin to give other KV, or pages another layout.
KV_VERSION = 2


def kv_fingerprint(session: Session) -> str:
    """A digest of everything that decides which KV a session computes for given tokens.

    That is the model's class and configuration, its dtype and attention, every weight and buffer (an adapter's too, by
    name), the gates, and what is recorded with each entry. Policy and budget of compressed prompts are in their
    namespaces; a tokenizer or template that changes gives other tokens. Reads all weights: a second a gigabyte or two.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    model = session.model
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    gates = None if session.gates is None else asdict(session.gates.config)
    attention = str(model.config.get_text_config(decoder=True)._attn_implementation)
    about = [KV_VERSION, type(model).__name__, str(model.dtype), attention, config, list(session.entry_states), gates]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in _tensors(session):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_of(session: Session) -> list[torch.Tensor]:
    """The weights of model and gates whose changes in place torch counts."""
    gates = () if session.gates is None else session.gates.parameters()
    return [each for each in chain(session.model.parameters(), gates) if not each.is_inference()]


def version_of(weights: Iterable[torch.Tensor]) -> int:
    """A number that grows whenever one of the weights is written to in place (not through `.data`)."""
    return sum(each._version for each in weights)


def _tensors(session: Session) -> Iterator[tuple[str, torch.Tensor]]:
    own = {} if session.gates is None else session.gates.state_dict()
    gates = ((f"gates.{name}", tensor) for name, tensor in own.items())
    return chain(session.model.state_dict().items(), gates)
