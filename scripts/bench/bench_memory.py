"""`tenure bench memory`: the memory of one training step of large models, counted on meta tensors."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ..output import OutputFile, make_console

SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 262_144}
TIED = {"Qwen3-4B"}
ANSWER_SHARE = 16  # one in so many tokens of a row follows its prompt, in the rows of soft eviction
DOCUMENTS = 16  # of a packed row
GATE_WIDTH = 512
FLOP_PER_S = 4e14  # 40 % of an H100's peak in bf16
GB = 1e9

# Name, settings of the step. `masks` makes packed rows read masks of T x T elements; `whole` is decays over whole rows.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("packed, no checkpointing", {"packed": True}),
    ("packed, checkpointing (default)", {"packed": True, "recomputes": True}),
    ("… with masks of T × T", {"packed": True, "recomputes": True, "masks": True}),
    ("… logits of 8192 targets at a time", {"packed": True, "recomputes": True, "chunk": 8192}),
    ("… attention saved", {"packed": True, "recomputes": True, "save_attention": True}),
    ("… context parallel, 4 processes", {"packed": True, "recomputes": True, "processes": 4}),
    ("… context parallel, 8 processes", {"packed": True, "recomputes": True, "processes": 8}),
    ("soft eviction, no checkpointing", {"prompt": True}),
    ("soft eviction, gates and layers recomputed", {"prompt": True, "recomputes": True, "keeps_states": True}),
    ("soft eviction, prompts read again (default)", {"prompt": True, "recomputes": True}),
)


@dataclass
class MemoryBenchConfig:
    """Count the memory of one training step on meta tensors, and write a table, with its time by its arithmetic.

    Nothing is computed or measured.
    """

    models: tuple[str, ...] = tuple(SHAPES)
    """Shapes of models."""
    lengths: tuple[int, ...] = (8192, 32_768, 131_072)
    """Tokens of the row."""
    output: OutputFile = Path("docs/results/training-memory.md")
    """File of the table."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.models) - set(SHAPES))
        if unknown or min(self.lengths, default=0) < 1024:
            raise ValueError(f"--models accepts {', '.join(SHAPES)}, --lengths 1024 and more")


def main(config: MemoryBenchConfig) -> int:
    console = make_console()
    parts, times = [], []
    for name in config.models:
        rows = []
        for label, settings in CASES:
            found = []
            for length in config.lengths:
                found.append(step_bytes(name, length, **settings) / GB)
                console.print(f"{name}, {label}, {length}: {found[-1]:.1f} GB")
            rows.append((label, found))
        parts.append(table(name, config.lengths, rows))
        for label, documents in (("one document", 1), (f"packed, {DOCUMENTS} documents", DOCUMENTS)):
            seconds = [sum(step_flop(name, length, documents)) / FLOP_PER_S for length in config.lengths]
            times.append((f"{name}, {label}", seconds))
    parts += [FOOTER.strip(), TIMES.strip(), table("seconds of a row", config.lengths, times, 1)]
    config.output.write_text(page(parts))
    console.print(f"The table is in {config.output}.")
    return 0


