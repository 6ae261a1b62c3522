"""The `tenure` command: one module per sub-command, imported only when that sub-command runs.

A sub-command's module has a config dataclass, whose fields and docstrings become its flags and help text, and
`main(config) -> int`, which returns the exit code. A module that parses its arguments itself also has
`parse(arguments, prog) -> config`. To add a sub-command, add a line to `COMMANDS`.
"""

from __future__ import annotations

import codecs
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tenure import __version__
from tenure.checked import verify

from .help_layout import fitted_help, wrapped
from .loading import needs_checkout
from .output import prepare_paths


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
        module: below `tenure.scripts`.
        config: name of the config dataclass in that module.
        summary: line in the overview.
    """

    module: str
    config: str
    summary: str

    def load(self) -> ModuleType:
        """The sub-command's module.

        Raises:
            ImportError: the module is not installed with the package (`bench`, `soak`), or needs a missing extra.
        """
        with needs_checkout():
            return importlib.import_module(f".{self.module}", __package__)

    def config_class(self) -> type[Any]:
        return getattr(self.load(), self.config)


# A name may consist of two words (`bench train`); the first then names a group of commands.
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "demo", "DemoConfig", "Evaluate the shipped gates on a real model, then train new ones for a few steps"
    ),
    "train": Command("train_gates", "TrainConfig", "Train retention gates on a frozen model"),
    "preview": Command("preview", "TrainConfig", "Show what `train` would train on: counts, cuts, targets in colour"),
    "convert": Command("convert", "ConvertConfig", "Convert released gates of TRIM-KV, DBTrimKV and KVzap"),
    "eval": Command(
        "run_lm_eval", "LmEvalArguments", "Run lm-eval under a KV-cache budget (--model tenure); takes all its flags"
    ),
    "fidelity": Command(
        "fidelity", "FidelityConfig", "Measure KL, perplexity and retained attention against the full cache"
    ),
    "turns": Command(
        "turns", "TurnsConfig", "Ask several questions on one kept context: SCBench, LongMemEval, MMDU or generated"
    ),
    "sweep": Command(
        "sweep", "SweepCommand", "Evaluate policies × budgets on many cases; resumable, one process per device"
    ),
    "report": Command(
        "report", "ReportConfig", "Render sweeps as a page: accuracy, KL, bytes, and whether two runs differ"
    ),
    "calibrate": Command(
        "calibrate", "CalibrateConfig", "Find the smallest budget that keeps the loss below a bound, with a guarantee"
    ),
    "generate": Command("generate", "GenerateConfig", "Generate text under a KV-cache budget"),
    "inspect": Command(
        "inspect_gates", "InspectConfig", "Show the contents of a gates checkpoint and each head's half-life"
    ),
    "bench train": Command(
        "bench.bench_train", "TrainBenchConfig", "Time gated attention, a training step and decoding against peers"
    ),
    "bench memory": Command(
        "bench.bench_memory", "MemoryBenchConfig", "Count the memory of a training step of 4B and 8B models"
    ),
    "bench decode": Command(
        "bench.bench_decode", "DecodeBenchConfig", "Time decoding from a compressed cache against the full cache"
    ),
    "bench prefill": Command(
        "bench.bench_prefill", "PrefillBenchConfig", "Time scoring and eviction relative to prefill; peak memory"
    ),
    "bench tree": Command(
        "bench.bench_tree", "TreeBenchConfig", "Time prefix tree and victim selection against simple implementations"
    ),
    "bench steps": Command(
        "bench.bench_steps", "StepsBenchConfig", "Time steps-to-execution on large step graphs: full solves and updates"
    ),
    "bench agents": Command(
        "bench.bench_agents", "AgentsBenchConfig", "Run agent workflows on a real model whose prompts exceed the pool"
    ),
    "bench engine": Command(
        "bench.bench_engine", "EngineBenchConfig", "Measure the serving engine against generate and what requests need"
    ),
    "bench serve": Command(
        "bench.bench_serve", "ServeBenchConfig", "Run agents over HTTP on tenure serve, and beside other servers"
    ),
    "bench trace": Command(
        "bench.bench_trace", "TraceBenchConfig", "Record runs on a real model and compare the simulator's predictions"
    ),
    "bench models": Command(
        "bench.bench_models", "ModelsBenchConfig", "Check every architecture on a tiny model; make the table of models"
    ),
    "bench kernels": Command(
        "bench.bench_kernels", "KernelsBenchConfig", "Compile the Triton kernels for A100 and H100: registers, spills"
    ),
    "bench gpu": Command(
        "bench.bench_gpu", "GpuBenchConfig", "Check every Triton kernel on this GPU, then time it against its peers"
    ),
    "bench kvpress": Command(
        "bench.compare_kvpress", "KvpressBenchConfig", "Compare the entries each policy keeps with kvpress's choice"
    ),
    "serve": Command(
        "serve", "ServeConfig", "Serve a model over HTTP: OpenAI's endpoints, aware of agents and workflows"
    ),
    "simulate": Command(
        "simulate", "SimulateConfig", "Replay published set-ups, studies and traces of serving on a virtual clock"
    ),
    "soak": Command("soak.run_soak", "SoakConfig", "Random load with faults on tiers, prefetch, scheduler and engine"),
    "soak fuzz": Command(
        "soak.run_fuzz", "FuzzConfig", "Hostile files and texts for every reader: refused in a sentence, or right"
    ),
    "soak serve": Command(
        "soak.run_serve_soak", "ServeSoakConfig", "Clients on a server, every answer checked; kill -9 and restarts"
    ),
    "soak train": Command(
        "soak.run_train_soak", "TrainSoakConfig", "Training under random kills and full disks: the same bytes"
    ),
}

USAGE_ERROR = 2
INTERRUPTED = 130
# What stands for the characters of messages and tables where the terminal's encoding has them not.
ASCII = {
    "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "…": "...", "±": "+-", "≤": "<=", "≥": ">=", "→": "->",
    "½": "1/2", "β": "beta", "σ": "sigma", "Δ": "Delta", "’": "'", "│": "|", "─": "-", "━": "-", "╸": "-", "╺": "-",
} | dict.fromkeys("╭╮╰╯├┤┬┴┼┌┐└┘╞╡╪┏┓┗┛┡┩╇", "+")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return its exit code.

    0: success; 1: failure, reported in one sentence on stderr; 2: wrong command line; 130: interrupted.
    """
    prepare_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or _debugging()
    arguments = [argument for argument in arguments if argument != "--traceback"]
    return run_config("tenure", lambda: _dispatch(arguments, show_traceback), show_traceback)


