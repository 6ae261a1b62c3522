"""The choice of a form: the argument, then the environment, then the device; and the documents as kernels read them."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import Segments, gated_attention, occupancy
from tenure.retention.ops import kernel_choice
from tenure.retention.ops.kernel_choice import chosen_kernels
from tenure.retention.ops.naive import allowed


def test_the_argument_beats_the_environment_beats_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENURE_KERNELS", raising=False)
    assert chosen_kernels("cpu") == "reference"
    assert chosen_kernels("cuda") == "triton"
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    assert chosen_kernels("cuda") == "reference"
    assert chosen_kernels("cuda", "triton") == "triton"
    monkeypatch.setenv("TENURE_KERNELS", "cutlass")
    with pytest.raises(ValueError, match="TENURE_KERNELS is 'cutlass'; accepted: auto, triton, reference"):
        chosen_kernels("cpu")
    assert chosen_kernels("cpu", "reference") == "reference"


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = torch.zeros(1, 1, 4, 8)
    message = "kernels is 'triton' and the tensors are on cpu: Triton kernels run on CUDA, or anywhere in a process"
    with pytest.raises(ValueError, match=message):
        gated_attention(x, x, x, x[..., 0], 1.0, implementation="triton")
    with pytest.raises(ValueError, match=message):
        occupancy(x, Segments.whole(1, 8), "triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On CUDA plain torch runs and the log says why; asking for Triton says what to install."""
    monkeypatch.delenv("TENURE_KERNELS", raising=False)
    monkeypatch.setattr(kernel_choice, "_installed", kernel_choice._installed.__wrapped__)
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: None)
    assert chosen_kernels("cuda") == "reference"
    assert caplog.messages == ["Triton is not installed: operations on CUDA run in plain torch"]
    with pytest.raises(ImportError, match="pip install triton"):
        chosen_kernels("cuda", "triton")


def test_bounds_are_what_may_attend() -> None:
    document = torch.tensor([[-1, -1, 0, 0, 0, -1], [0, 0, 1, 2, 2, 2], [-1] * 6, [0] * 6])
    position = torch.tensor([[0, 0, 0, 1, 2, 0], [0, 1, 0, 0, 1, 2], [0] * 6, [0, 1, 2, 3, 4, 5]])
    segments = Segments(document, position, ())
    start, end = segments.bounds
    column = torch.arange(6)
    may = allowed(segments)[:, 0]
    assert start.dtype == end.dtype == torch.int32
    assert torch.equal(may, (column >= start[..., None]) & (column <= column[:, None]))
    assert torch.equal(may, (column[:, None] >= column) & (column[:, None] < end[:, None, :]))