def build(name: str) -> Any:
    """A model of the shape on the meta device, in bf16."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape: dict[str, Any] = SHAPES[name] | COMMON | {"tie_word_embeddings": name in TIED}
    with torch.device("meta"):
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape))
    return model.to(torch.bfloat16).eval()


def row_of(length: int, packed: bool, prompt: bool) -> Any:
    """A batch of one row: every token after the prompt, or the second half of every packed document, is a target."""
    import torch

    from ...training import Batch

    positions = torch.arange(length)
    start = length - length // ANSWER_SHARE if prompt else 0
    loss_mask = positions > max(start, length // 2) if not packed else positions % (length // DOCUMENTS) > (
        length // DOCUMENTS // 2
    )  # fmt: skip
    if packed:
        positions = positions % (length // DOCUMENTS)
    ids = torch.zeros(1, length, dtype=torch.long)
    return Batch(ids, positions[None], None, loss_mask[None], (start,) if prompt else ())


def step_bytes(
    name: str, length: int, *, packed: bool = False, prompt: bool = False, recomputes: bool = False,
    masks: bool = False, chunk: int | None = None, save_attention: bool = False, processes: int = 1,
    keeps_states: bool = False,
) -> int:  # fmt: skip
    """Bytes of weights, gates, their gradients and optimizer states, and the most that lives besides in one step."""
    import torch

    from ...retention import RetentionConfig, RetentionGates, SoftEviction
    from ...retention.attach import Attached
    from ...retention.context_parallel import ContextGroup
    from ...training import GateObjective
    from .live_bytes import LiveBytes, fused_kernels

    model = build(name)
    with torch.device("meta"):
        gates = RetentionGates(RetentionConfig.for_model(model))
    context = None if processes == 1 else ContextGroup(None, 0, processes)
    evictions = [SoftEviction(0.2)] if prompt else []
    objective = GateObjective(model, gates, budget=512, chunk=chunk, evictions=evictions, context=context)
    objective._packs = objective._continues = objective._checked = True  # these checks run models
    objective.reads_prompts_again = not keeps_states
    if recomputes:
        objective.enable_gradient_checkpointing(save_attention)
    held = [*model.parameters(), *model.buffers(), *gates.parameters()]
    live = LiveBytes()
    live.known(held)
    with fused_kernels(), patch.object(Attached, "reads_masks", masks), live:
        objective(row_of(length, packed, prompt)).total.backward()
    weights = sum(one.nbytes for one in {id(one): one for one in held}.values())
    states = 2 * sum(one.nbytes for one in gates.parameters())  # of AdamW; gradients are counted in the step
    peak = live.peak
    del objective, live
    gc.collect()
    return weights + states + peak


def step_flop(name: str, length: int, documents: int = 1, recomputes: bool = True) -> tuple[float, float]:
    """Floating-point operations of a step over a row of documents of one length: products with weights, and attention.

    Teacher, student and, under checkpointing, the recomputation are a forward each. Backward costs another forward in
    products with frozen weights, which get no gradients, twice a forward in gates, and two and a half forwards in
    attention. Half of the tokens are targets, whose logits teacher and student compute, and backward once more. Norms,
    rotary embeddings and the capacity loss are left out.
    """
    shape: Any = SHAPES[name] | COMMON
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    queries, keys = heads * shape["head_dim"], shape["num_key_value_heads"] * shape["head_dim"]
    weights = layers * hidden * (2 * queries + 2 * keys + 3 * shape["intermediate_size"])
    gates = layers * (hidden * GATE_WIDTH + GATE_WIDTH**2 + GATE_WIDTH * shape["num_key_value_heads"])
    logits = shape["vocab_size"] * hidden / 2 * 3
    products = 2 * length * (weights * (3 + recomputes) + gates * (3 + recomputes) + logits)
    attention = 2 * layers * queries * length * (length / documents) * (4.5 + recomputes)
    return products, attention


def table(name: str, lengths: tuple[int, ...], rows: list[tuple[str, list[float]]], digits: int = 0) -> str:
    head = "| " + " | ".join([name, *(f"{length // 1024}K" for length in lengths)]) + " |"
    lines = [head, "|---" + "|---:" * len(lengths) + "|"]
    lines += [f"| {label} | " + " | ".join(f"{value:.{digits}f}" for value in found) + " |" for label, found in rows]
    return "\n".join(lines)


def page(parts: list[str]) -> str:
    return "\n\n".join([HEADER.strip(), *parts]) + "\n"


HEADER = """
# Memory of a training step

GB (10⁹ bytes) on each GPU for one step over one row of 8K to 128K tokens, with gates of 512 features (`shared`).
**Counted, not measured**: `tenure bench memory` runs a step on the meta device, where tensors have sizes and no values,
and adds up weights (bf16, whole on each GPU: FSDP2 divides them), gates, their AdamW states and the most bytes of
tensors that live at a time. Attention, occupancy and exchanges count as on GPUs (inputs, outputs, row sums); the
allocator's fragments and CUDA's own memory (1 to 2 GB) do not count.
"""
TIMES = """
## Time of a step

**Computed, not measured**: the arithmetic of a step with checkpointing (`step_flop` in `scripts/bench/bench_memory.py`)
at 4 · 10¹⁴ operations a second, 40 % of an H100's peak in bf16, for one row on one GPU. Processes with own rows
divide a step's rows among them; with `--context-parallel N` each takes 1/N of this time for a row.
"""
FOOTER = f"""
Rows of `packed` hold {DOCUMENTS} documents whose second halves are targets. With soft eviction the last
1/{ANSWER_SHARE} of the tokens follow the prompt and are targets. Rows with `…` differ from the default in what they
name.
"""
