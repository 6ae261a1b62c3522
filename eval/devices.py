"""The device that a flag names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def find_device(name: str, flag: str = "--device") -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: it is no device's name, or a GPU that this machine does not have.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{flag} has {name!r}; cpu, cuda, cuda:1 and so on are accepted") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{flag} has {name!r}; this machine has {torch.cuda.device_count()} CUDA devices")
    return device
