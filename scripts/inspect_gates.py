"""`tenure inspect`: show the contents of a gates checkpoint and each head's half-life."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .loading import load_model
from .output import make_console

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..retention import RetentionGates
    from ..retention.calibration import Calibration


@dataclass
class InspectConfig:
    """Show the contents of a gates checkpoint.

    With --model, also run the gates over a text and show the median half-life of each head: the number of tokens after
    which the weight of an entry has halved.
    """

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Folder with tenure_config.json and gates.safetensors; demo; or hub:OWNER/NAME."""
    model: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Base model for measuring half-lives: Hub id, local folder, or `demo`."""
    data: str = "demo"
    """Text to measure on: `demo` (held-out essays), a text file, or a folder."""
    tokens: int = 1024
    """Tokens of the text to use."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--tokens is {self.tokens}; 1 or more is accepted")


def main(config: InspectConfig) -> int:
    from ..retention import RetentionGates

    gates = RetentionGates.from_pretrained(config.path)
    console = make_console()
    console.print(_summary(config.path, gates))
    for title, values in (("Training", gates.info.training), ("Metrics", gates.info.metrics)):
        if values:
            console.print(_table(title, _flat(values)))
    if gates.calibration is not None:
        _show_calibration(console, gates.calibration)
    if config.model is not None:
        _show_half_lives(console, measured_half_lives(config, gates), gates)
    return 0


def measured_half_lives(config: InspectConfig, gates: RetentionGates) -> torch.Tensor:
    """Median over the tokens of a text of ln 2 / -log β, in tokens: `(layers, num_kv_heads)` fp32."""
    import torch

    from ..retention import attach
    from ..training.assets import resolve_texts

    assert config.model is not None
    texts = resolve_texts(config.data, "eval")
    model, tokenizer = load_model(config.model)
    ids: list[int] = []
    for document in texts:
        ids += tokenizer(document.text, add_special_tokens=not ids)["input_ids"]
        if len(ids) >= config.tokens:
            break
    gates.to(model.device)
    with torch.no_grad(), attach(model, gates) as attached:
        model(torch.tensor([ids[: config.tokens]], device=model.device), use_cache=False, logits_to_keep=1)
        log_beta = attached.log_beta()
    return (math.log(2) / -log_beta[:, 0]).median(dim=-1).values.cpu()


def _summary(path: str, gates: RetentionGates) -> Table:
    config, info = gates.config, gates.info
    parameters = sum(parameter.numel() for parameter in gates.parameters())
    rows = {
        "base model": info.base_model or "not recorded",
        "revision": info.revision or "not recorded",
        "layers": f"{len(config.layer_indices)} ({_ranges(config.layer_indices)})",
        "key/value heads": config.num_kv_heads,
        "hidden size": config.hidden_size,
        "gate width": config.gate_width,
        "activation": config.activation,
        "output projection": config.projection,
        "parameters": f"{parameters:,}",
        "output bias": f"{gates.bias.min():.2f} to {gates.bias.max():.2f}",
    }
    return _table(f"Retention gates in {path}", rows)


def _show_calibration(console: Console, found: Calibration) -> None:
    from rich.table import Table

    table = Table(title="Calibration", title_justify="left")
    for name in ("budget", "mean loss", "p-value" if found.method == "ltt" else "bound on the mean", "accepted"):
        table.add_column(name, justify="right")
    for row in found.table:
        table.add_row(
            f"{row.budget:g}", f"{row.mean_loss:.3f}", f"{row.statistic:.3g}", "yes" if row.accepted else "no"
        )
    console.print(table)
    surety = f"with confidence {found.confidence:g}" if found.confidence is not None else "on average"
    console.print(
        f"Budget {found.budget:g} keeps the expected loss ({found.loss}) below {found.bound:g} {surety}: "
        f"{found.policy}, {found.scope}, {found.cases} documents of {found.lengths[0]} to {found.lengths[1]} tokens "
        f"({found.data})",
        highlight=False,
    )


def _table(title: str, rows: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="dim", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, f"{value:g}" if isinstance(value, float) else str(value))
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _show_half_lives(console: Console, half_lives: torch.Tensor, gates: RetentionGates) -> None:
    from rich.table import Table

    table = Table(title="Median half-life in tokens", title_justify="left")
    table.add_column("layer", justify="right", style="dim")
    for head in range(half_lives.shape[1]):
        table.add_column(f"head {head}", justify="right")
    for index, row in zip(gates.layer_indices, half_lives.tolist(), strict=True):
        table.add_row(str(index), *(_tokens(value) for value in row))
    console.print(table)


def _tokens(value: float) -> str:
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _ranges(indices: tuple[int, ...]) -> str:
    """`0-5, 11` for (0, 1, 2, 3, 4, 5, 11)."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
