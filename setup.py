"""Gives the package's page on an index a description without relative links, which lead nowhere there.

Everything else is in setup.cfg. `TENURE_REPOSITORY=https://… python -m build` makes the README's links and pictures
absolute, at the release's tag; without it they become plain text, since the repository's address is not fixed.
"""

import configparser
import os
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def description(text: str, repository: str, version: str) -> str:
    """The README with absolute links, or with their texts alone where `repository` is empty."""

    def absolute(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if not repository:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository.rstrip('/')}/{kind}/v{version}/{target})"

    return LINK.sub(absolute, text)


def main() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = os.environ.get("TENURE_REPOSITORY", "")
    urls = {"Source": repository} if repository else {}
    setup(long_description=description(readme, repository, config["metadata"]["version"]), project_urls=urls)


if __name__ == "__main__":
    main()
