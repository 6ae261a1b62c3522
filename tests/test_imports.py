"""Imports follow the architecture: no circles, one direction between packages, layers inside eviction and serving.

All imports count: at module level, under `TYPE_CHECKING` and inside functions. A package's `__init__` is a module like
any other. `from package import name` is an import of `package.name` if that is a module, and else of the package's
`__init__`; importing `package.name` doesn't count as importing the `__init__` of `package`, although Python runs it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = "tenure"
# Packages by folder, and the packages that each may import. `tenure/` is the top-level package itself.
MAY_IMPORT: dict[str, set[str]] = {
    "retention": set(),
    "training": {"retention"},
    "eviction": {"retention"},
    "serving": {"eviction", "retention"},
    "eval": {"retention", "eviction", "training"},  # training has the document generator and the assets
    "tenure": {"retention", "training", "eviction", "serving"},
    "scripts": {"retention", "training", "eviction", "serving", "eval", "tenure"},
}
# Imported by all; they import nothing else of the project.
SHARED = {f"{TOP}.{name}" for name in ("checked", "documents", "images", "lazy_names")}
MAIN_MAY_IMPORT = {"scripts"}  # `tenure/__main__.py`, which nothing imports
FOLDERS = [folder for folder in MAY_IMPORT if (ROOT / folder).is_dir()]

# Layers of the two large packages, lowest first. A module imports from lower layers only, and from its own layer as
# long as there is no circle. An entry is a module, or a package with all that is in it; names are paths below the
# package. A module that no entry covers fails the test: new modules are placed here.
LAYERS: dict[str, list[tuple[str, ...]]] = {
    "eviction": [
        ("ops", "model_adapters", "forward_state"),
        ("mrope", "storage", "recorded"),
        ("cache_layer",),
        ("layer_view",),
        ("policies",),
        ("protected_tokens", "recorders", "cache_report"),
        ("token_floors",),
        ("plan",),
        ("presets",),
        ("selection",),
        ("rollback",),
        ("cache",),
        ("serialization", "stacking", "packed", "modalities"),
        ("layer_gates", "session"),
        ("prefill",),
        ("api",),
        ("integrations",),
        ("__init__",),
    ],
    "serving": [
        ("lazy_heap",),
        ("kvcache/base", "kvcache/agent_index", "kvcache/free_ranges", "sampling"),
        ("kvcache/radix_tree",),
        ("kvcache/eviction_history",),
        ("cache_report",),
        ("request", "metrics", "errors", "events"),
        ("kvcache/eviction_policy", "kvcache/belady"),
        ("kvcache/page_pool", "kvcache/paged_sequence"),
        ("kvcache/eviction_queue", "kvcache/memory_pool", "kvcache/prompt_file", "kvcache/disk_store"),
        ("kvcache/disk_pool",),
        ("kvcache/tier_storage",),
        ("kvcache/transfer_queue", "kvcache/transfer", "kvcache/transfer_threads"),
        ("kvcache/evictor",),
        ("kvcache/tiered_cache",),
        ("kvcache/estimates", "kvcache/miss_reasons", "kvcache/__init__"),
        ("workflow/graph_config", "workflow/spec"),
        ("workflow/loaders", "workflow/durations", "workflow/steps_solver", "workflow/transitions"),
        ("workflow/workflow",),
        ("workflow/reuse_model",),
        ("workflow/graph",),
        ("workflow/markov", "workflow/plot", "workflow/__init__"),
        ("hints",),
        ("conversations",),
        ("session_tree",),
        ("prediction", "client_namespaces"),
        ("prefetch",),
        ("scheduler",),
        ("system",),
        ("snapshot",),
        ("packable", "prompt_beginnings", "engine_loop", "answer_stream"),
        ("prompt_cache", "fingerprint", "engine", "client"),
        ("server", "integrations"),
        ("simulation",),
        ("__init__",),
    ],
}
# Packages whose circles and layers are checked.
CHECKED = ("retention", "training", "eviction", "serving", "eval", "scripts", "tenure")


@dataclass(frozen=True)
class Import:
    """An import of one module of the project by another, both as dotted names."""

    importer: str
    imported: str
    line: int


class Tree:
    """The modules of a source tree by dotted name, and what they import from each other."""

    def __init__(self, root: Path, folders: Sequence[str]) -> None:
        self.files: dict[str, Path] = {}
        for folder in folders:
            base = (TOP,) if folder == TOP else (TOP, folder)
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                self.files[".".join((*base, *(part for part in parts if part != "__init__")))] = path
        self.imports: list[Import] = []
        self.problems: list[str] = []  # imports that cannot be right
        for module, path in self.files.items():
            self._read(module, path)

    def _read(self, module: str, path: Path) -> None:
        parts = module.split(".")
        package = parts if path.name == "__init__.py" else parts[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._add(module, alias.name, None, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = package[: max(0, len(package) - node.level + 1)] if node.level else []
                if node.level and not base:
                    self.problems.append(f"{module}, line {node.lineno}: imports from above {TOP}")
                    continue
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    self._add(module, source, alias.name, node.lineno)

    def _add(self, module: str, source: str, name: str | None, line: int) -> None:
        first = source.split(".")[0]
        if first == "tests" or (first in MAY_IMPORT and first != TOP):
            self.problems.append(f"{module}, line {line}: imports {source} by its bare name")
        if first != TOP:
            return
        if name is not None and f"{source}.{name}" in self.files:
            source = f"{source}.{name}"
        if source not in self.files:
            self.problems.append(f"{module}, line {line}: imports {source}, which does not exist")
            return
        self.imports.append(Import(module, source, line))

    def of(self, folder: str) -> list[Import]:
        """The imports by modules of a folder."""
        return [one for one in self.imports if folder_of(one.importer) == folder]


def folder_of(module: str) -> str:
    """`eviction` for `tenure.eviction.ops.naive`, `tenure` for `tenure` itself and its `__main__`."""
    parts = module.split(".")
    return TOP if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def circles(edges: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Groups of modules that import each other (Tarjan's strongly connected components), and modules that do it alone.

    Iterative, since a chain of imports may be longer than Python's stack.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    on_path: set[str] = set()
    for start in edges:
        if start in index:
            continue
        work = [(start, iter(sorted(edges[start])))]
        index[start] = low[start] = len(index)
        path.append(start)
        on_path.add(start)
        while work:
            node, following = work[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    path.append(other)
                    on_path.add(other)
                    work.append((other, iter(sorted(edges.get(other, ())))))
                    break
                if other in on_path:
                    low[node] = min(low[node], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    group = path[path.index(node) :]
                    del path[path.index(node) :]
                    on_path.difference_update(group)
                    if len(group) > 1 or node in edges.get(node, ()):
                        yield sorted(group)


def circles_in(tree: Tree, folder: str) -> list[str]:
    """Every circle among a folder's modules, as its imports."""
    imports = [one for one in tree.of(folder) if folder_of(one.imported) == folder]
    edges: dict[str, set[str]] = {}
    for one in imports:
        edges.setdefault(one.importer, set()).add(one.imported)
    found = []
    for group in circles(edges):
        among = [one for one in imports if {one.importer, one.imported} <= {*group}]
        found.append(", ".join(f"{one.importer} -> {one.imported} (line {one.line})" for one in among))
    return found


