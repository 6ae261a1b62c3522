"""Writes four kinds of text that the shipped gates have never seen, from what every Python has.

    python examples/measuring/unseen_texts.py runs/texts

`help` has Python's own help topics, `code` sources of its standard library, `licences` the licence files of installed
packages, and `records` a table of Unicode's characters, a sentence a row. The gates were trained on English essays.
They differ a little between versions of Python and its packages; a sweep's settings.json holds their hashes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import unicodedata
from pathlib import Path

# With many comments and docstrings: facts are hidden between sentences.
MODULES = ("threading", "logging.handlers", "bdb", "ipaddress", "email.message", "smtplib", "dataclasses", "codecs")
LEAST_CHARACTERS = 1000  # of a licence


def help_topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {name: text for name, text in topics.items() if len(text) > LEAST_CHARACTERS}


def sources() -> dict[str, str]:
    library = Path(argparse.__file__).parent
    return {name: (library / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8") for name in MODULES}


def licences() -> dict[str, str]:
    """The distinct licence files of installed packages."""
    found: dict[str, str] = {}
    for package in sorted(importlib.metadata.distributions(), key=lambda one: one.metadata["Name"]):
        for file in package.files or ():
            if "licen" not in file.name.lower() or file.suffix not in ("", ".txt", ".md", ".rst"):
                continue
            text = Path(str(file.locate())).read_text(encoding="utf-8", errors="ignore")
            if len(text) >= LEAST_CHARACTERS and text not in found.values():
                found[package.metadata["Name"]] = text
    return found


def records() -> dict[str, str]:
    rows = []
    for code in range(0x21, 0x2FFF):
        name = unicodedata.name(chr(code), "")
        if name:
            kinds = f"category {unicodedata.category(chr(code))}, direction {unicodedata.bidirectional(chr(code))}"
            rows.append(f"U+{code:04X} {name}, {kinds}.")
    return {"unicode": "\n".join(rows)}


def main(folder: Path) -> None:
    kinds = {"help": help_topics, "code": sources, "licences": licences, "records": records}
    for kind, texts in kinds.items():
        place = folder / kind
        place.mkdir(parents=True, exist_ok=True)
        made = texts()
        for name, text in made.items():
            (place / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{place}: {len(made)} texts, {sum(map(len, made.values())):,} characters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("give the folder to write to: python examples/measuring/unseen_texts.py runs/texts")
    main(Path(sys.argv[1]))
