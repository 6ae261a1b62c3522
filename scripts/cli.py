"""The `tenure` command: one sub-command per module of this package, each imported only when it is asked for.

A sub-command's module has a dataclass `Config`, whose fields and docstring become its flags and help, and
`main(config) -> int`, which returns the exit code; one that reads its flags in a way of its own has
`parse(arguments, prog) -> Config` too. To add a sub-command, add a line to `COMMANDS`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Command:
    """Where a sub-command lives (a module of `tenure.scripts`) and its line in the overview."""

    module: str
    summary: str


# A name may have two words (`bench train`): the first then groups the commands that start with it.
COMMANDS: dict[str, Command] = {
    "demo": Command("demo", "See the shipped gates at work on a real model, then train fresh ones for a few steps"),
    "train": Command("train_gates", "Train retention gates on a frozen model"),
    "eval": Command("run_lm_eval", "Run lm-eval, with all its flags, under a KV-cache budget (--model tenure)"),
    "fidelity": Command("measure_fidelity", "Measure KL, perplexity and kept attention against the full cache"),
    "sweep": Command("sweep", "Measure policies at budgets on many cases, resumable, one process a device"),
    "report": Command("report", "Make a page of sweeps: accuracy, KL, bytes, and whether two runs differ"),
    "calibrate": Command("calibrate", "Find the smallest budget that keeps the loss below a bound, with a guarantee"),
    "generate": Command("generate_text", "Generate text under a KV-cache budget"),
    "inspect": Command("inspect_gates", "Show what is in a gates checkpoint and how long each head remembers"),
    "bench train": Command("bench_train", "Time gated attention, a training step and evicted decoding against peers"),
    "bench decode": Command("bench_decode", "Time decoding with a fifth of the cache kept against the plain cache"),
    "bench prefill": Command("bench_prefill", "Time eviction and scoring against the prefill they follow; peak memory"),
    "bench tree": Command("bench_tree", "Time the prefix tree and the choice of victims against plain ways"),
    "bench steps": Command("bench_steps", "Time steps-to-execution on large step graphs: full solves and updates"),
    "bench agents": Command("bench_agents", "Run agent workflows on a real model whose prompts do not all fit"),
    "bench trace": Command("bench_trace", "Record runs on a real model and see whether the simulator foretells them"),
    "bench kernels": Command("bench_kernels", "Compile the Triton kernels for A100 and H100: registers, spills"),
    "bench gpu": Command("bench_gpu", "Check every Triton kernel on this GPU, then time it against its twin and peers"),
    "bench kvpress": Command("compare_kvpress", "Compare what each policy keeps with kvpress, run in its own Python"),
    "simulate": Command("simulate", "Replay papers' set-ups, studies and traces of serving on a virtual clock"),
    "soak": Command("soak", "Random load with faults on tiers, prefetch and scheduler; everything is checked"),
}

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit code.

    0: done; 1: a failure told in one sentence on stderr; 2: a wrong command line; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or _debugging()
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments:
        print(overview(COMMANDS), file=sys.stderr)
        return USAGE_ERROR
    if arguments[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return 0
    if arguments[0] == "--version":
        print(f"tenure {_version()}")
        return 0
    name = find_command(arguments, COMMANDS)
    if name is None:
        return _no_such_command(arguments)
    rest = arguments[len(name.split()) :]
    return run_config(f"tenure {name}", lambda: _run(name, rest), show_traceback)


def find_command(arguments: Sequence[str], commands: dict[str, Command]) -> str | None:
    """The longest name in `commands` that the arguments begin with."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in commands and len(arguments) >= words:
            return name
    return None


def run_config(prog: str, call: Callable[[], int], show_traceback: bool | None = None) -> int:
    """Return what `call` returns; tell its failures under the name `prog`, as described at `main` above."""
    try:
        return call()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (_debugging() if show_traceback is None else show_traceback) or not is_user_error(error):
            raise
        print(f"{prog}: {first_line(error)}", file=sys.stderr)
        return 1


def _run(name: str, arguments: Sequence[str]) -> int:
    module = importlib.import_module(f".{COMMANDS[name].module}", __package__)
    prog = f"tenure {name}"
    if hasattr(module, "parse"):
        return module.main(module.parse(arguments, prog))
    import tyro

    return module.main(tyro.cli(module.Config, prog=prog, args=arguments))


def _debugging() -> bool:
    return os.environ.get("TENURE_DEBUG", "") not in ("", "0")


def is_user_error(error: Exception) -> bool:
    """Whether the message alone tells the user what to change: wrong values and files, and missing extras."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from ..training.fetch import AssetError

    return isinstance(error, AssetError)


def first_line(error: Exception) -> str:
    """The message's first line (some libraries add paragraphs), or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def overview(commands: dict[str, Command], group: str = "") -> str:
    """The help that lists the sub-commands, one line each."""
    shown = {name: command for name, command in commands.items() if name.split()[0] == group or not group}
    width = max(map(len, shown), default=0)
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in shown.items()]
    command = f"tenure {group}".strip()
    return "\n".join(
        [
            f"usage: {command} COMMAND [options]",
            "",
            "Learned KV-cache eviction: train retention gates, then generate with only the entries that earned tenure.",
            "",
            "commands:",
            *rows,
            "",
            "`tenure COMMAND --help` lists a command's options. After a failure, --traceback (or TENURE_DEBUG=1) shows",
            "where in the code it happened. The demo's model and texts are kept in $TENURE_CACHE if that is set.",
        ]
    )


def _no_such_command(arguments: Sequence[str]) -> int:
    first = arguments[0]
    if any(name.split()[0] == first for name in COMMANDS):
        asked_for_help = arguments[1:2] in (["-h"], ["--help"])
        print(overview(COMMANDS, first), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else USAGE_ERROR
    known = ", ".join(COMMANDS)
    print(f"tenure: no command {first!r}; the commands are {known}\n", file=sys.stderr)
    print(overview(COMMANDS), file=sys.stderr)
    return USAGE_ERROR


def _version() -> str:
    try:
        return version("tenure")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
