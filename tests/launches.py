"""Records kernel launches without a card: tensors on `meta` have shapes and no data, and no kernel runs on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tenure.eviction.ops import page_table
from tenure.retention.ops import gated_attention_triton, kernel_choice, occupancy_triton
from tenure.retention.ops.triton_language import jit
from tenure.scripts.bench.compiling import Constant, KernelCase

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
OPTIONS = {"num_warps": 4, "num_stages": 3}  # Triton's own


@dataclass(frozen=True)
class Launch:
    """A launch as Triton specialises it: types, constants and which integers are multiples of 16."""

    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    divisible: frozenset[str]
    num_warps: int
    num_stages: int

    def unlike(self, other: Launch) -> str:
        """How another launch of the kernel differs, in words."""
        mine, theirs = dict(self.arguments), dict(other.arguments)
        found = [f"{name} {value} or {theirs[name]}" for name, value in mine.items() if value != theirs[name]]
        found += [f"{name} divisible or not" for name in sorted(self.divisible ^ other.divisible)]
        options = (self.num_warps, self.num_stages), (other.num_warps, other.num_stages)
        return ", ".join([*found, *([f"warps and stages {options}"] if options[0] != options[1] else [])])


@dataclass
class Recorder(TorchDispatchMode):
    """Notes launches instead of running them, and the largest tensor that is made in between."""

    launches: list[Launch] = field(default_factory=list)
    largest: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out

    def run(self, function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid), grid
        assert options.pop("enable_fp_fusion") is True
        chosen = {name: options.pop(name, default) for name, default in OPTIONS.items()}
        given = dict(zip(function.arg_names, arguments, strict=False)) | options
        assert sorted(given) == sorted(function.arg_names)
        constant = {name for name, kind in function.fn.__annotations__.items() if "constexpr" in str(kind)}
        found: dict[str, Any] = {}
        divisible = set()
        for name in function.arg_names:
            value = given[name]
            found[name] = value if name in constant else _type(value)
            if name not in constant and isinstance(value, int) and found[name] == "i32" and value % 16 == 0:
                divisible.add(name)
        self.launches.append(Launch(_name(function), tuple(found.items()), frozenset(divisible), **chosen))


def _name(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def _type(value: Any) -> Any:
    """As a `KernelCase` says it; integers that are 1 become constants, as Triton makes them."""
    if isinstance(value, torch.Tensor):
        assert value.is_meta
        return TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(one) for one in value)
    if isinstance(value, int) and value != 1:
        assert -(2**31) <= value < 2**31
        return "i32"
    return "fp32" if isinstance(value, float) else value


def as_launch(case: KernelCase) -> Launch:
    values = {name: one.value if isinstance(one, Constant) else one for name, one in case.arguments.items()}
    ordered = tuple((name, values[name]) for name in case.kernel.arg_names)
    return Launch(_name(case.kernel), ordered, frozenset(case.divisible), case.num_warps, case.num_stages)


def assert_compiled_as_launched(launches: list[Launch], cases: list[KernelCase]) -> None:
    """Every launch is one of the cases, and every case is launched."""
    compiled = {as_launch(case): case.name for case in cases}
    for launch in launches:
        near = [f"{name}: {launch.unlike(one)}" for one, name in compiled.items() if one.kernel == launch.kernel]
        assert launch in compiled, f"{launch.kernel} is launched otherwise than it is compiled: {near}"
    assert not [name for one, name in compiled.items() if one not in launches], "compiled, and not launched"


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Recorder]:
    """Makes recorders of what a card of some capability would be given, for `with`."""
    if not kernel_choice.interpreting():
        pytest.skip("this run compiles")

    def make(capability: int) -> Recorder:
        recorder = Recorder()
        jitted = type(jit(lambda: None))
        monkeypatch.setattr(jitted, "run", lambda self, *a, **k: recorder.run(self, *a, **k))
        for module in (kernel_choice, gated_attention_triton, occupancy_triton, page_table):
            monkeypatch.setattr(module, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
        return recorder

    return make


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels as they run."""
    names: list[str] = []
    jitted = type(jit(lambda: None))
    real = jitted.run

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        names.append(self.fn.__name__)
        return real(self, *arguments, **options)

    monkeypatch.setattr(jitted, "run", run)
    return names


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def heads_behind_tokens(batch: int, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """As a model's projection gives queries, keys and values: `(batch, heads, tokens, dim)`, a view."""
    return meta(batch, tokens, heads, dim).transpose(1, 2)
