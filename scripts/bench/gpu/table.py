"""The report as plain text, which needs nothing but torch and Triton."""

from __future__ import annotations

from collections.abc import Sequence

from .case import H100, Ceilings
from .running import KernelCheck, KernelRow

HEADINGS = ("kernel", "shape", "µs", "bound", "of H100", "of card", "host µs", "peers in µs (times ours)")
GIGA, TERA = 1e9, 1e12


def ceilings_text(measured: Ceilings) -> str:
    """The GPU's measured ceilings next to those of the data sheet."""
    lines = [f"Ceilings of {measured.name} (in brackets: {H100.name})"]
    for label, name, unit, size in (
        ("copy in memory", "memory", "GB/s", GIGA),
        ("bf16 products", "products", "TFLOP/s", TERA),
        ("exponentials", "exponentials", "10^12/s", TERA),
        ("to the host, pinned", "to_host", "GB/s", GIGA),
        ("from the host, pinned", "to_device", "GB/s", GIGA),
    ):
        lines.append(f"  {label:<22}{getattr(measured, name) / size:>9.4g} ({getattr(H100, name) / size:.4g}) {unit}")
    return "\n".join(lines)


def checks_text(checks: Sequence[KernelCheck]) -> str:
    wrong = [check for check in checks if check.problem]
    lines = [f"Checks: {len(checks) - len(wrong)} of {len(checks)} agree with their twins"]
    return "\n".join([*lines, *(f"  {check.kernel}, {check.shape}: {check.problem}" for check in wrong)])


def rows_text(rows: Sequence[KernelRow]) -> str:
    """One table, and below it what was not timed and why."""
    cells = [_cells(row) for row in rows if row.us is not None]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
    lines = []
    for line in (HEADINGS, *cells):
        texts = [text.ljust(w) if i in (0, 1, 7) else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths))]  # noqa: B905
        lines.append("  ".join(texts).rstrip())
    missing = [f"  {row.kernel}, {row.shape}: {row.skipped}" for row in rows if row.skipped]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, why in row.absent.items():
            reasons.setdefault(f"{row.kernel}, {name}: {why}", []).append(row.shape)
    missing += [f"  {what} ({'; '.join(shapes)})" for what, shapes in reasons.items()]
    return "\n".join([*lines, *(["Not timed:", *missing] if missing else [])])


def _cells(row: KernelRow) -> tuple[str, ...]:
    assert row.us is not None and row.host_us is not None and row.of_h100 is not None and row.of_card is not None
    peers = ", ".join(f"{name} {_number(us)} ({us / row.us:.2g}x)" for name, us in row.peers.items())
    shares = f"{row.of_h100:.2f}", f"{row.of_card:.2f}"
    return (row.kernel, row.shape, _number(row.us), _number(row.bound_us), *shares, _number(row.host_us), peers)


def _number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"
