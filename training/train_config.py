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
Projection = Literal["per_layer", "per_layer_deep", "shared", "shared_heads"]  # of `RetentionConfig`, which needs torch
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
    """Output projection: `shared` by all layers (DBTrimKV), `per_layer` (TRIM-KV), `per_layer_deep` (DBTrimKV's body
    with a projection a layer), or `shared_heads` (one for all heads)."""
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
    chat_template: str | None = None
    """File with a chat template (Jinja) in place of the tokenizer's, for example one that shows tools and calls."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens the quality loss is taken over."""
    keep_thoughts: bool = False
    """Train on thoughts (`<think>…</think>`, `reasoning_content`) that the chat template would leave out."""
    split: str = "train"
    """Split of a Hub data set, a saved one, or a folder whose files or folders are named after splits."""
    mixture: tuple[str, ...] = ()
    """Instead of `data`: several of what it accepts, each as WEIGHT:DATA, such as `0.7:chat.jsonl 0.3:prose/`."""
    concatenate: tuple[str, ...] = ()
    """Instead of `data`: several of what it accepts, as one data set; an epoch has every example of each once."""
    columns: tuple[str, ...] = ()
    """Columns under other names, as NAME=COLUMN, such as `messages=dialog` or `text=body`."""
    overlong: Literal["cut", "windows", "drop"] = "cut"
    """Documents longer than the longest length are cut, split into windows (texts; chats are cut), or left out."""
    bad_records: NoneOrMore = 0
    """Records of each data set that may be left out, counted and named, because they cannot be read."""
    stream: bool = False
    """Read data a part at a time, in its order, and keep no tokenised copy on the disk: for sets larger than that."""
    stream_buffer: Count = 1024
    """Examples that a stream reads ahead and shuffles."""
    data_workers: Count = 1
    """Processes that tokenise."""
    held_out: NoneOrMore = 0
    """Examples of each data set kept out of training, whose losses are logged every `eval_every` steps."""
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
    """Share of synthetic examples whose document is a prompt, read without gates and compressed at its end; with images
    all before the last question is one."""
    eviction_budgets: tuple[KeptShare, ...] = ()
    """Prompts are softly evicted at their end to one of these shares of their entries; none: their keys decay."""
    eviction_temperature: Annotated[float, Range(0, above=True)] = 0.5
    """Softness of that eviction; towards 0 it becomes the runtime's hard choice."""
    facts: tuple[Count, Count] = (4, 8)
    """Fewest and most facts in a synthetic document."""
    questions: tuple[Count, Count] = (3, 6)
    """Fewest and most questions after it."""
    images: bool = False
    """Data are conversations with images: JSONL that names local files, through the model's processor."""
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
    ntp_weight: Annotated[float, Range(0)] = 0.5
    """Weight of the cross-entropy to the text."""
    kl_weight: Annotated[float, Range(0)] = 0.5
    """Weight of the KL between the plain model and the gated one."""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(teacher ‖ student), or KL(student ‖ teacher)."""
    logits_chunk: Count | None = None
    """Target tokens whose logits exist at a time; None for as many as fit 512 MiB."""

    steps: Count = 10_000
    """Optimizer steps."""
    extend: NoneOrMore = 0
    """Further steps after these, at `min_learning_rate`; a finished run continues when it is run again with more."""
    batch_size: Count = 1
    """Rows per device and forward."""
    context_parallel: Count = 1
    """Processes that share every sequence, each with a part of its tokens: for long contexts, full attention only."""
    accumulation: Count | None = None
    """Forwards per optimizer step on each device; None for the launcher's, or 1."""
    learning_rate: Annotated[float, Range(0, above=True)] = 2e-4
    min_learning_rate: Annotated[float, Range(0)] = 1e-6
    warmup_steps: NoneOrMore = 100
    weight_decay: Annotated[float, Range(0)] = 0.0
    max_grad_norm: Annotated[float, Range(0, above=True)] = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = True
    """Recompute layers in backward, and read prompts again: less memory, a third more time."""
    save_attention: bool = False
    """With gradient checkpointing, keep the outputs of attention instead of computing attention again."""
    tf32: bool = False
    """Multiply fp32 matrices, which are the gates' under a bf16 model, in TF32 on GPUs."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Autocast of the model's forwards; None for the launcher's, or no."""
    skip_nonfinite: NoneOrMore = 0
    """Steps of the run that may be skipped, with their examples logged, because a loss or gradient is not finite."""
    seed: int = 0

    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    log_seconds: Annotated[float, Range(0, above=True)] = 30.0
    """Seconds between lines on stderr where that is no terminal."""
    save_every: Count = 100
    """Steps between checkpoints; the last two are kept."""
    save_minutes: Annotated[float, Range(0)] = 0.0
    """Also save whenever this time has passed since the last checkpoint; 0 for steps only."""
    eval_every: NoneOrMore = 0
    """Steps between evaluations under real eviction; 0 for none."""
    eval_budgets: tuple[KeptShare, ...] = (0.2,)
    """Budgets of the evaluation in the loop, as shares of the prompt."""
    eval_cases: Count = 6
    """Cases per retrieval task in the evaluation in the loop."""
    eval_length: Count = 512
    """Length of its documents in tokens."""
    best_metric: str | None = None
    """Keep the gates with the best value of this metric of the evaluation (`eval/kl@0.2`) in `output_dir/best`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether its least or its greatest value is the best."""
    tracker: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Accelerate's trackers to log to, one or both; metrics.jsonl is written in any case."""
    project: str = "tenure"
    """Project name for the trackers."""

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
        given = [name for name in ("mixture", "concatenate") if getattr(self, name)]
        if given and self.data != "synthetic":
            what = "a mixture" if given == ["mixture"] else "data sets to concatenate"
            raise ValueError(f"got data {self.data} and {what}; accepted: one of them")
        if len(given) > 1:
            raise ValueError("got a mixture and data sets to concatenate; accepted: one of them")
        if self.held_out and not self.eval_every:
            raise ValueError(
                f"got held_out {self.held_out} and eval_every 0, so their losses are never computed; accepted: an "
                "eval_every above 0 with held_out"
            )
        if self.held_out and not given and self.data == "synthetic":
            raise ValueError("got held_out with synthetic documents, which never repeat; accepted: data or a mixture")
        if self.best_metric and not self.eval_every:
            raise ValueError(
                f"got best_metric {self.best_metric} and eval_every 0, so nothing is measured; accepted: an eval_every "
                "above 0 with best_metric"
            )
        if self.images and self.chat_template:
            raise ValueError("got images with chat_template; accepted: the processor's own template")
        for name in ("images", "concatenate"):
            if self.stream and getattr(self, name):
                raise ValueError(f"got stream with {name}; accepted: one of them (a mixture can be streamed)")
        if self.stream and self.data_workers > 1:
            raise ValueError(
                f"got stream and data_workers {self.data_workers}; accepted: 1, streams are tokenised as they are read"
            )
        if self.stream and not given and self.data == "synthetic":
            raise ValueError("got stream with synthetic documents, which are never stored; accepted: data or a mixture")
        if self.images and (self.pack or self.concatenate or self.context_parallel > 1):
            name = "pack" if self.pack else "concatenate" if self.concatenate else "context_parallel"
            raise ValueError(f"got images with {name}, but sequences with images run one by one; accepted: one of them")
        if self.prompt_share and self.context_parallel > 1:
            raise ValueError(
                f"got a prompt_share of {self.prompt_share} and context_parallel {self.context_parallel}; accepted: "
                "one of them"
            )

    @property
    def last_step(self) -> int:
        """Optimizer steps at the end of the run."""
        return self.steps + self.extend

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
