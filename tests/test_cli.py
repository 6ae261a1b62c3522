"""The `tenure` command: overview, help, errors as one sentence, exit codes; and its sub-commands on real folders."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from tenure.retention import CheckpointInfo, RetentionGates, UnsupportedModelError
from tenure.scripts import cli
from tenure.training.assets import AssetError


@dataclass
class ProbeConfig:
    """Do what the test says."""

    raises: str = ""
    """The error to raise."""
    max_tokens: int = 1
    """A number."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be positive")


def probe_main(config: ProbeConfig) -> int:
    raised: dict[str, BaseException] = {
        "value": ValueError("the budget is 7; 0 to 1 is accepted"),
        "asset": AssetError("The disk is full."),
        "model": UnsupportedModelError("FooModel is not supported: Llama is"),
        "long": OSError("no such model\n\nIf this is private, log in.\nMore advice."),
        "extra": ImportError("this needs matplotlib: pip install tenure[demo]"),
        "interrupt": KeyboardInterrupt(),
        "bug": KeyError("a bug"),
    }
    if config.raises:
        raise raised[config.raises]
    print(f"max_tokens is {config.max_tokens}")
    return 0


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tenure.scripts.probe")
    module.ProbeConfig, module.main = ProbeConfig, probe_main  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tenure.scripts.probe", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe", "ProbeConfig", "Only for tests"))
    monkeypatch.setitem(cli.COMMANDS, "group one", cli.Command("probe", "ProbeConfig", "First of the group"))
    monkeypatch.delenv("TENURE_DEBUG", raising=False)


def exit_code(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"], []])
def test_overview_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    code = exit_code(*arguments)
    out, err = capsys.readouterr()
    shown, silent = (out, err) if arguments else (err, out)
    assert code == (0 if arguments else cli.USAGE_ERROR)
    assert silent == ""
    assert shown.startswith("usage: tenure COMMAND")
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in shown
        assert command.summary in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]):
    assert exit_code("trian", "--steps", "1") == cli.USAGE_ERROR
    assert f"no command 'trian'; the commands are {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith("tenure 0.")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_a_module_with_documented_config_and_readable_help(name, capsys):
    command = cli.COMMANDS[name]
    assert callable(command.load().main)
    config_class = command.config_class()
    assert is_dataclass(config_class)
    assert config_class.__doc__ and "Config(" not in config_class.__doc__, "a docstring of its own is the help"
    assert f"{command.config}(" not in config_class.__doc__
    assert exit_code(*name.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: tenure {name}" in out
    summary = " ".join(config_class.__doc__.split("\n\n")[0].split())
    assert summary in " ".join(out.split())
    for field in fields(config_class):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in out or "PATH" in out, f"{flag} is missing from the help"


def test_flags_reach_the_config_in_kebab_case(probe, capsys: pytest.CaptureFixture[str]):
    assert exit_code("probe", "--max-tokens", "7") == 0
    assert capsys.readouterr().out == "max_tokens is 7\n"
    assert exit_code("group", "one", "--max-tokens", "8") == 0
    assert capsys.readouterr().out == "max_tokens is 8\n"


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("value", "the budget is 7; 0 to 1 is accepted"),
        ("asset", "The disk is full."),
        ("model", "FooModel is not supported: Llama is"),
        ("long", "no such model"),
        ("extra", "this needs matplotlib: pip install tenure[demo]"),
    ],
)
def test_a_user_error_is_one_sentence(kind: str, sentence: str, probe, capsys: pytest.CaptureFixture[str]):
    assert exit_code("probe", "--raises", kind) == 1
    assert capsys.readouterr() == ("", f"tenure probe: {sentence}\n")


