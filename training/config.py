"""Settings of a training run: one dataclass, on the command line and in YAML under the same names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..retention.config import Projection


@dataclass
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
    """Where logs, checkpoints and the finished gates go."""

    gate_width: int = 512
    """Features inside a gate."""
    projection: Projection = "shared"
    """Output projection: `shared` by all layers (DBTrimKV), `per_layer` (TRIM-KV), or `shared_heads`."""
    initial_bias: float = 18.0
    """Output bias at the start; 18 means nothing is forgotten at step 0."""
    init_gates: str | None = None
    """Start from these gates (folder or Hub id) instead of fresh ones."""

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
    lengths: tuple[int, ...] = (512,)
    """Lengths of synthetic documents in tokens, drawn per example; the longest also bounds other data."""
    min_length: int = 0
    """Records of `data` shorter than this many tokens are dropped."""
    text_share: float = 0.1
    """Share of synthetic examples that are plain continuation of text."""
    group_share: float = 0.3
    """Share of the facts in synthetic documents that are groups of sentences which differ in key and value only."""
    dialogue_share: float = 0.0
    """Share of synthetic documents that are a conversation in which a speaker tells facts of herself."""
    repetition_share: float = 0.0
    """Share of synthetic documents that are one passage again and again."""
    prompt_share: float = 0.0
    """Share of synthetic examples whose document is a prompt: read without gates, as one compressed at its end is."""
    eviction_budgets: tuple[float, ...] = ()
    """Prompts are softly evicted at their end to one of these shares of their entries; none: their keys decay."""
    eviction_temperature: float = 0.5
    """Softness of that eviction; towards 0 it becomes the runtime's hard choice."""
    facts: tuple[int, int] = (4, 8)
    """Fewest and most facts in a synthetic document."""
    questions: tuple[int, int] = (3, 6)
    """Fewest and most questions after it."""
    pack: bool = False
    """Pack several documents into rows of the longest length; β never crosses a document."""

    budget: float = 0.2
    """Entries per layer and head that occupancy may hold; below 1, that share of each document's length."""
    scope: Literal["global", "local"] = "global"
    """Who shares the budget in the capacity loss: all layers and heads, or each head on its own."""
    capacity_weight: float = 1.0
    """λ, weight of the capacity loss."""
    capacity_samples: int | None = 64
    """Positions per row at which occupancy is evaluated; None for all of them."""
    logits_chunk: int = 8192
    """Target tokens whose logits exist at a time."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 1
    """Rows per device and forward."""
    accumulation: int = 1
    """Forwards per optimizer step on each device."""
    learning_rate: float = 2e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 100
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = True
    """Recompute layers in backward: less memory, a third more time."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    log_every: int = 10
    save_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    eval_every: int = 0
    """Steps between evaluations under real eviction; 0 for none."""
    eval_budgets: tuple[float, ...] = (0.2,)
    """Budgets of the evaluation in the loop, as shares of the prompt."""
    eval_cases: int = 6
    """Cases per retrieval task in the evaluation in the loop."""
    eval_length: int = 512
    """Length of its documents in tokens."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where accelerate's trackers log to; metrics.jsonl is written in any case."""
    project: str = "tenure"
    """Project name for the tracker."""

    def __post_init__(self) -> None:
        self.lengths = tuple(self.lengths)
        self.eval_budgets = tuple(self.eval_budgets)
        self.eviction_budgets = tuple(self.eviction_budgets)
        self.facts, self.questions = _range("facts", self.facts), _range("questions", self.questions)
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "gate_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; 1 or more is accepted")
        if any(not 0 < budget <= 1 for budget in self.eviction_budgets) or self.eviction_temperature <= 0:
            raise ValueError(
                f"eviction_budgets {self.eviction_budgets}, eviction_temperature {self.eviction_temperature}: shares "
                "in (0, 1] and a temperature above 0 are accepted"
            )
        if not 0 <= self.prompt_share <= 1 or (self.eviction_budgets and not self.prompt_share):
            raise ValueError(
                f"prompt_share is {self.prompt_share}; a share in [0, 1] is accepted, above 0 with eviction_budgets: "
                "they act on prompts only"
            )
        if self.prompt_share and self.gradient_checkpointing:
            raise ValueError(
                f"prompt_share is {self.prompt_share} and gradient_checkpointing is true; set gradient_checkpointing "
                "to false: prompts are read without a graph, so it has nothing to save"
            )
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths is {self.lengths}; lengths of 64 tokens or more are accepted")
        if self.budget <= 0 or self.capacity_weight < 0 or self.learning_rate <= 0:
            raise ValueError(
                f"budget {self.budget}, capacity_weight {self.capacity_weight} and learning_rate {self.learning_rate}: "
                "a positive budget and learning rate and a weight of 0 or more are accepted"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Reads a YAML mapping of field names.

        Raises:
            ValueError: the file is absent, not a mapping, or names unknown fields (all named at once).
        """
        try:
            import yaml
        except ImportError:
            raise ImportError("reading a config file needs PyYAML: pip install 'tenure[train]'") from None
        if not Path(path).is_file():
            raise ValueError(f"no config file at {str(path)!r}")
        try:
            values = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds {type(values).__name__}; a mapping of training settings is accepted")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path} has unknown settings {unknown}; known: {', '.join(sorted(known))}")
        return cls(**values)


def _range(name: str, values: Sequence[int]) -> tuple[int, int]:
    if len(values) != 2 or not 1 <= values[0] <= values[1]:
        raise ValueError(f"{name} is {tuple(values)}; a range (fewest, most) from 1 on is accepted")
    return values[0], values[1]
