"""The wheel holds the installed packages and no more, the sdist everything, and importing has no side effects."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tenure

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tenure", "retention", "training", "eviction", "serving", "eval", "scripts")
PRESENT = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")
# Folders that only a checkout has.
NOT_INSTALLED = ("scripts/bench", "scripts/slurm", "scripts/soak")
# The files of the shipped gates that are installed; the logs of their training are not.
GATES_FILES = ("README.md", "calibration.json", "gates.safetensors", "tenure_config.json")
# The package that is of no use without its extra, and says so when it is imported.
SERVER = "tenure.serving.server"


def source_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def is_installed(path: Path) -> bool:
    """Whether a file of the packages belongs into the wheel."""
    return not path.relative_to(ROOT).as_posix().startswith(tuple(f"{folder}/" for folder in NOT_INSTALLED))


def module_names(installed_only: bool = False) -> list[str]:
    """Every module of every package, as `tenure.x.y`."""
    names = []
    for folder in PRESENT:
        for path in source_files(folder):
            if installed_only and not is_installed(path):
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "tenure" else ("tenure", *parts)
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


def run_python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that neither this tree nor an old build/ folder takes part in what is built."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    return copy


def build(kind: str, source: Path, out: Path) -> Path:
    """`kind` is sdist or wheel."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def shipped_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_contents_equal_the_installed_packages(wheel: Path):
    expected = set()
    for folder in PRESENT:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        files = [path for path in files if not path.name.startswith(".") and is_installed(path)]
        prefix = "" if folder == "tenure" else "tenure/"
        expected |= {f"{prefix}{path.relative_to(ROOT).as_posix()}" for path in files}
    gates = {f"tenure/examples/smollm2-135m-gates/{name}" for name in GATES_FILES}
    expected |= gates | {f"tenure/examples/{path.name}" for path in (ROOT / "examples").glob("*.yaml")}
    shipped = shipped_files(wheel)
    assert shipped == expected
    assert {"tenure/__init__.py", "tenure/__main__.py", "tenure/py.typed", "tenure/scripts/cli.py"} <= shipped
    assert not [name for name in shipped if "/bench" in name or "/soak" in name or "tests/" in name]


def test_the_sdist_is_complete_and_makes_the_same_wheel(source: Path, wheel: Path, tmp_path: Path):
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    packed = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    wanted = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.startswith(("tenure.egg-info/", "build/"))}
    assert not wanted - packed
    assert {"docs/records/kvpress/settings.json", "examples/smollm2-135m-gates/gates.safetensors"} <= packed
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= packed
    assert shipped_files(build("wheel", tree, tmp_path / "wheel")) == shipped_files(wheel)


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        named = archive.read(entry_points).decode()
        assert "tenure = tenure.scripts.cli:main" in named
        assert "[lmms_eval.models]\ntenure = tenure.eval.harness.lmms_model:manifest" in named
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert "Requires-Python: >=3.10" in text
    assert "License: Apache-2.0" in text and "Description-Content-Type: text/markdown" in text
    assert "# tenure" in text and "](docs/" not in text
    extras = {line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra: ")}
    features = {"demo", "train", "eval", "vision", "kvpress", "agents", "simulate", "serve"}
    assert extras == features | {"docs", "test", "dev"}


@pytest.mark.parametrize("repository", ["", "https://example.org/tenure"])
def test_the_index_page_has_no_relative_links(source: Path, repository: str):
    code = (
        "import setuptools; setuptools.setup = lambda **given: print(given['long_description'])\n"
        "import runpy; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run_python(code, cwd=source, TENURE_REPOSITORY=repository)
    assert result.returncode == 0, result.stderr[-2000:]
    targets = re.findall(r"\]\(([^)]+)\)", result.stdout)
    assert targets and all(one.startswith("https://") for one in targets), targets
    ours = [one for one in targets if repository and one.startswith(repository)]
    assert bool(ours) == bool(repository)
    assert all((source / re.sub("^.*/v[0-9.]+/", "", one).partition("#")[0]).exists() for one in ours)
    assert result.stdout.count("```") == (source / "README.md").read_text().count("```")


# An editable install's import hook takes part in every process of this environment; plain installs are tested alone.
ALONE = """
import sys
sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') + repr(f)]
for name in list(sys.modules):
    if name.split('.')[0] == 'tenure': del sys.modules[name]
"""


@pytest.fixture(scope="module")
def plain_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("plain") / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def test_plain_install_imports_everything(plain_install: Path, tmp_path: Path):
    folders = {path.name for path in plain_install.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert folders <= {"tenure", "bin"}
    code = ALONE + (
        "import importlib\n"
        f"for name in {module_names(installed_only=True)!r}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(plain_install)!r}), name\n"
    )
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(plain_install))
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("arguments", [["bench", "decode", "--quick"], ["bench", "gpu", "--help"], ["soak"]])
def test_a_plain_install_says_what_needs_a_checkout(arguments: list[str], plain_install: Path, tmp_path: Path):
    code = ALONE + f"from tenure.scripts.cli import main\nsys.exit(main({arguments!r}))"
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(plain_install))
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    name = " ".join(word for word in arguments if not word.startswith("-"))
    assert line == (
        f"tenure {name}: benchmarks and soak tests are part of the repository and not of the installed package: run "
        "this in a checkout, installed with `pip install -e .`"
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["inspect", "demo"], "Retention gates in demo"),
        (["simulate", "kvflow_single.yaml", "--help"], "usage: tenure simulate"),
        (["simulate", "examples/kvflow_single.yaml", "--cells", "none of these"], "no cell of kvflow_single has"),
        (["inspect", "examples/smollm2-135m-gates"], "no gates at 'examples/smollm2-135m-gates'; accepted: a folder, "),
    ],
)
def test_a_plain_install_finds_what_it_brings_along(
    arguments: list[str], shown: str, plain_install: Path, tmp_path: Path
):
    """In an empty folder, and without the Hub: a connection would fail the test."""
    offline = "import socket\ndef refuse(*_): raise AssertionError('a connection')\nsocket.socket.connect = refuse\n"
    code = ALONE + offline + f"from tenure.scripts.cli import main\nsys.exit(main({arguments!r}))"
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(plain_install))
    assert shown in result.stdout + result.stderr and "Traceback" not in result.stderr, result.stderr[-2000:]


