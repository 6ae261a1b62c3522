"""An engine finds what one of the same kind has left on disk, and never what another kind has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tenure.eviction import evict
from tenure.serving import (
    DiskPool,
    Engine,
    LinearCosts,
    MemoryPool,
    PromptKV,
    Request,
    ThreadedTransfer,
    Tier,
    build_system,
)

PAGE, ANSWER = 8, 3


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def serve(model, folder: Path, prompts: list[list[int]], fingerprint: str | None = None) -> list[tuple[int, list[int]]]:
    """An engine from its start to its end: for each prompt, how much of it was cached, and the answer.

    The device holds little more than one prompt, so earlier ones are written to disk.
    """
    with evict(model, "full") as session:
        rate = PromptKV(session, PAGE).bytes_per_token()
        pools = {Tier.DEVICE: MemoryPool(rate * 96), Tier.DISK: DiskPool(10**7, folder, fingerprint)}
        system = build_system(
            "lru_reactive", pools, ThreadedTransfer(), costs=LinearCosts(1.0, (1e9, 1e9)), bytes_per_token=rate,
            clock=time.monotonic, page_size=PAGE, device=model.device,
        )  # fmt: skip
        try:
            engine = Engine(session, system)
            ended = []
            for ids in prompts:
                engine.submit(Request("client", ids, ANSWER))
                ended += list(engine.run())
            return [(output.cached_tokens, list(output.tokens)) for output in ended]
        finally:
            system.close()


def test_prompts_of_the_same_model_are_found_and_those_of_another_are_not(tmp_path: Path):
    model = tiny_model()
    common = prompt(0, 40)
    first, second, other = [*common, *prompt(1, 24)], [*common, *prompt(2, 24)], prompt(3, 64)
    answers = serve(model, tmp_path, [first, other, first, other])
    assert answers[2][0] >= 56, "the first prompt came back from the disk"
    again = serve(model, tmp_path, [first, second])
    assert again[0] == (answers[2][0], answers[0][1]), "found after the restart, with the same answer"
    assert again[1][0] == 40, "a part of a file"
    alone = serve(model, tmp_path / "alone", [second])
    assert again[1][1] == alone[0][1]
    with torch.no_grad():
        model.lm_head.weight.add_(0.001)
    changed = serve(model, tmp_path, [first])
    assert changed[0][0] == 0, "of other weights"


def test_a_pool_of_another_fingerprint_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="for a disk pool that is used with another one"):
        serve(tiny_model(), tmp_path, [prompt(0, 16)], fingerprint="a name of my own")
