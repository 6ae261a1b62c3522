"""Settings of a training run: one dataclass, on the command line and in YAML under the same names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tenure.checked import Range, Size, read, verify
from tenure.documents import load_yaml

Count = Annotated[int, Range(1)]
NoneOrMore = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Projection = Literal["per_layer", "shared", "shared_heads"]  # of `RetentionConfig`, which needs torch
KeptShare = Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True)
class TrainConfig:
    """Train retention gates on a frozen model.

    Launch it with `accelerate launch scripts/train_gates.py --config FILE`, or `tenure train` on one device.
    """

    model: str = "demo"
    """Base model: Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, fetched once)."""
    revision: str | None = None
    """Revision of a Hub model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen model; auto is float32 on CPU and bfloat16 on GPU. Gates are always float32."""
    output_dir: str = "runs/gates"
    """Folder of logs, checkpoints and the finished gates."""

    gate_width: Count = 512
    """Features inside a gate."""
    projection: Projection = "shared"
    """Output projection: `shared` by all layers (DBTrimKV), `per_layer` (TRIM-KV), or `shared_heads`."""
    initial_bias: float = 18.0
    """Output bias at the start; 18 means nothing is forgotten at step 0."""
    init_gates: str | None = None
    """Start from these gates (folder, demo or hub:OWNER/NAME) instead of fresh ones."""

    data: str = "synthetic"
    """`synthetic` (retrieval-style documents over `texts`), a Hub data set id, or JSONL, parquet or text files."""
    texts: str = "demo"
    """Texts under the synthetic documents: `demo` (training split of the essays), a text file or a folder."""
    format: Literal["auto", "chat", "raw"] = "auto"
    """How records of `data` are read: chat template over messages, or raw text."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens the quality loss is taken over."""
    split: str = "train"
    """Split of a Hub data set."""
    lengths: Annotated[tuple[Annotated[int, Range(64)], ...], Size(1)] = (512,)
    """Lengths of synthetic documents in tokens, drawn per example; the longest also bounds other data."""
    min_length: NoneOrMore = 0
    """Records of `data` shorter than this many tokens are dropped."""
    text_share: Share = 0.1
    """Share of synthetic examples that are plain continuation of text."""
    group_share: Share = 0.3
    """Share of the facts in synthetic documents that are groups of sentences which differ in key and value only."""
    dialogue_share: Share = 0.0
    """Share of synthetic documents that are a conversation in which a speaker states facts about herself."""
    repetition_share: Share = 0.0
    """Share of synthetic documents that are one passage repeated over and over."""
    prompt_share: Share = 0.0
    """Share of synthetic examples whose document is a prompt, read without gates and compressed at its end."""
    eviction_budgets: tuple[KeptShare, ...] = ()
    """Prompts are softly evicted at their end to one of these shares of their entries; none: their keys decay."""
    eviction_temperature: Annotated[float, Range(0, above=True)] = 0.5
    """Softness of that eviction; towards 0 it becomes the runtime's hard choice."""
    facts: tuple[Count, Count] = (4, 8)
    """Fewest and most facts in a synthetic document."""
    questions: tuple[Count, Count] = (3, 6)
    """Fewest and most questions after it."""
    pack: bool = False
    """Pack several documents into rows of the longest length; β never crosses a document."""

    budget: Annotated[float, Range(0, above=True)] = 0.2
    """Entries per layer and head that occupancy may hold; below 1, that share of each document's length."""
    scope: Literal["global", "local"] = "global"
    """Sharing of the budget in the capacity loss: among all layers and heads, or each head on its own."""
    capacity_weight: Annotated[float, Range(0)] = 1.0
    """λ, weight of the capacity loss."""
    capacity_samples: Count | None = 64
    """Positions per row at which occupancy is evaluated; None for all of them."""
    logits_chunk: Count = 8192
    """Target tokens whose logits exist at a time."""

    steps: Count = 10_000
    """Optimizer steps."""
    batch_size: Count = 1
    """Rows per device and forward."""
    accumulation: Count = 1
    """Forwards per optimizer step on each device."""
    learning_rate: Annotated[float, Range(0, above=True)] = 2e-4
    min_learning_rate: Annotated[float, Range(0)] = 1e-6
    warmup_steps: NoneOrMore = 100
    weight_decay: Annotated[float, Range(0)] = 0.0
    max_grad_norm: Annotated[float, Range(0, above=True)] = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = True
    """Recompute layers in backward: less memory, a third more time."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    log_every: Count = 10
    save_every: Count = 100
    """Steps between checkpoints; the last two are kept."""
    eval_every: NoneOrMore = 0
    """Steps between evaluations under real eviction; 0 for none."""
    eval_budgets: tuple[KeptShare, ...] = (0.2,)
    """Budgets of the evaluation in the loop, as shares of the prompt."""
    eval_cases: Count = 6
    """Cases per retrieval task in the evaluation in the loop."""
    eval_length: Count = 512
    """Length of its documents in tokens."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where accelerate's trackers log to; metrics.jsonl is written in any case."""
    project: str = "tenure"
    """Project name for the tracker."""

    def __post_init__(self) -> None:
        verify(self)
        for name in ("facts", "questions"):
            fewest, most = getattr(self, name)
            if fewest > most:
                raise ValueError(f"got {(fewest, most)} as {name}; accepted: a range (fewest, most)")
        if self.eviction_budgets and not self.prompt_share:
            raise ValueError(
                "got eviction_budgets and no prompt_share, but they act on prompts only; accepted: a prompt_share "
                "above 0 with eviction_budgets"
            )
        if self.prompt_share and self.gradient_checkpointing:
            raise ValueError(
                f"got gradient_checkpointing with a prompt_share of {self.prompt_share}, but prompts are read without "
                "a graph, so there is nothing to recompute; accepted: set gradient_checkpointing to false"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as plain values and tuples."""
        return asdict(self)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Reads a YAML mapping of field names.

        Raises:
            ImportError: PyYAML is missing.
            ValueError: the file is absent, not YAML or not a mapping; it names unknown fields (all are listed); a value
                is of another type or out of its range.
        """
        try:
            return read(cls, load_yaml(path), str(path))
        except FileNotFoundError:
            raise ValueError(f"no config file at {str(path)!r}") from None
