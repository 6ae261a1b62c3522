"""`tenure generate`: stream a model's output while its KV cache stays within a budget."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import Dtype, load_model, load_processor
from .output import WrittenFile, make_console

if TYPE_CHECKING:
    import torch

    from ..eviction import ModalityKept, Session

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0  # beyond, logits over it are no numbers in fp16, or all the same
SMALL_BUDGET = 100  # a whole number up to it may be meant as a percentage
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
    image: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = ()
    """Images shown before the prompt, in this order; the model must take images (PNG, JPEG, WEBP, GIF or BMP)."""
    image_side: int = 1024
    """Images are reduced to this many pixels on their longer side."""
    protect_images: bool = False
    """Never evict an image's tokens."""
    image_floor: float | None = None
    """Share of the budget, in (0, 1], that the images' tokens keep at least."""
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
    budget: Annotated[int | float | str, tyro.conf.arg(metavar="BUDGET")] = 0.2
    """Entries to keep: a share of the tokens seen (0.2 or 20%), a number per head on average (256), or in all: "65536
    entries", 512MiB; calibrated uses the budget that `tenure calibrate` stored with the gates."""
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
    heat_map: Annotated[Path | None, WrittenFile((".png",), extra="demo"), tyro.conf.arg(metavar="FILE")] = None
    """Draw what each layer and head kept, as a PNG; with images, of each modality."""
    page: Annotated[Path | None, WrittenFile((".html",)), tyro.conf.arg(metavar="FILE")] = None
    """Write an HTML page that shades every token by the heads that kept it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.prompt, self.prompt_file, self.data)) != 1:
            raise ValueError("give the prompt with one of --prompt, --prompt-file and --data")
        if self.question is not None and self.raw:
            raise ValueError("--question uses the model's chat template and --raw leaves it out: give one of them")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {self.max_new_tokens}; 1 or more is accepted")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"--temperature is {self.temperature}; 0, or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g} is accepted"
            )
        if self.image and self.raw:
            raise ValueError("--image uses the model's chat template and --raw leaves it out: give one of them")
        if (self.protect_images or self.image_floor is not None) and not self.image:
            raise ValueError("--protect-images and --image-floor are about the tokens of images: give --image")
        if self.image_floor is not None and not 0 < self.image_floor <= 1:
            raise ValueError(f"--image-floor takes a share of the budget in (0, 1], got {self.image_floor}")
        if self.image_side < 1:
            raise ValueError(f"--image-side takes 1 or more pixels, got {self.image_side}")


def main(config: GenerateConfig) -> int:
    prompt = _read_prompt(config)
    images = _open_images(config)
    import torch

    from ..eviction import evict, modality_ranges
    from ..eviction.plan import CALIBRATED
    from ..eviction.presets import make_plan
    from ..retention import RetentionGates

    options: dict[str, Any] = {
        "policy": config.policy, "budget": config.budget, "preset": config.preset,
        "scope": None if config.scope == "auto" else config.scope, "sinks": config.sinks, "recent": config.recent,
        "buffer": config.buffer, "prefill_chunk": config.prefill_chunk,
    }  # fmt: skip
    if isinstance(config.budget, int) and 1 <= config.budget <= SMALL_BUDGET:
        hint = f"--budget {config.budget} keeps {config.budget} entries per head; {config.budget} % is --budget "
        print(f"{hint}{config.budget}%", file=sys.stderr)
    policy = make_plan(**options).policy  # cheap checks first: mistakes are reported before the model is loaded
    needs_gates = "log_beta" in policy.needs or config.budget == CALIBRATED
    gates = RetentionGates.from_pretrained(config.gates) if needs_gates else None
    processor = load_processor(config.model) if images else None
    model, tokenizer = load_model(config.model, config.device, config.dtype)
    torch.manual_seed(config.seed)
    if processor is None:
        context, rest = _encode(config, tokenizer, prompt)
        further, ranges = {}, {}
    else:
        context, rest, further = _encode_with_images(config, processor, prompt, images)
        ranges = modality_ranges(model.config, torch.tensor(context + rest))[0]
        tokens_of_images = ranges.get("image", ())
        options["protect"] = tokens_of_images if config.protect_images else None
        options["token_floors"] = [] if config.image_floor is None else [(tokens_of_images, config.image_floor)]
    with evict(model, gates=gates.to(model.device) if gates else None, **options) as session:
        started = time.perf_counter()
        ids = _stream(config, model, tokenizer, session, context, rest, further)
        new = len(ids) - len(context) - len(rest)
        _show(config, session, new, time.perf_counter() - started, ranges)
        _draw(config, session, tokenizer, ids, new, ranges)
    return 0


def _open_images(config: GenerateConfig) -> list[Any]:
    """The images of the command line, before anything is loaded."""
    if not config.image:
        return []
    from dataclasses import replace

    from tenure.images import LIMITS, open_image

    return [open_image(path, replace(LIMITS, max_side=config.image_side)) for path in config.image]


def _read_prompt(config: GenerateConfig) -> str:
    from ..training.assets import MAX_TEXT_BYTES, read_text, resolve_texts

    if config.prompt is not None:
        text = config.prompt
    elif config.data is not None:
        text = resolve_texts(config.data, "eval")[0].text
    elif str(config.prompt_file) == "-":
        text = sys.stdin.read(MAX_TEXT_BYTES)
    else:
        assert config.prompt_file is not None
        if not config.prompt_file.is_file():
            raise ValueError(f"no file {str(config.prompt_file)!r} to read the prompt from")
        text = read_text(config.prompt_file)
    if not text.strip():
        place = "standard input" if str(config.prompt_file) == "-" else config.prompt_file or config.data or "--prompt"
        raise ValueError(f"the prompt is empty: there is no text in {place}")
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


def _encode_with_images(
    config: GenerateConfig, processor: Any, prompt: str, images: list[Any]
) -> tuple[list[int], list[int], dict[str, Any]]:
    """As `_encode`, with what the model takes of the images besides token ids."""
    from ..eval.image_prompts import image_prompt

    question = f"\n\n{config.question}" if config.question is not None else ""
    intro = [f"{INTRO}\n\n"] if question else []
    made = image_prompt(processor, [*intro, *images, f"\n{prompt}"], question)
    return made.context_ids, made.rest, made.extra


def _stream(
    config: GenerateConfig, model: Any, tokenizer: Any, session: Session, context: list[int], rest: list[int],
    further: dict[str, Any],
) -> list[int]:  # fmt: skip
    """Generate to stdout; returns all token ids, the prompt's included.

    Args:
        further: inputs of the model for the images of the prompt.
    """
    import torch
    from transformers import TextStreamer

    cache = session.new_cache()
    further = {name: _placed(value, model) for name, value in further.items()}
    if context and config.question is not None:
        session.extend(cache, context, logits_to_keep=1, inputs=further)
        further = {}  # the images are in the cache
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature}
    prompt = _row([*context, *rest], model)
    output = model.generate(
        prompt, **further, attention_mask=torch.ones_like(prompt), past_key_values=cache,
        max_new_tokens=config.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    return output[0].tolist()


def _row(ids: list[int], model: Any) -> torch.Tensor:
    import torch

    return torch.tensor([ids], device=model.device)


def _placed(value: torch.Tensor, model: Any) -> torch.Tensor:
    """On the model's device, pixels in its dtype."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _show(config: GenerateConfig, session: Session, tokens: int, seconds: float, ranges: dict[str, Any]) -> None:
    from rich.table import Table

    from ..eviction import kept_by_modality
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
    if ranges:
        for kept in kept_by_modality(session.last_cache, ranges):
            shown = f"{kept.entries:,} of {kept.full_entries:,} ({kept.kept_share:.0%})"
            table.add_row(f"of {kept.tokens:,} {kept.modality} tokens", shown)
            table.add_row("  by layer", _layer_shares(kept, report.layer_indices))
    table.add_row("evicted", f"{report.evicted_entries:,} in {report.evictions} evictions")
    if config.budget == CALIBRATED:
        assert session.gates is not None and session.gates.calibration is not None, "the block found the budget there"
        table.add_row("calibrated", session.gates.calibration.promise)
    table.add_row("new tokens", f"{tokens} in {seconds:.1f} s, prompt included")
    make_console(stderr=True).print(table)


