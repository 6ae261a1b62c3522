"""Entries that kvpress keeps. Run by path in a Python with kvpress and without tenure; see `compare_kvpress`.

`python kvpress_kept.py JOB OUT`: JOB is JSON with `model` (a folder), `prompts` (lists of token ids) and `shares` (of
the entries that stay); OUT becomes JSON `[prompt][press][share][layer][head]` lists of kept positions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def presses() -> dict[str, Any]:
    """A fresh press for each name; kvpress's defaults."""
    import kvpress  # pyright: ignore[reportMissingImports]

    snap = kvpress.SnapKVPress
    return {
        "snapkv": snap(),
        "adakv": kvpress.AdaKVPress(snap()),
        "criticalkv": kvpress.CriticalKVPress(snap()),
        "ada_criticalkv": kvpress.CriticalAdaKVPress(snap()),
        "pyramidkv": kvpress.PyramidKVPress(),
        "expected_attention": kvpress.ExpectedAttentionPress(),
        "keydiff": kvpress.KeyDiffPress(),
        "lagkv": kvpress.LagKVPress(),
        "knorm": kvpress.KnormPress(),
        "tova": kvpress.TOVAPress(),
        "streaming_llm": kvpress.StreamingLLMPress(),
        "observed_attention": kvpress.ObservedAttentionPress(),
    }


def main(job: dict[str, Any]) -> list[dict[str, list]]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()

    def keys_of(ids: Any) -> list[Any]:
        cache: Any = DynamicCache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        return [layer.keys[0] for layer in cache.layers]

    results = []
    with torch.no_grad():
        for prompt in job["prompts"]:
            ids, kept = torch.tensor([prompt]), {}
            for name, press in presses().items():
                # Only this one needs the attention weights, only AdaKV's refuse to have them.
                model.set_attn_implementation("eager" if name == "observed_attention" else "sdpa")
                whole, kept[name] = keys_of(ids), []
                for share in job["shares"]:
                    press.compression_ratio = 1 - share
                    with press(model):
                        left = keys_of(ids)
                    kept[name].append(
                        [
                            _kept(full, part, layer.self_attn)
                            for full, part, layer in zip(whole, left, model.model.layers, strict=True)
                        ]
                    )
            results.append(kept)
    return results


def _kept(full: Any, part: Any, module: Any) -> list[list[int]]:
    """Positions that each head keeps of a layer: `full` and `part` are keys `(heads, n, dim)` before and after."""
    masked = getattr(module, "masked_key_indices", None)
    if masked is not None:  # presses with budgets of their own for the heads mask what they evict and cut nothing off
        module.masked_key_indices = None
        gone = set(zip(masked[1].tolist(), masked[2].tolist(), strict=True))
        return [[i for i in range(full.shape[1]) if (head, i) not in gone] for head in range(full.shape[0])]
    heads = []
    for before, after in zip(full.numpy(), part.numpy(), strict=True):
        places = {row.tobytes(): i for i, row in enumerate(before)}
        heads.append(sorted(places[row.tobytes()] for row in after))
    return heads


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