def layer_of(module: str, layers: Sequence[Sequence[str]], tree: Tree) -> int | None:
    """The index of the layer whose longest entry covers the module; None if there is none."""
    below = module.split(".")[2:]
    if tree.files[module].name == "__init__.py":
        below = [*below, "__init__"]
    for length in range(len(below), 0, -1):
        entry = "/".join(below[:length])
        for index, names in enumerate(layers):
            if entry in names:
                return index
    return None


def layer_problems(tree: Tree, package: str, layers: Sequence[Sequence[str]]) -> list[str]:
    """Modules of a package that are in no layer, and imports that go upwards."""
    modules = [module for module in tree.files if folder_of(module) == package]
    places = {module: layer_of(module, layers, tree) for module in modules}
    found = [f"{module} is in no layer" for module, place in places.items() if place is None]
    for one in tree.of(package):
        mine, other = places[one.importer], places.get(one.imported)
        if mine is not None and other is not None and other > mine:
            found.append(
                f"{one.importer}, line {one.line}: imports {one.imported}, which is above it "
                f"({', '.join(layers[other])} above {', '.join(layers[mine])})"
            )
    return found


def direction_problems(tree: Tree, folder: str) -> list[str]:
    """Imports of packages that a folder may not import."""
    found = []
    for one in tree.of(folder):
        other = folder_of(one.imported)
        allowed = MAIN_MAY_IMPORT if one.importer == f"{TOP}.__main__" else MAY_IMPORT[folder] | {folder}
        if other not in allowed and one.imported not in SHARED:
            found.append(f"{one.importer}, line {one.line}: imports {one.imported}; accepted: {sorted(allowed)}")
    return found


