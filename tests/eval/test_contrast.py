"""Colours of the pages, light and dark: texts and marks can be told from what is behind them (WCAG's ratios)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"
TEXT, MARK = 4.5, 3.0


def colours(name: str, scheme: str) -> dict[str, tuple[float, ...]]:
    """The custom properties of a page's style, those of the dark scheme in place of the others."""
    light, dark = re.findall(r":root \{(.*?)\}", (EVAL / name).read_text(), re.DOTALL)[:2]
    found = dict(re.findall(r"--(\w+): ([^;]+);", light + (dark if scheme == "dark" else "")))
    return {key: tuple(rgb(value)) for key, value in found.items()}


def rgb(value: str) -> list[float]:
    if not value.startswith("#"):
        return [int(part) / 255 for part in value.split()]
    digits = value[1:] if len(value) == 7 else "".join(2 * one for one in value[1:])
    return [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    def luminance(colour: tuple[float, ...]) -> float:
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("page", "front", "behind", "least"),
    [
        ("token_page.html", "ink", ("card", "page", "shade"), TEXT),
        ("token_page.html", "soft", ("card",), TEXT),
        ("token_page.html", "fact", ("card", "shade"), MARK),
        ("token_page.html", "accent", ("line",), MARK),  # who kept a token
        ("report/page.css", "ink", ("card", "page", "lead"), TEXT),
        ("report/page.css", "soft", ("card", "page", "none", "lead"), TEXT),
        ("report/page.css", "link", ("card", "page"), TEXT),
        *(("report/page.css", f"line{number}", ("card",), MARK) for number in range(8)),
    ],
)
def test_contrast(page: str, scheme: str, front: str, behind: tuple[str, ...], least: float):
    found = colours(page, scheme)
    for name in behind:
        assert contrast(found[front], found[name]) >= least, f"{front} on {name}, {scheme}"


def test_the_lines_of_a_chart_differ():
    for scheme in ("light", "dark"):
        found = colours("report/page.css", scheme)
        lines = [found[f"line{number}"] for number in range(8)] + [found["others"]]
        nearest = min(
            sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5
            for at, one in enumerate(lines)
            for other in lines[:at]
        )
        assert nearest > 0.2, scheme
