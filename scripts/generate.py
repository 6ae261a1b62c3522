"""`tenure generate`: stream a model's output while its KV cache stays within a budget."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import Dtype, load_model
from .output import make_console

if TYPE_CHECKING:
    import torch

    from ..eviction import Session

INTRO = "Read this text, then answer the question about it."


@dataclass
class GenerateConfig:
    """Generate text under a KV-cache budget.

    The text is streamed to stdout; a report on the cache follows on stderr. With --question, the prompt is compressed
    to the budget before the question is read, so that the choice of entries cannot depend on it.
    """

    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """The prompt."""
    prompt_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Read the prompt from this file (- for stdin)."""
    data: Annotated[str | None, tyro.conf.arg(metavar="TEXTS")] = None
    """Use the first of these texts as the prompt: `demo` (held-out essays), a text file or a folder."""
    question: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Question about the prompt, asked after the prompt has been compressed."""
    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    policy: str | None = None
    """Eviction policy, by default retention or the preset's: retention, retention_defensive or gate_score (these need
    gates), defensive, layer_defensive, snapkv, adakv, criticalkv, ada_criticalkv, pyramidkv, expected_attention, lagkv,
    rkv, cake, keydiff, knorm, tova, h2o, streaming_llm, random, or full."""
    gates: str = "demo"
    """Trained gates for the retention policies and the calibrated budget: a folder,
    hub:OWNER/NAME, or demo for the shipped ones."""
    budget: int | float | Literal["calibrated"] = 0.2
    """Average number of entries to keep per head: a share of the tokens seen (0.2) or a number (256); calibrated uses
    the budget that `tenure calibrate` stored with the gates."""
    scope: Literal["auto", "global", "layer", "head", "pyramid", "preference"] = "auto"
    """The entries that compete for the budget: those of all heads, a layer, or a head; auto: the policy's default."""
    sinks: int | None = None
    """Number of first tokens that are never evicted; by default the policy's own."""
    recent: int | None = None
    """Number of last tokens that are never evicted; by default the policy's own."""
    buffer: int = 128
    """Tokens that may exceed the budget before the next eviction."""
    preset: Literal["defensivekv", "trimkv", "dbtrimkv", "kvpress"] | None = None
    """Evict as a released code does; options that it fixes must be left out (docs/reference/presets.md)."""
    prefill_chunk: int | None = None
    """Process longer prompts in chunks of this many tokens, with an eviction after each, to bound peak memory."""
    max_new_tokens: int = 128
    """Stop after this many tokens."""
    temperature: float = 0.0
    """0 is greedy decoding; above 0 tokens are sampled."""
    seed: int = 0
    """Seed for sampling."""
    raw: bool = False
    """Continue the prompt as given, without the model's chat template."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.prompt, self.prompt_file, self.data)) != 1:
            raise ValueError("give the prompt with one of --prompt, --prompt-file and --data")
        if self.question is not None and self.raw:
            raise ValueError("--question uses the model's chat template and --raw leaves it out: give one of them")
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError("--max-new-tokens takes 1 or more, --temperature 0 or more")


def main(config: GenerateConfig) -> int:
    prompt = _read_prompt(config)
    import torch

    from ..eviction import evict
    from ..eviction.plan import CALIBRATED
    from ..eviction.presets import make_plan
    from ..retention import RetentionGates

    options: dict[str, Any] = {
        "policy": config.policy, "budget": config.budget, "preset": config.preset,
        "scope": None if config.scope == "auto" else config.scope, "sinks": config.sinks, "recent": config.recent,
        "buffer": config.buffer, "prefill_chunk": config.prefill_chunk,
    }  # fmt: skip
    policy = make_plan(**options).policy  # cheap checks first: mistakes are reported before the model is loaded
    needs_gates = "log_beta" in policy.needs or config.budget == CALIBRATED
    gates = RetentionGates.from_pretrained(config.gates) if needs_gates else None
    model, tokenizer = load_model(config.model, config.device, config.dtype)
    torch.manual_seed(config.seed)
    context, rest = _encode(config, tokenizer, prompt)
    with evict(model, gates=gates.to(model.device) if gates else None, **options) as session:
        started = time.perf_counter()
        tokens = _stream(config, model, tokenizer, session, context, rest)
        _show(config, session, tokens, time.perf_counter() - started)
    return 0


def _read_prompt(config: GenerateConfig) -> str:
    from ..training.assets import resolve_texts

    if config.prompt is not None:
        text = config.prompt
    elif config.data is not None:
        text = resolve_texts(config.data, "eval")[0].text
    elif str(config.prompt_file) == "-":
        text = sys.stdin.read()
    else:
        assert config.prompt_file is not None
        if not config.prompt_file.is_file():
            raise ValueError(f"no file {str(config.prompt_file)!r} to read the prompt from")
        text = config.prompt_file.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _encode(config: GenerateConfig, tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids to compress first (none without a question), and those that follow."""
    from ..eval.prompts import chat_frame, encode

    if config.question is not None:
        frame = chat_frame(tokenizer, INTRO)
        context = [*frame.before, *encode(tokenizer, prompt, plain=True)]
        return context, encode(tokenizer, f"\n\n{config.question}{frame.after}")
    if config.raw or not getattr(tokenizer, "chat_template", None):
        return [], list(tokenizer(prompt)["input_ids"])
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return [], encode(tokenizer, text)


def _stream(
    config: GenerateConfig, model: Any, tokenizer: Any, session: Session, context: list[int], rest: list[int]
) -> int:
    """Generate to stdout; returns the number of new tokens."""
    import torch
    from transformers import TextStreamer

    cache = session.new_cache()
    if context:
        session.extend(cache, context, logits_to_keep=1)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature}
    prompt = _row([*context, *rest], model)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    return output.shape[1] - prompt.shape[1]


def _row(ids: list[int], model: Any) -> torch.Tensor:
    import torch

    return torch.tensor([ids], device=model.device)


def _show(config: GenerateConfig, session: Session, tokens: int, seconds: float) -> None:
    from rich.table import Table

    from ..eviction.plan import CALIBRATED

    report = session.report()
    lengths = report.lengths[0]
    budget = session.plan.budget.amount
    shown = budget if isinstance(budget, str) else f"{budget:g}"
    title = f"KV cache: {session.plan.policy.name}, budget {shown}, scope {session.plan.scope}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_row("entries kept", f"{report.entries:,} of {report.full_entries:,} ({report.kept_share:.0%})")
    table.add_row("most at any time", f"{report.peak_entries:,}")
    table.add_row("memory now / peak", f"{report.bytes / 1e6:.1f} / {report.peak_bytes / 1e6:.1f} MB")
    table.add_row("entries per head", f"{lengths.min()} to {lengths.max()}, mean {lengths.float().mean():.0f}")
    table.add_row("evicted", f"{report.evicted_entries:,} in {report.evictions} evictions")
    if config.budget == CALIBRATED:
        assert session.gates is not None and session.gates.calibration is not None, "the block found the budget there"
        table.add_row("calibrated", session.gates.calibration.promise)
    table.add_row("new tokens", f"{tokens} in {seconds:.1f} s, prompt included")
    make_console(stderr=True).print(table)
