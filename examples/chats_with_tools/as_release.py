"""Writes a gates folder in the files that DBTrimKV's gates are released in, as an input of `tenure convert`.

    python examples/chats_with_tools/as_release.py GATES OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tenure.retention import RetentionGates

STEPS = {"0": "linear1", "2": "linear2"}  # our body's modules, and their names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    gates = RetentionGates.from_pretrained(options.gates)
    if gates.config.projection != "shared":
        parser.error(f"got gates with the projection {gates.config.projection}; accepted: shared, as DBTrimKV's are")
    tensors: dict[str, torch.Tensor] = {}
    state = gates.state_dict()
    for layer in gates.config.layer_indices:
        prefix = f"model.layers.{layer}.self_attn.retention_gate"
        for ours, theirs in STEPS.items():
            for kind in ("weight", "bias"):
                tensors[f"{prefix}.{theirs}.{kind}"] = state[f"bodies.{layer}.{ours}.{kind}"]
        tensors |= {f"{prefix}.linear3.weight": state["weight"], f"{prefix}.bias": state["bias"]}
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, options.out / "trimkv_weights.pth")
    config = {
        "retention_gate": "rg10", "retention_gate_intermediate_size": gates.config.gate_width,
        "hidden_size": gates.config.hidden_size, "num_key_value_heads": gates.config.num_kv_heads,
    }  # fmt: skip
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    print(f"wrote {len(tensors)} tensors to {options.out}")


if __name__ == "__main__":
    main()
