"""Agreement between the processes of a run: errors of one reach all, and state is read by the first for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, call: Callable[[], Result], default: Result) -> Result:
    """Calls on the main process; the others wait, get `default`, and raise where the main process raises.

    Without that an error of rank 0, such as a full disk, would leave the others in their next collective.

    Raises:
        ValueError, OSError: those of the call, on all processes.
    """
    if accelerator.num_processes == 1:
        return call()
    from accelerate.utils import broadcast_object_list

    result, error = default, None
    if accelerator.is_main_process:
        try:
            result = call()
        except (ValueError, OSError) as raised:
            error = raised
    (kind, message) = broadcast_object_list([type(error).__name__ if error else "", str(error)])
    if error is not None:
        raise error
    if kind:
        raise (ValueError if kind == "ValueError" else OSError)(message)
    return result


@torch.no_grad()
def broadcast_tensors(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites tensors of the same shapes on all processes by those of the main one."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    for tensor in tensors:
        sent = broadcast(tensor.detach().to(accelerator.device).contiguous())
        tensor.copy_(sent)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces the gradients by their mean over processes, in one reduction; an absent one counts as zero."""
    if accelerator.num_processes == 1:
        return
    chosen = list(parameters)
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in chosen]
    flat = accelerator.reduce(torch.cat([one.flatten() for one in gradients]), "mean")
    assert isinstance(flat, torch.Tensor)
    for one, gradient in zip(chosen, flat.split([one.numel() for one in chosen]), strict=True):
        one.grad = gradient.view_as(one).clone()


def require_same(accelerator: Accelerator, name: str, value: str) -> None:
    """Raises ValueError on all processes when they do not hold the same value, with the values by rank."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([value])
    if len(set(found)) > 1:
        ranks = ", ".join(f"{one} on rank {rank}" for rank, one in enumerate(found))
        raise ValueError(f"the processes of this run have different {name} ({ranks}); accepted: the same on all")