def _layer_shares(kept: ModalityKept, layer_indices: tuple[int, ...]) -> str:
    """The layers that kept the least and the most of a modality."""
    shares = kept.head_shares.mean(1)
    least, most = int(shares.argmin()), int(shares.argmax())
    return f"{shares[least]:.0%} (layer {layer_indices[least]}) to {shares[most]:.0%} (layer {layer_indices[most]})"


def _draw(
    config: GenerateConfig, session: Session, tokenizer: Any, ids: list[int], new: int, ranges: dict[str, Any]
) -> None:
    """Writes the pictures that were asked for.

    Args:
        ids: of prompt and answer; `new` of them are the answer's.
    """
    if config.heat_map is None and config.page is None:
        return
    from ..eval.pictures import PageDocument, PagePolicy, kept_mask, kept_share, save_heat_map, save_token_page
    from ..eval.prompts import token_texts
    from ..eviction import kept_by_modality

    for path in (config.heat_map, config.page):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    cache, policy = session.last_cache, session.plan.policy.name
    seen = int(cache.tokens_seen[0])  # the last token of an answer may not have been read
    if config.heat_map is not None:
        shares = {"all tokens": kept_share(cache)}
        if len(ranges) > 1:
            shares = {
                f"{kept.tokens} {kept.modality} tokens": kept.head_shares.numpy()
                for kept in kept_by_modality(cache, ranges)
            }
        save_heat_map(config.heat_map, shares, f"What {policy} kept of {seen} tokens")
    if config.page is not None:
        document = PageDocument(token_texts(tokenizer, ids[:seen]), config.question or "", modalities=ranges)
        answer = tokenizer.decode(ids[len(ids) - new :], skip_special_tokens=True)
        subtitle = f"{config.model}, {seen} tokens, {session.report().kept_share:.0%} of the cache kept"
        save_token_page(config.page, document, [PagePolicy(policy, kept_mask(cache), answer)], subtitle)