@pytest.fixture(scope="module")
def project() -> Tree:
    return Tree(ROOT, FOLDERS)


def test_every_import_of_the_project_names_a_module_that_exists(project: Tree) -> None:
    assert not project.problems


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(project: Tree, folder: str) -> None:
    assert not direction_problems(project, folder)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder in CHECKED])
def test_there_are_no_circles(project: Tree, folder: str) -> None:
    assert not circles_in(project, folder)


@pytest.mark.parametrize("package", [package for package in LAYERS if package in CHECKED])
def test_layers_import_downwards(project: Tree, package: str) -> None:
    assert not layer_problems(project, package, LAYERS[package])


def test_no_module_is_in_two_layers() -> None:
    for layers in LAYERS.values():
        names = [name for layer in layers for name in layer]
        assert len(names) == len(set(names))


# The checks themselves, on small trees.


def write_tree(root: Path, files: Mapping[str, str]) -> Tree:
    for name, code in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return Tree(root, sorted({name.split("/")[0] for name in files}))


BASE = {f"{folder}/__init__.py": "" for folder in ("retention", "eviction", "eval", "scripts", "serving")} | {
    "tenure/__init__.py": "",
    "retention/gates.py": "",
    "eviction/policies/__init__.py": "",
    "eval/tasks.py": "",
    "scripts/cli.py": "",
}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import tenure.eviction.policies", ["tenure.eviction.policies"]),
        ("from tenure import scripts", ["tenure.scripts"]),
        ("from tenure.scripts.cli import main", ["tenure.scripts.cli"]),
        ("from tenure import evict", ["tenure"]),
        ("def f():\n    from ..eval import tasks", ["tenure.eval.tasks"]),
        ("from ..eval import answer_score", ["tenure.eval"]),
        ("from .. import serving", ["tenure.serving"]),
        ("from . import gates", ["tenure.retention.gates"]),
        ("from . import attach", ["tenure.retention"]),
        ("from .gates import RetentionGates", ["tenure.retention.gates"]),
        ("if TYPE_CHECKING:\n    from ..eviction.policies import Policy", ["tenure.eviction.policies"]),
        ("import evaluate, torch", []),
        ("'from ..eval import tasks'", []),
    ],
)
def test_the_import_reader_sees(code: str, found: list[str], tmp_path: Path) -> None:
    tree = write_tree(tmp_path, BASE | {"retention/probe.py": code})
    assert not tree.problems
    assert [one.imported for one in tree.imports] == found
    assert all(one.importer == "tenure.retention.probe" for one in tree.imports)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import scripts.cli", "imports scripts.cli by its bare name"),
        ("from tests import conftest", "imports tests by its bare name"),
        ("from tenure.eviction.absent import x", "imports tenure.eviction.absent, which does not exist"),
        ("from .absent import x", "imports tenure.retention.absent, which does not exist"),
        ("from .... import x", "imports from above tenure"),
    ],
)
def test_the_import_reader_refuses(code: str, problem: str, tmp_path: Path) -> None:
    tree = write_tree(tmp_path, BASE | {"retention/probe.py": code})
    assert tree.problems == [f"tenure.retention.probe, line 1: {problem}"]


def test_a_package_init_reads_its_relative_imports_from_itself(tmp_path: Path) -> None:
    tree = write_tree(tmp_path, BASE | {"eviction/policies/__init__.py": "from .snap import x\nfrom ..cache import y",
                                        "eviction/policies/snap.py": "", "eviction/cache.py": ""})  # fmt: skip
    assert [one.imported for one in tree.imports] == ["tenure.eviction.policies.snap", "tenure.eviction.cache"]


