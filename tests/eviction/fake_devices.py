"""Several GPUs that are not there: tensors with data on the CPU that say `cuda:i` and refuse to meet those of others.

`FakeTensor` of torch refuses the same, but has no data, so that nothing can be selected by it. Here every operation
runs on the CPU once the devices of its tensors have been found equal, and its result is on theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

# Operations that copy between devices, and those whose indices may be on the CPU.
COPIES = {"aten._to_copy.default", "aten.copy_.default"}
INDEXING = {"aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default", "aten._index_put_impl_.default"}
# Python functions that reach operations of CPU tensors only, or look at the device before they are dispatched.
WHOLE = ("where", "__setitem__", "scaled_dot_product_attention", "one_hot")


class MixedDevices(RuntimeError):
    """An operation on tensors of different devices, as CUDA refuses it."""


class OnDevice(torch.Tensor):
    """A tensor on a device that is not there; `data_on_cpu` has its numbers."""

    data_on_cpu: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, data: torch.Tensor, place: torch.device, requires_grad: bool = False) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=torch.device("meta"), requires_grad=requires_grad,
        )  # fmt: skip
        made.data_on_cpu, made.place = data, place
        return made

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"{self.data_on_cpu!r} on {self.place}"

    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.place.index

    def tolist(self) -> Any:
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), str(func)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        place = _common_place(name, args, given)
        if name == "aten._fused_sdp_choice.default":
            return 0
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
            place = None if torch.device(target).type == "cpu" else _numbered(target)
        kwargs.pop("pin_memory", None)
        found = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        if name == "aten.copy_.default":
            return args[0]
        written = {id(on_cpu(x)): x for x in given} if func._schema.is_mutable else {}
        return tree_map(lambda x: written.get(id(x), _placed(x, place)) if isinstance(x, torch.Tensor) else x, found)


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return device if device.index is not None or device.type == "cpu" else torch.device(device.type, 0)


def _placed(data: torch.Tensor, place: torch.device | None) -> torch.Tensor:
    return data if place is None or isinstance(data, OnDevice) else OnDevice(data, place)


def on_cpu(x: Any) -> Any:
    """The numbers of a tensor; other things unchanged."""
    if isinstance(x, OnDevice):
        return x.data_on_cpu
    if type(x) is torch.Tensor and x.is_meta and x.dim() == 0:  # a number that torch wrapped for a "meta" tensor
        return torch.zeros((), dtype=x.dtype)
    return x


def _common_place(name: str, args: Any, given: list[torch.Tensor]) -> torch.device | None:
    """The device of the tensors of an operation; None for the CPU."""
    if name in COPIES:
        return args[0].place if isinstance(args[0], OnDevice) else None
    whole = [x for x in given if x.dim() > 0]
    if name in INDEXING:
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        whole = [x for x in whole if isinstance(x, OnDevice) or not any(x is index for index in indices)]
    places = {x.place if isinstance(x, OnDevice) else None for x in whole}
    if len(places) > 1:
        raise MixedDevices(f"{name} got tensors on {', '.join(sorted(map(str, places)))}")
    if places:
        return places.pop()
    return next((x.place for x in given if isinstance(x, OnDevice)), None)


def _is_fake(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


class FakeDevices(TorchFunctionMode):
    """Within the block `cuda:i` are devices on which tensors can be made and to which they can be moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        fake = [x for x in leaves if isinstance(x, OnDevice)]
        if name in ("to", "cuda") and isinstance(args[0], torch.Tensor):
            return self._moved(func, args, kwargs)
        if name == "new_tensor" and fake:
            made = torch.as_tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype))
            return OnDevice(made, args[0].place)
        if name in WHOLE and fake:
            whole = [x for x in leaves if isinstance(x, torch.Tensor) and x.dim() > 0]
            if name == "__setitem__":  # CUDA copies the value and the indices
                whole = fake[:1]
            if any(not isinstance(x, OnDevice) or x.place != fake[0].place for x in whole):
                raise MixedDevices(f"{name} got tensors on different devices")
            found = func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
            return _placed(found, fake[0].place) if isinstance(found, torch.Tensor) else found
        if name == "as_tensor" and fake:
            return self._moved(torch.Tensor.to, args, kwargs) if kwargs else args[0]
        if _is_fake(kwargs.get("device")):
            place, kwargs["device"] = _numbered(kwargs["device"]), "cpu"
            return _placed(func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)), place)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        tensor, options = args[0], [*args[1:], *kwargs.values()]
        like = next((x for x in options if isinstance(x, torch.Tensor)), None)
        target = next((x for x in options if isinstance(x, str | torch.device)), None if like is None else like.device)
        dtype = next((x for x in options if isinstance(x, torch.dtype)), tensor.dtype if like is None else like.dtype)
        place = tensor.device if target is None else _numbered(target)
        if place == tensor.device and dtype == tensor.dtype:
            return tensor
        data = on_cpu(tensor.detach())
        data = data.to(dtype) if dtype != data.dtype else data.clone()
        return _placed(data, None if place.type == "cpu" else place)


def move_module(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Moves a module's parameters and buffers to a device."""
    place = torch.device(device)
    for one in module.modules():
        for name, parameter in list(one._parameters.items()):
            if parameter is not None:
                moved = OnDevice(on_cpu(parameter.detach()).clone(), place)
                one._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in list(one._buffers.items()):
            if buffer is not None:
                one._buffers[name] = OnDevice(on_cpu(buffer).clone(), place)
        for name, value in list(vars(one).items()):
            if isinstance(value, torch.Tensor):
                setattr(one, name, OnDevice(on_cpu(value).clone(), place))
    return module
