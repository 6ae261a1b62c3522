"""Entries that kvpress keeps, with a press of our own for DefensiveKV. Run by path in a Python with kvpress; see below.

`python kvpress_kept.py JOB OUT`: JOB is JSON with `model` (a folder), `prompts` (lists of token ids) and `shares` (of
the entries that stay); OUT becomes JSON `[prompt][press][share][layer][head]` lists of kept positions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def presses() -> dict[str, Any]:
    """A fresh press for each name; kvpress's defaults, and `defensive_press`."""
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
        "defensive": defensive_press(all_layers=False),
        "layer_defensive": defensive_press(all_layers=True),
    }


def defensive_scores(attention: Any, norms: Any, tokens: int, share: float) -> Any:
    """The released scores of DefensiveKV for one layer, `(heads, tokens)`, the window's own included.

    Args:
        attention: fp32 `(heads, groups, window, n)`, causal, to the n entries outside the window.
        norms: fp32 `(heads, n)`: L1 norms of the projected values, mean over the heads of a group.
        tokens: n and the window.
        share: of the entries that stay.
    """
    import torch
    from torch.nn import functional as F

    heads, _, window, n = attention.shape
    pooled = F.avg_pool1d(attention.reshape(-1, 1, n), 5, stride=1, padding=2).view_as(attention)
    pooled = pooled * attention.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True)
    worst = pooled.amax((1, 2))
    risk = torch.maximum(worst, worst.mean(-1, keepdim=True)) * norms
    risk = risk / norms.sum(0)  # over the heads of a token
    highest = risk.max()
    # Entries that cover 0.9 of the mean attention, less what falls on the 32 tokens before the window, get the highest
    # score; at most as many as a head's budget has beside the window.
    mean = attention.mean((1, 2))
    ordered, places = (mean / mean.sum(-1, keepdim=True)).sort(-1, descending=True)
    needed = 0.9 - attention[..., max(0, n - window) :].sum(-1).mean()
    count = (ordered.cumsum(-1) < needed).sum(-1).clamp(max=max(0, int(tokens * share) - window))
    protected = torch.zeros_like(risk, dtype=torch.bool)
    protected.scatter_(1, places, torch.arange(n).expand(heads, n) < count.unsqueeze(1))
    risk = risk.masked_fill(protected, highest)
    return F.pad(risk, (0, window), value=highest.item())


def defensive_press(all_layers: bool, window: int = 32) -> Any:
    """DefensiveKV, or with `all_layers` Layer-DefensiveKV, as a press that masks what it evicts."""
    import kvpress  # pyright: ignore[reportMissingImports]
    import torch

    class DefensivePress(kvpress.BasePress):
        compression_ratio = 0.0

        def __init__(self) -> None:
            self.waiting: list[tuple[Any, Any]] = []

        def compress(
            self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
        ) -> tuple[Any, Any]:
            attention = kvpress.SnapKVPress.compute_window_attention(
                module, hidden_states, keys, window, kwargs["position_embeddings"]
            )
            tokens, heads, share = keys.shape[2], keys.shape[1], 1 - self.compression_ratio
            output = module.o_proj.weight.t().view(heads, -1, values.shape[3], module.o_proj.weight.shape[0])
            norms = torch.stack([(values[0] @ output[:, group]).abs().sum(-1) for group in range(output.shape[1])])
            grouped = attention[0].unflatten(0, (heads, -1)).float()
            score = defensive_scores(grouped, norms.mean(0)[:, : tokens - window].float(), tokens, share)
            self.waiting.append((module, score))
            last = module.layer_idx == module.config.num_hidden_layers - 1
            if not all_layers or last:
                self.mask(share)
            return keys, values

        def mask(self, share: float) -> None:
            scores = torch.stack([score for _, score in self.waiting])
            layers, heads, tokens = scores.shape
            kept = scores.flatten().topk(int(tokens * share * heads * layers + 1e-6)).indices
            gone = torch.ones(scores.numel(), dtype=torch.bool)
            gone[kept] = False
            for (module, _), one in zip(self.waiting, gone.view_as(scores), strict=True):
                head, place = one.nonzero(as_tuple=True)
                module.masked_key_indices = (torch.zeros_like(head), head, place)
            self.waiting = []

    return DefensivePress()


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