def test_imports_in_the_wrong_direction_are_found(tmp_path: Path) -> None:
    files = {
        "retention/probe.py": "from ..eval import tasks",
        "eval/probe.py": "from ..retention import gates\nfrom tenure import evict",
        "scripts/probe.py": "from tenure import evict\nfrom ..serving import x",
        "tenure/__main__.py": "from tenure.scripts import cli",
    }
    tree = write_tree(tmp_path, BASE | files)
    (wrong,) = direction_problems(tree, "retention")
    assert wrong == "tenure.retention.probe, line 1: imports tenure.eval.tasks; accepted: ['retention']"
    (wrong,) = direction_problems(tree, "eval")
    assert wrong.startswith("tenure.eval.probe, line 2: imports tenure;")
    assert not direction_problems(tree, "scripts") and not direction_problems(tree, "tenure")
    tree = write_tree(tmp_path, {"tenure/__init__.py": "def f():\n    from tenure.scripts import cli"})
    tree = Tree(tmp_path, ["tenure", "scripts"])
    assert len(direction_problems(tree, "tenure")) == 1


@pytest.mark.parametrize(
    ("files", "groups"),
    [
        ({"a": "from . import b", "b": "from . import c", "c": ""}, []),
        ({"a": "from .b import x", "b": "if TYPE_CHECKING:\n    from .a import y"}, ["ab"]),
        ({"a": "def f():\n    from . import b", "b": "from . import c", "c": "import tenure.eviction.a"}, ["abc"]),
        ({"a": "from . import a"}, ["a"]),
        ({"a": "from .b import x\nfrom .c import y", "b": "from .a import x", "c": "from .d import x",
          "d": "from .c import z"}, ["ab", "cd"]),
    ],
)  # fmt: skip
def test_circles_are_found(files: dict[str, str], groups: list[str], tmp_path: Path) -> None:
    tree = write_tree(tmp_path, BASE | {f"eviction/{name}.py": code for name, code in files.items()})
    found = circles_in(tree, "eviction")
    seen = ["".join(sorted({word[-1] for word in text.split() if word.startswith("tenure.")})) for text in found]
    assert sorted(seen) == groups


def test_an_init_is_part_of_a_circle_only_where_it_is_imported_itself(tmp_path: Path) -> None:
    files = BASE | {"eviction/__init__.py": "from .cache import RaggedCache"}
    tree = write_tree(tmp_path / "a", files | {"eviction/cache.py": "from . import policies"})
    assert not circles_in(tree, "eviction")
    tree = write_tree(tmp_path / "b", files | {"eviction/cache.py": "from . import Budget"})
    assert circles_in(tree, "eviction") == [
        "tenure.eviction -> tenure.eviction.cache (line 1), tenure.eviction.cache -> tenure.eviction (line 1)"
    ]


def test_a_long_chain_of_imports_is_no_problem() -> None:
    edges = {f"m{number:04}": {f"m{number + 1:04}"} for number in range(3000)}
    assert list(circles(edges)) == []
    assert [len(group) for group in circles(edges | {"m3000": {"m0000"}})] == [3001]


def test_layers_are_held(tmp_path: Path) -> None:
    layers = [("ops",), ("storage", "recorded"), ("cache/base",), ("cache/__init__",), ("__init__",)]
    files = {
        "eviction/__init__.py": "from .cache import x",
        "eviction/ops/__init__.py": "from .naive import x",
        "eviction/ops/naive.py": "if TYPE_CHECKING:\n    from ..storage.pages import Pages",
        "eviction/storage/pages.py": "from ..ops import naive\nfrom ..recorded import x",
        "eviction/recorded.py": "",
        "eviction/cache/__init__.py": "from .base import x",
        "eviction/cache/base.py": "from ..storage import pages\nfrom tenure.retention import gates",
        "eviction/extra.py": "from .ops import naive",
    }
    base = {name: code for name, code in BASE.items() if not name.startswith("eviction/")}
    tree = write_tree(tmp_path, base | files)
    assert not tree.problems
    assert layer_problems(tree, "eviction", layers) == [
        "tenure.eviction.extra is in no layer",
        "tenure.eviction.ops.naive, line 2: imports tenure.eviction.storage.pages, which is above it "
        "(storage, recorded above ops)",
    ]
