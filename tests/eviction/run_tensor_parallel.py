"""One process of a model in tensor parallel: what `test_tensor_parallel.py` starts, twice, and once undivided.

Usage: python run_tensor_parallel.py MODEL OUTPUT, with torch.distributed's variables in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tenure.eviction import evict
from tenure.retention import RetentionGates, UnsupportedModelError, attach
from tenure.serving.packable import check_packable

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
# Policy, and options: every scope, a floor of either kind, chunks, and scores that look at several heads.
RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "retention": ("retention", {"recent": 4, "prefill_chunk": 16}),
    "layer_defensive": ("layer_defensive", {"recent": 4}),
    "criticalkv": ("criticalkv", {"recent": 4}),
    "ada_criticalkv": ("ada_criticalkv", {}),
    "pyramidkv": ("pyramidkv", {}),
    "tova": ("tova", {"recent": 2}),
    "h2o": ("h2o", {"scope": "global", "floor": 0.2}),
    "random": ("random", {"scope": "layer"}),
    "defensivekv": (None, {"preset": "defensivekv"}),
    "dbtrimkv": ("retention", {"preset": "dbtrimkv"}),
    "expected_attention": ("expected_attention", {}),
}


def run(model: Any, gates: RetentionGates) -> dict[str, Any]:
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    found: dict[str, Any] = {}
    for name, (policy, options) in RUNS.items():
        chosen: dict[str, Any] = {"buffer": 4} | options
        with evict(model, policy, 0.3, gates=gates, **chosen) as session:
            tokens = model.generate(ids, attention_mask=mask, **GREEDY)
            cache = session.last_cache
            cache.check()
            kept = [[[head.tolist() for head in row] for row in cache.kept(layer.layer_idx)] for layer in cache.ragged]
            found[name] = {"tokens": tokens.tolist(), "kept": kept, "entries": cache.entries}
    with evict(model, "snapkv", 0.4, recent=4, scope="global") as session:  # forks, rejected tokens, another budget
        cache = session.new_cache()
        session.extend(cache, ids)
        fork = cache.fork()
        session.extend(fork, ids[:, :3])
        fork.crop(-3)
        fork.compress(budget=0.2)
        fork.check()
        found["fork"] = {"entries": [cache.entries, fork.entries]}
    return found


def refusals(model: Any, gates: RetentionGates, folder: Path) -> list[str]:
    """The errors of what needs all heads in a process."""
    found = []

    def record(do: Any) -> None:
        try:
            do()
        except (ValueError, UnsupportedModelError) as error:
            found.append(str(error))

    def save() -> None:
        with evict(model, "knorm") as session:
            cache = session.new_cache()
            session.extend(cache, range(3, 20))
            cache.save(folder / "cache.safetensors")

    def train() -> None:
        with attach(model, gates):
            pass

    for do in (save, train, lambda: check_packable(model)):
        record(do)
    return found


def main(folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    divided: dict[str, Any] = {}
    if "RANK" in os.environ:
        from transformers.distributed.configuration_utils import DistributedConfig

        divided = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
    model = AutoModelForCausalLM.from_pretrained(folder, **divided)
    gates = RetentionGates.from_pretrained(folder / "gates", model)
    found: dict[str, Any] = {"runs": run(model, gates)}
    if divided:
        found["refused"] = refusals(model, gates, folder)
        torch.distributed.destroy_process_group()
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