def _dispatch(arguments: Sequence[str], show_traceback: bool) -> int:
    if not arguments:
        print(overview(COMMANDS), file=sys.stderr)
        return USAGE_ERROR
    if arguments[0] in ("-h", "--help", "help"):
        print(overview(COMMANDS))
        return 0
    if arguments[0] == "--version":
        print(f"tenure {__version__}")
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
    """Return the exit code of `call`; report its failures under the name `prog`, as described in `main`."""
    try:
        try:
            return call()
        finally:  # what is left is written now, where a failure can be told; Python's own exit would print a traceback
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _discard_stdout()
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _discard_stdout()  # which may be what is full
        if (_debugging() if show_traceback is None else show_traceback) or not is_user_error(error):
            raise
        print(f"{prog}: {first_line(error)}", file=sys.stderr)
        return 1


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_streams() -> None:
    """Opens the standard streams that the caller has closed on the null device, and makes all texts printable."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error("tenure", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="tenure")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), "registered for output only"
    return "".join(ASCII.get(one, "?") for one in error.object[error.start : error.end]), error.end


def _run(name: str, arguments: Sequence[str]) -> int:
    command = COMMANDS[name]
    module = command.load()
    prog = f"tenure {name}"
    with fitted_help(arguments):
        if hasattr(module, "parse"):
            config = module.parse(arguments, prog)
        else:
            import tyro

            try:
                config = tyro.cli(command.config_class(), prog=prog, args=arguments)
                verify(config)  # numbers that are not finite, or beyond all bounds, pass comparisons of its own
            except ValueError as error:  # newer tyro shows those of `__post_init__` itself
                print(f"{prog}: {error}", file=sys.stderr)
                return USAGE_ERROR
    return module.main(prepare_paths(config))


def _debugging() -> bool:
    return os.environ.get("TENURE_DEBUG", "") not in ("", "0")


def is_user_error(error: Exception) -> bool:
    """Whether the message alone is enough to fix the problem: wrong values or files, and missing extras."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from ..training.fetch import AssetError

    return isinstance(error, AssetError)


def first_line(error: Exception) -> str:
    """The message's first line (some libraries add paragraphs), or the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def overview(commands: dict[str, Command], group: str = "") -> str:
    """The help text that lists the sub-commands, one line each."""
    shown = {name: command for name, command in commands.items() if name.split()[0] == group or not group}
    width = max(map(len, shown), default=0)
    indent = " " * (width + 4)
    rows = [wrapped(command.summary, f"  {name:<{width}}  ", indent) for name, command in shown.items()]
    command = f"tenure {group}".strip()
    return "\n".join(
        [
            f"usage: {command} COMMAND [options]",
            "",
            wrapped(
                "Learned KV-cache eviction: train retention gates, then generate with only the entries that earned "
                "tenure."
            ),
            "",
            "commands:",
            *rows,
            "",
            wrapped(
                "`tenure COMMAND --help` lists a command's options. --traceback (or TENURE_DEBUG=1) shows a failure's "
                "traceback. bench and soak need a checkout of the repository. The demo's model and texts are cached in "
                "$TENURE_CACHE if that is set."
            ),
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


if __name__ == "__main__":
    sys.exit(main())
