"""Entries that Layer-DefensiveKV protects, and those that each layer keeps, on a held-out essay of 1024 tokens.

    python examples/measuring/protected_share.py

Protected entries, the window among them, have the highest score of their layer. Prints for each budget and protection
their share of the budget, and the least and most entries a head that a layer keeps. About 12 seconds of one CPU core.
"""

from __future__ import annotations

import torch

from tenure.eviction import LayerDefensive, RaggedCache, evict
from tenure.eviction.cache_layer import RaggedLayer
from tenure.eviction.layer_view import LayerView
from tenure.eviction.selection import conclude
from tenure.scripts.loading import load_model
from tenure.training.assets import essays

TOKENS, BUDGETS, MASSES = 1024, (0.5, 0.2, 0.1), (0.9, 0.0)


@torch.no_grad()
def main() -> None:
    model, tokenizer = load_model("demo", "cpu", "float32")
    prompt = next(ids[:TOKENS] for one in essays("eval") if len(ids := tokenizer(one.text).input_ids) >= TOKENS)
    policies = [LayerDefensive(mass=mass) for mass in MASSES]
    with evict(model, "full", observe=policies) as session:
        cache = session.new_cache()
        session.extend(cache, prompt, logits_to_keep=1)
        for share in BUDGETS:
            for policy in policies:
                budget = int(share * TOKENS)
                layers = [protected(policy, layer, cache, budget) for layer in cache.ragged]
                mean = sum(layers) / len(layers) / budget
                kept = cache.fork().compress(policy, share, sinks=0, recent=0).report().lengths[0].float().mean(1)
                print(
                    f"{share:.0%} kept, mass={policy.mass}: {mean:.0%} of the budget is protected; a layer keeps "
                    f"{kept.min():.0f} to {kept.max():.0f} entries a head, standard deviation {kept.std():.0f}"
                )


def protected(policy: LayerDefensive, layer: RaggedLayer, cache: RaggedCache, budget: int) -> float:
    """Entries a head of one layer that have its highest score."""
    time = torch.tensor([TOKENS])

    def view() -> LayerView:
        return policy.view(layer, time, cache.rows.window_positions, torch.tensor([budget]), time)

    conclude(layer, policy, view(), torch.ones(1, 1, 1, dtype=torch.bool))
    score = policy.score(view())[0]
    return float((score == score.max()).sum(1).float().mean())


if __name__ == "__main__":
    main()
