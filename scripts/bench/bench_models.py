"""`tenure bench models`: check every architecture on a tiny random model, and make the table of supported models."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, make_console

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ...retention import RetentionGates

PROMPT, QUESTION, PADDING, CHUNK = 36, 5, 7, 8  # tokens
TOLERANCE = 1e-4  # of fp32 logits, relative to the largest
BEGIN, END = "<!-- models -->", "<!-- /models -->"
CHECKS = ("generate", "evict", "question", "chunks", "training", "prompts", "packing")


@dataclass
class ModelsBenchConfig:
    """Check architectures on tiny random models; print the table of what works, with reasons for what does not."""

    only: list[str] = field(default_factory=list)
    """Names of architectures; all if there are none."""
    page: OutputFile | None = None
    """Also write the table into this Markdown file, between its markers."""


@dataclass(frozen=True)
class CheckedModel:
    """One row of the table.

    Attributes:
        name: of the architecture.
        layers: full-attention layers and all layers of the tiny model, e.g. "2 of 4".
        results: by check: "ok", or the reason why it was refused; anything else is a fault.
        faults: checks whose result is wrong or that crashed, with the error.
    """

    name: str
    layers: str
    results: dict[str, str]
    faults: dict[str, str]


class WrongResultError(AssertionError):
    """A number that should equal the plain model's does not."""


def main(config: ModelsBenchConfig) -> int:
    from .tiny_models import TEXT_ARCHITECTURES
    from .tiny_vision_models import VISION_MODELS

    builds: dict[str, Callable[[], Any]] = {name: made.build for name, made in TEXT_ARCHITECTURES.items()}
    builds |= {f"{name} (images)": build for name, build in VISION_MODELS.items()}
    unknown = [name for name in config.only if name not in builds]
    if unknown:
        raise ValueError(f"got the architectures {', '.join(unknown)}; accepted: {', '.join(sorted(builds))}")
    page = config.page
    if page is not None and not (page.is_file() and BEGIN in page.read_text() and END in page.read_text()):
        raise ValueError(f"got the page {page}; accepted: a Markdown file with the lines {BEGIN} and {END}")
    names, rows = sorted(config.only or builds, key=str.casefold), []
    console = make_console()
    with _quiet_transformers():
        for name in names:
            row = check(name, builds[name])
            rows.append(row)
            faults = "; ".join(f"{check}: {error}" for check, error in row.faults.items())
            console.print(f"{name}: {faults or 'ok'}", markup=False)
    text = table(rows)
    console.print(text, markup=False, soft_wrap=True)
    if page is not None:
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    return 1 if any(row.faults for row in rows) else 0