@pytest.mark.real
def test_a_plain_install_generates_in_an_empty_folder(plain_install: Path, tmp_path: Path, real_model_path: str):
    arguments = ["generate", "--prompt", "The sky is", "--max-new-tokens", "2", "--device", "cpu"]
    code = ALONE + f"from tenure.scripts.cli import main\nsys.exit(main({arguments!r}))"
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(plain_install))
    assert result.returncode == 0 and result.stdout.strip(), result.stderr[-2000:]


def test_this_install_resolves_everything_to_the_checkout(tmp_path: Path):
    """Tests run in an editable install; its hook has to find the top-level package beside the mapped folders."""
    code = (
        "import importlib, pathlib\n"
        f"root = pathlib.Path({str(ROOT)!r})\n"
        f"for name in {module_names()!r}:\n"
        "    assert pathlib.Path(importlib.import_module(name).__file__).resolve().is_relative_to(root), name\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_front_door_is_light_and_complete(tmp_path: Path):
    code = (
        "import sys, tenure\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tyro', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(tenure.__all__) <= set(dir(tenure))\n"
        "from importlib.metadata import version\n"
        "assert tenure.__version__ == version('tenure')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from tenure import evict, RetentionGates, Engine\n"
        "import tenure.eviction, tenure.retention, tenure.serving.engine\n"
        "assert evict is tenure.eviction.evict and RetentionGates is tenure.retention.RetentionGates\n"
        "assert Engine is tenure.serving.engine.Engine\n"
        "from tenure import *\n"
        "missing = [name for name in tenure.__all__ if name not in globals()]\n"
        "assert not missing, missing\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    with pytest.raises(AttributeError, match="module 'tenure' has no attribute 'evictt'"):
        tenure.evictt  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_names_that_the_front_door_exports():
    """Lazy names are invisible to them; the imports under `TYPE_CHECKING` say the same."""
    tree = ast.parse(Path(str(tenure.__file__)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == {name: f"tenure.{module}" for name, module in tenure._MODULE_OF.items()}
    assert {*imported, "__version__"} == set(tenure.__all__)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["inspect", "/no/such/gates"]])
def test_python_m_is_the_command(arguments: list[str], tmp_path: Path):
    command = Path(sys.executable).with_name("tenure")
    ran = [
        subprocess.run([*start, *arguments], cwd=tmp_path, capture_output=True, text=True)
        for start in ([str(command)], [sys.executable, "-m", "tenure"])
    ]
    assert ran[0].returncode == ran[1].returncode
    assert (ran[0].stdout, ran[0].stderr) == (ran[1].stdout, ran[1].stderr)
    assert ran[0].stdout or ran[0].stderr


def packages_listed() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["options"]["packages"].split()


def packages_present() -> list[str]:
    """Those of `FOLDERS` but the top-level package, and the ones that are not installed."""
    found = [path.parent.relative_to(ROOT) for folder in PRESENT for path in (ROOT / folder).rglob("__init__.py")]
    return sorted(".".join(("tenure", *path.parts)) for path in found if path.parts != ("tenure",))


def test_every_package_is_listed_or_needs_a_checkout():
    unlisted = set(packages_present()) - set(packages_listed())
    assert all(name.startswith(("tenure.scripts.bench", "tenure.scripts.soak")) for name in unlisted), unlisted
    assert set(packages_listed()) - set(packages_present()) == {"tenure", "tenure.examples"}  # the latter is data only


@pytest.mark.parametrize("package", packages_present())
def test_a_bare_name_import_is_refused(package: str):
    bare = package.removeprefix("tenure.")
    result = run_python(f"import {bare}", cwd=ROOT)
    outermost = bare.split(".")[0]
    assert result.returncode != 0
    assert f"import 'tenure.{outermost}', not '{outermost}'" in result.stderr


@pytest.mark.parametrize("package", packages_present())
def test_every_package_guards_its_own_name(package: str):
    folder = package.removeprefix("tenure.").replace(".", "/")
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    after_docstring = next(node for node in tree.body if not isinstance(node, ast.Expr))
    assert ast.unparse(after_docstring).startswith("if not __name__.startswith('tenure.'):\n    raise ImportError(")


@pytest.mark.parametrize("folder", ["scripts", "scripts/bench"])
def test_no_file_of_scripts_hides_a_module_when_run_as_a_script(folder: str):
    """`accelerate launch scripts/train_gates.py` puts scripts/ first on sys.path, a benchmark scripts/bench/."""
    names = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    names |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert not names & set(sys.stdlib_module_names)
    # -I leaves both the checkout and scripts/ out of sys.path
    code = f"import importlib.util as u; print([n for n in {sorted(names)!r} if u.find_spec(n)])"
    clashes = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert clashes.strip() == "[]"


STATE = """
import os, sys, threading
import numpy, torch, transformers, logging, warnings, random
import rich.default_styles  # which httpx imports, for benchmarks; it advances Python's random numbers
from transformers.modeling_utils import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path),
        "dtype": torch.get_default_dtype(), "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(), "rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(), "numpy rng": repr(numpy.random.get_state()),
        "attention": sorted(AttentionInterface().keys()), "masks": sorted(AttentionMaskInterface().keys()),
        "logging": (logging.root.level, logging.root.handlers[:]), "cuda": torch.cuda.is_initialized(),
        "transformers log": transformers.logging.get_verbosity(), "live threads": threading.active_count(),
        "bars": transformers.logging.is_progress_bar_enabled(),
    }
"""


def test_importing_everything_outside_the_checkout_has_no_side_effects(tmp_path: Path):
    home, folder = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    folder.mkdir()
    code = STATE + (
        "import importlib\n"
        "import httpx  # draws a random number: it imports rich, where that is installed\n"
        "before = state()\n"
        f"for name in {module_names()!r}:\n"
        "    importlib.import_module(name)\n"
        "    after = state()\n"
        "    changed = {k: (before[k], after[k]) for k in before if before[k] != after[k]}\n"
        "    assert not changed, (name, changed)\n"
    )
    result = run_python(code, cwd=folder, HOME=str(home), XDG_CACHE_HOME=str(home), TENURE_CACHE=str(home / "tenure"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == ""
    assert not any(home.rglob("tenure*"))
    assert list(folder.iterdir()) == []


def test_the_base_install_is_enough_to_import(tmp_path: Path):
    """Without any extra: gates, runtime, data and losses, engine, and the command line; all but the HTTP server."""
    blocked = ["accelerate", "datasets", "wandb", "matplotlib", "gguf", "triton", "lm_eval", "fastapi", "uvicorn"]
    blocked += ["langgraph", "peft"]
    code = (
        "import sys, importlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {[name for name in module_names() if not name.startswith(SERVER)]!r}:\n"
        "    importlib.import_module(name)\n"
        f"for name in {[name for name in module_names() if name.startswith(SERVER)]!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: assert \"pip install 'tenure[serve]'\" in str(error), error\n"
        "    else: raise AssertionError(name)\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]


# Commands whose extra is missing, and the extra that the one sentence names.
WITHOUT_EXTRAS = {
    "demo --model /no/model": "demo", "train --model /no/model --data x": "train",
    "serve --model /no/model --compress none": "serve", "eval --tasks tenure_vt --model_args pretrained=x": "eval",
    "simulate kvflow_single.yaml --plot p.png": "simulate", "simulate kvflow_single.yaml --timeline t.svg": "simulate",
    "generate --prompt x --image a.png --policy knorm": "vision",
}  # fmt: skip


def test_a_missing_extra_is_named_in_one_sentence(tmp_path: Path):
    blocked = ["accelerate", "datasets", "matplotlib", "gguf", "lm_eval", "fastapi", "uvicorn", "PIL", "xgrammar"]
    (tmp_path / "a.png").write_bytes(b"x")
    code = (
        "import sys, json, io, contextlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from tenure.scripts.cli import main\n"
        "said = {}\n"
        f"for words in {list(WITHOUT_EXTRAS)!r}:\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = main(words.split())\n"
        "    said[words] = [code, err.getvalue()]\n"
        "print(json.dumps(said))\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for words, (code, err) in json.loads(result.stdout).items():
        assert code == 1 and len(err.splitlines()) == 1, (words, err)
        assert f"pip install 'tenure[{WITHOUT_EXTRAS[words]}]'" in err, (words, err)