def test_a_traceback_when_asked_for_and_for_bugs(probe, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="the budget is 7"):
        cli.main(["probe", "--raises", "value", "--traceback"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["probe", "--raises", "bug"])
    monkeypatch.setenv("TENURE_DEBUG", "1")
    with pytest.raises(ValueError, match="the budget is 7"):
        cli.main(["probe", "--raises", "value"])


def test_interrupt(probe, capsys: pytest.CaptureFixture[str]):
    assert exit_code("probe", "--raises", "interrupt") == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("wrong", [["--max-tokens", "many"], ["--no-such-flag"], ["--max-tokens", "0"]])
def test_a_wrong_command_line_exits_with_2(wrong: list[str], probe):
    assert exit_code("probe", *wrong) == cli.USAGE_ERROR


@pytest.mark.parametrize("arguments", [["group"], ["group", "--help"], ["group", "two"]])
def test_a_group_lists_its_commands(arguments: list[str], probe, capsys: pytest.CaptureFixture[str]):
    asked = "--help" in arguments
    assert exit_code(*arguments) == (0 if asked else cli.USAGE_ERROR)
    out, err = capsys.readouterr()
    shown = out if asked else err
    assert "usage: tenure group COMMAND" in shown
    assert "group one  First of the group" in shown
    assert "Only for tests" not in shown


def modules_after(code: str) -> set[str]:
    """Modules in a fresh process after this code."""
    code = f"import sys\n{code}\nsys.stderr.write(chr(10) + ' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.splitlines()[-1].split())


def test_no_help_imports_anything_heavy():
    """Torch alone takes longer to import than a help may take to appear."""
    names = [name for name in cli.COMMANDS if name != "eval"]  # whose help contains lm-eval's, which imports numpy
    code = (
        "from tenure.scripts.cli import main\n"
        f"for name in {names!r}:\n"
        "    try: main([*name.split(), '--help'])\n"
        "    except SystemExit: pass\n"
    )
    heavy = {"torch", "transformers", "numpy", "matplotlib", "wandb", "lm_eval", "fastapi", "huggingface_hub", "triton"}
    assert not heavy & modules_after(code)
    code = "from tenure.scripts.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass"
    assert not (heavy - {"lm_eval", "numpy"}) & modules_after(code)


def test_importing_the_library_leaves_the_compile_stack_alone():
    """transformers' model classes bring torch.compile and sympy along: two thirds of the time of a first import."""
    found = modules_after("import tenure.eviction, tenure.training.trainer, tenure.eval.runner")
    heavy = {"torch._dynamo", "sympy", "transformers.modeling_utils", "transformers.modeling_layers", "datasets"}
    assert not (heavy | {"accelerate", "matplotlib", "rich", "wandb", "lm_eval", "gguf"}) & found
    alone = modules_after("import torch, transformers.cache_utils")
    assert len(found) - len(alone) < 250  # 170 when this was written


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("tenure")
    result = subprocess.run([str(command), "inspect", "/no/such/gates"], capture_output=True, text=True)
    assert result.returncode == 1
    own = result.stderr[result.stderr.index("tenure inspect:") :]  # torchao writes lines of its own when it is imported
    assert own.startswith("tenure inspect: no gates at '/no/such/gates'")
    assert len(own.splitlines()) == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture
def folders(tmp_path: Path, tiny_llama) -> tuple[str, str]:
    """A tiny model with a tokenizer, and gates for it, as folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(124))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, initial_bias=3.0)
    info = CheckpointInfo.for_model(tiny_llama, base_model="tiny/llama", metrics={"accuracy": {"needle": 0.9}})
    gates.save_pretrained(tmp_path / "gates", info)
    return str(tmp_path / "model"), str(tmp_path / "gates")


def test_generate_streams_and_reports(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, gates = folders
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{number % 124}" for number in range(200)))
    arguments = ["--prompt-file", str(tmp_path / "prompt.txt"), "--model", model, "--gates", gates, "--device", "cpu"]
    arguments += ["--budget", "0.25", "--sinks", "2", "--recent", "4", "--max-new-tokens", "5"]
    assert exit_code("generate", *arguments) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) <= 5
    assert "KV cache: retention, budget 0.25, scope global" in err
    assert "of 1,22" in err  # 204 tokens seen, 3 layers, 2 heads
    assert exit_code("generate", *arguments, "--policy", "full") == 0
    full, err = capsys.readouterr()
    assert "(100%)" in err
    assert exit_code("generate", *arguments, "--budget", "1.0") == 0
    assert capsys.readouterr().out == full
    assert exit_code("generate", *arguments, "--prefill-chunk", "64") == 0
    assert "in 4 evictions" in capsys.readouterr().err
    arguments[:2] = ["--data", str(tmp_path / "prompt.txt")]
    assert exit_code("generate", *arguments, "--policy", "full") == 0
    assert capsys.readouterr().out == full


def test_generate_compresses_before_the_question(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    model, gates = folders
    context = " ".join(f"w{number}" for number in range(100))
    arguments = ["--prompt", context, "--question", "w1 w2 w3", "--model", model, "--gates", gates]
    arguments += ["--budget", "20", "--recent", "4", "--max-new-tokens", "2", "--device", "cpu"]
    assert exit_code("generate", *arguments) == 0
    _, err = capsys.readouterr()
    assert "in 1 evictions" in err  # once, at the end of the context


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "with one of --prompt, --prompt-file and --data"),
        (["--prompt", "x", "--prompt-file", "y"], 2, "with one of --prompt, --prompt-file and --data"),
        (["--prompt", "x", "--data", "demo"], 2, "with one of --prompt, --prompt-file and --data"),
        (["--data", "/no/texts"], 1, "no file or folder '/no/texts'"),
        (["--prompt", "x", "--raw", "--question", "y"], 2, "give one of them"),
        (["--prompt", " "], 1, "the prompt is empty: there is no text in --prompt"),
        (["--prompt-file", "/no/file"], 1, "no file '/no/file' to read the prompt from"),
        (["--prompt", "x", "--policy", "nope"], 1, "unknown policy 'nope'; known: ada_criticalkv"),
        (["--prompt", "x", "--gates", "/no/gates"], 1, "no gates at '/no/gates'"),
        (["--prompt", "x", "--policy", "full", "--model", "/no/model"], 1, "neither an existing folder nor a Hub id"),
    ],
)
def test_generate_tells_what_is_wrong(arguments, code, sentence, capsys: pytest.CaptureFixture[str]):
    assert exit_code("generate", *arguments) == code
    out, err = capsys.readouterr()
    assert sentence in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err


def test_a_budget_out_of_range_gets_no_hint(capsys: pytest.CaptureFixture[str]):
    assert exit_code("generate", "--prompt", "x", "--budget", "-1") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tenure generate: budget -1 is out of range: give a float in (0, 1]")


def test_generate_help_names_every_policy(capsys: pytest.CaptureFixture[str]):
    from tenure.eviction import policy_names

    exit_code("generate", "--help")
    out = capsys.readouterr().out
    for name in policy_names():
        assert name in out


def test_inspect_shows_the_checkpoint(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    _, gates = folders
    assert exit_code("inspect", gates) == 0
    out = capsys.readouterr().out
    for shown in ("tiny/llama", "3 (0-2)", "output projection", "shared", "3.00 to 3.00", "accuracy.needle", "0.9"):
        assert shown in out


def test_inspect_measures_half_lives(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, gates = folders
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 124}" for number in range(50)))
    assert exit_code("inspect", gates, "--model", model, "--data", str(tmp_path / "text.txt")) == 0
    out = capsys.readouterr().out
    assert "Median half-life in tokens" in out
    # an output bias of 3 alone gives -log β = 0.0486, a half-life of 14.3 tokens
    rows = [line for line in out.splitlines() if line.count("│") == 4 and line.split("│")[1].strip().isdigit()]
    assert len(rows) == 3
    for row in rows:
        for cell in row.split("│")[2:4]:
            assert 10 < float(cell) < 20


@pytest.mark.real
def test_generate_answers_with_the_real_model(real_model_path: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--prompt", "What is the capital of France?", "--policy", "snapkv", "--budget", "0.9"]
    assert exit_code("generate", *arguments, "--max-new-tokens", "12") == 0
    assert "Paris" in capsys.readouterr().out
