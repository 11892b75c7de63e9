"""A second device, played on the CPU: its tensors do not mix with those of the CPU, as those of a GPU do not.

It calls itself "meta", which autograd knows and which needs no hardware; unlike real meta tensors, each holds its
numbers in a CPU tensor that only this file sees. What torch would refuse for a tensor on a GPU is refused here: to
compute with tensors of both devices (numbers, tensors without a dimension and plain copies apart), and to see one as a
NumPy array.
"""

from collections import Counter

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
# how often the host has waited for the device, by operator
WAITS = Counter()
# what gives the host a number, or a tensor whose size it must know
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave"}
# what only reserves memory or looks at it
_SILENT = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class MixedDevices(AssertionError):
    """An operation was given tensors of both devices."""


class Played(torch.Tensor):
    """A tensor on the played device, with the numbers of `real`, which shares its memory."""

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )

    def __init__(self, real):
        self.numbers = real

    def __repr__(self):
        return f"Played({self.numbers})"

    def tolist(self):
        WAITS["tolist"] += 1
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` makes its tensors past the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return Played(func(*args, **kwargs))
        return func(*args, **kwargs)


class PlayedDevice(TorchDispatchMode):
    """While it is active, tensors can be made on the played device.

    Attributes:
        operators: how many times each operator ran on it.
        launches: the same for those that launch a kernel.
    """

    def __init__(self):
        super().__init__()
        self.operators = Counter()
        self.launches = Counter()
        self._literals = _Literals()

    def __enter__(self):
        self._literals.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        if any(isinstance(x, Played) for x in tensors) or kwargs.get("device") == DEVICE:
            name = func.overloadpacket.__name__
            self.operators[name] += 1
            if not func.is_view and name not in _SILENT:
                self.launches[name] += 1
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_cpu = [x for x in tensors if not isinstance(x, Played) and x.dim()]
    if on_cpu and any(isinstance(x, Played) for x in tensors) and func not in _COPIES:
        raise MixedDevices(f"{func} was given tensors of the played device and of the CPU")
    real_args, real_kwargs = tree_map(lambda x: x.numbers if isinstance(x, Played) else x, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        real_kwargs["device"] = torch.device("cpu")
    name = func.overloadpacket.__name__
    by_mask = name in ("index", "index_put", "index_put_") and any(
        x is not None and x.dtype == torch.bool for x in args[1]
    )
    to_cpu = func in _COPIES and any(isinstance(x, Played) for x in tensors) and _leaves(func, tensors, device)
    if name in _WAITING or by_mask or to_cpu:
        WAITS[name] += 1
    result = func(*real_args, **real_kwargs)
    if (device is not None and torch.device(device) != DEVICE) or (device is None and not _first_is_played(tensors)):
        return result
    wrapped = tree_map(lambda x: Played(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _leaves(func, tensors, device):
    if func is torch.ops.aten.copy_.default:
        return isinstance(tensors[1], Played) and not isinstance(tensors[0], Played)
    return device is not None and torch.device(device) != DEVICE


def _first_is_played(tensors):
    return not tensors or isinstance(tensors[0], Played) or (not tensors[0].dim() and len(tensors) > 1)


def move(module):
    """Put a module's parameters and buffers on the played device, as an engine does when it prepares a model."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Played(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Played(buffer)
    return module