def check(name: str, build: Callable[[], Any]) -> CheckedModel:
    """Runs all checks on one architecture; `build` gives a model, or a model and the arguments of its `generate`."""
    import torch

    from ...retention.decoder_layers import full_attention_layers, text_config

    made = build()
    model, inputs = made if isinstance(made, tuple) else (made, _text_inputs())
    results: dict[str, str] = {}
    faults: dict[str, str] = {}
    try:
        layers = f"{len(full_attention_layers(model))} of {text_config(model).num_hidden_layers}"
    except ValueError as error:
        return CheckedModel(name, "", {"all": str(error)}, {})
    with torch.no_grad():
        plain = _generate(model, inputs)
    checks = {
        "generate": lambda: _same(plain, _within(model, inputs, 1.0)),
        "evict": lambda: _evicts(model, inputs),
        "question": lambda: _continues(model, inputs),
        "chunks": lambda: _same(plain, _within(model, inputs, 1.0, prefill_chunk=CHUNK)),
        "training": lambda: _trains(model),
        "prompts": lambda: _trains(model, prompts=True),
        "packing": lambda: _packs(model),
    }
    for kind, run in checks.items():
        try:
            run()
            results[kind] = "ok"
        except Exception as error:  # every kind of failure is a row of the table
            if _is_refusal(error):
                results[kind] = str(error)
            else:
                faults[kind] = results[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return CheckedModel(name, layers, results, faults)


def table(rows: list[CheckedModel]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | layers | " + " | ".join(CHECKS) + " | refused |", "|" + "---|" * (len(CHECKS) + 3)]
    for row in rows:
        if "all" in row.results:
            cells, reasons = ["–"] * len(CHECKS), [_reason(row.results["all"])]
        else:
            cells = ["FAULT" if kind in row.faults else "✓" if row.results[kind] == "ok" else "–" for kind in CHECKS]
            refused = [kind for kind in CHECKS if row.results[kind] != "ok" and kind not in row.faults]
            reasons = [f"{kind}: {_reason(row.results[kind])}" for kind in refused]
        lines.append(f"| {row.name} | {row.layers or '–'} | {' | '.join(cells)} | {'; '.join(reasons)} |")
    return "\n".join(lines)


def _reason(message: str) -> str:
    """The part of a refusal that names the cause."""
    for clause in (" is not supported: ", " separate packed documents: ", " from its cache: "):
        message = message.split(clause)[-1]
    return message.split(". Supported: ")[0].split("; ")[0].replace("|", "\\|")


def _is_refusal(error: Exception) -> bool:
    """Whether tenure itself raised a ValueError."""
    package = str(Path(__file__).parents[2])
    return isinstance(error, ValueError) and traceback.extract_tb(error.__traceback__)[-1].filename.startswith(package)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings about tiny configurations."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _text_inputs() -> dict[str, torch.Tensor]:
    import torch

    ids = torch.randint(3, 140, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :PADDING] = mask[1, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: int = 6) -> torch.Tensor:
    """Logits of `tokens` greedy tokens, `(rows, tokens, vocab_size)`."""
    import torch

    generate: Any = model.generate
    out = generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def _same(wanted: torch.Tensor, got: torch.Tensor) -> None:
    error = float((wanted - got).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise WrongResultError(f"differs by {error:.1e} of the largest logit")


def _within(model: PreTrainedModel, inputs: dict[str, torch.Tensor], budget: float, **options: Any) -> torch.Tensor:
    from ...eviction import evict

    with evict(model, "streaming_llm", budget, **options):
        return _generate(model, inputs)


def _gates(model: PreTrainedModel, bias: float, init_std: float = 0.4) -> RetentionGates:
    import torch

    from ...retention import RetentionGates

    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=bias, init_std=init_std)


def _evicts(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """By gates at 30 %: the cache's invariants hold, and entries add up."""
    from ...eviction import evict

    with evict(model, "retention", 0.3, gates=_gates(model, 1.0), sinks=1, recent=2, buffer=2) as session:
        _generate(model, inputs, 12)
        session.last_cache.check()
        report = session.report()
    if report.kept_share > 0.5 or report.entries + report.evicted_entries != report.full_entries:
        raise WrongResultError(f"keeps {report.kept_share:.0%} of {report.full_entries} entries at 30 %")


def _continues(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """A question after a context that is in the cache, against transformers' own cache."""
    import torch
    from transformers import DynamicCache

    from ...eviction import evict
    from ...retention.decoder_layers import text_config

    more = torch.randint(3, 140, (2, QUESTION), generator=torch.Generator().manual_seed(5))
    asked = {name: torch.cat([inputs[name], last], 1) for name, last in
             (("input_ids", more), ("attention_mask", torch.ones_like(more)))}  # fmt: skip

    def answer(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
        return _generate(model, asked | {"past_key_values": cache}, 3)

    wanted = answer(DynamicCache(config=text_config(model)))
    with evict(model, "streaming_llm", 1.0) as session:
        _same(wanted, answer(session.new_cache()))


def _trains(model: PreTrainedModel, prompts: bool = False) -> None:
    """Gates at β = 1 leave the model as it is, and every gate of others gets a finite gradient."""
    import torch

    from ...retention import SoftEviction, attach
    from ...retention.decoder_layers import text_decoder
    from ...training import Batch, GateObjective

    ids = _text_inputs()["input_ids"].clamp(min=3)
    positions, targets = torch.arange(PROMPT).expand(2, PROMPT), torch.ones_like(ids, dtype=torch.bool)
    half = PROMPT // 2
    targets[:, : half + 1 if prompts else 1] = False
    with torch.no_grad():
        decoder = text_decoder(model)
        plain = decoder(input_ids=ids, use_cache=False).last_hidden_state
        with attach(model, _gates(model, 1e4, init_std=0.0)):
            _same(plain, decoder(input_ids=ids, use_cache=False).last_hidden_state)
    gates = _gates(model, 1.0)
    objective = GateObjective(model, gates, 0.3, evictions=[SoftEviction(0.4, sinks=1, recent=2)] if prompts else [])
    objective(Batch(ids, positions, None, targets, (half, half) if prompts else ())).total.backward()
    for name, parameter in gates.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise WrongResultError(f"the gradient of {name} is {'missing' if parameter.grad is None else 'not finite'}")


def _packs(model: PreTrainedModel) -> None:
    from ...training.model_checks import require_packing

    require_packing(model)
