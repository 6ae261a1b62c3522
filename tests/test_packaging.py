"""The wheel holds the tree, imports go one way only, and importing anything changes nothing."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("retention", "training", "eviction", "serving", "eval", "scripts")
PRESENT = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")
MAY_IMPORT = {
    "retention": set(),
    "training": {"retention"},
    "eviction": {"retention"},
    "serving": {"eviction", "retention"},
    "eval": {"retention", "eviction", "training"},  # training has the document generator and the assets
    "scripts": {"retention", "training", "eviction", "serving", "eval"},
}


def source_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_names() -> list[str]:
    """Every module of every package, as `tenure.x.y`."""
    names = []
    for folder in PRESENT:
        for path in source_files(folder):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(("tenure", *(part for part in parts if part != "__init__"))))
    return names


def run_python(code: str, *, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither this tree nor an old build/ folder takes part."""
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = out.glob("*.whl")
    return path


def test_wheel_contents_equal_the_tree(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for folder in PRESENT:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {f"tenure/{path.relative_to(ROOT).as_posix()}" for path in files if not path.name.startswith(".")}
    assert shipped == expected


def test_wheel_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "tenure = tenure.scripts.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert "Requires-Python: >=3.10" in text
    assert "License: Apache-2.0" in text
    extras = {line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra: ")}
    assert extras == {"demo", "train", "eval", "kvpress", "agents", "simulate", "serve", "docs", "test", "dev"}


def test_plain_install_imports_everything(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    assert {path.name for path in target.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")} <= {
        "tenure",
        "bin",
    }
    # An editable install's import hook comes first on sys.meta_path; the plain install is to be seen alone.
    code = (
        "import sys, importlib\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') + repr(f)]\n"
        "for name in list(sys.modules):\n"
        "    if name.split('.')[0] == 'tenure': del sys.modules[name]\n"
        f"for name in {module_names()!r}:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(target)!r}), name\n"
    )
    result = run_python(code, cwd=tmp_path, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stderr[-2000:]


def packages_listed() -> list[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["options"]["packages"].split()


@pytest.mark.parametrize("package", packages_listed())
def test_a_bare_name_import_is_refused(package: str):
    bare = package.removeprefix("tenure.")
    result = run_python(f"import {bare}", cwd=ROOT)
    outermost = bare.split(".")[0]
    assert result.returncode != 0
    assert f"import 'tenure.{outermost}', not '{outermost}'" in result.stderr


@pytest.mark.parametrize("package", packages_listed())
def test_every_package_guards_its_own_name(package: str):
    folder = package.removeprefix("tenure.").replace(".", "/")
    tree = ast.parse((ROOT / folder / "__init__.py").read_text())
    after_docstring = next(node for node in tree.body if not isinstance(node, ast.Expr))
    assert ast.unparse(after_docstring).startswith("if not __name__.startswith('tenure.'):\n    raise ImportError(")


def imported_packages(path: Path) -> set[str]:
    """Top-level packages of this project that a file imports, wherever in the file and in whichever form."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = tuple((node.module or "").split("."))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("tenure", *here[: len(here) - node.level])
            if len(here) - node.level < 0:
                pytest.fail(f"{path}: line {node.lineno} imports from above the package")
            module = tuple(node.module.split(".")) if node.module else ()
            names = [(*base, *module, alias.name) for alias in node.names]
        for name in names:
            if name[0] == "tenure":
                found.add(name[1] if len(name) > 1 else "*")
            elif name[0] in FOLDERS or name[0] == "tests":
                found.add(f"bare {name[0]}")
    return found


@pytest.mark.parametrize("folder", PRESENT)
def test_imports_go_one_way(folder: str):
    for path in source_files(folder):
        wrong = imported_packages(path) - MAY_IMPORT[folder] - {folder}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; {folder} may import {MAY_IMPORT[folder]}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import tenure.eviction.policies", {"eviction"}),
        ("from tenure import scripts", {"scripts"}),
        ("def f():\n    from ..eval import tasks", {"eval"}),
        ("from .. import serving", {"serving"}),
        ("from . import gates", {"retention"}),
        ("import scripts.cli", {"bare scripts"}),
        ("from tests import conftest", {"bare tests"}),
        ("import evaluate, torch", set()),
    ],
)
def test_the_import_reader_sees(code: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "retention" / "probe.py"
    path.parent.mkdir()
    path.write_text(code)
    assert imported_packages(path) == found


def test_no_file_of_scripts_hides_a_module_when_run_as_a_script():
    """`accelerate launch scripts/train_gates.py` puts scripts/ first on sys.path."""
    names = {path.stem for path in source_files("scripts") if path.parent.name == "scripts"} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)
    # -I leaves both the checkout and scripts/ out of sys.path
    code = f"import importlib.util as u; print([n for n in {sorted(names)!r} if u.find_spec(n)])"
    clashes = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert clashes.strip() == "[]"


STATE = """
import os, sys, threading
import numpy, torch, transformers, logging, warnings, random
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
    """Without any extra: gates, runtime, data and losses, and the command line."""
    blocked = ["accelerate", "datasets", "wandb", "matplotlib", "gguf", "triton", "lm_eval", "fastapi", "uvicorn"]
    blocked += ["langgraph", "peft"]
    code = (
        "import sys, importlib\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        f"for name in {module_names()!r}: importlib.import_module(name)\n"
    )
    result = run_python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
