"""`tenure serve` with a link between host and device of a given speed: `python -m … serve --bandwidth 60 …`.

A CPU has no such link, and copies from memory to memory take no time that a policy could save.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from .. import serve


@dataclass
class ThrottledServeConfig(serve.ServeConfig):
    """Serve as `tenure serve` does, with copies between host and device throttled."""

    bandwidth: float = 60.0
    """MB/s of the link, per direction."""


def main(arguments: list[str]) -> int:
    if arguments[:1] != ["serve"]:
        raise SystemExit(f"got {' '.join(arguments[:1]) or 'no command'}; accepted: serve")
    config = tyro.cli(ThrottledServeConfig, args=arguments[1:])
    return serve.main(config, config.bandwidth * 1e6)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
