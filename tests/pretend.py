"""A GPU that is none: tensors that compute on the CPU, but insist on being somewhere else.

Inside `PretendDevice()` whatever is sent or made on the device "meta" becomes a `PretendTensor`.
Its numbers are real, so that `.item()` works and results can be compared with the CPU's; and each
operation is refused that a GPU would refuse: tensors of two devices, a generator of the other
device, a CPU tensor indexed by the device's. On Apple's chips there is no float64: refused, too.
"""

from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")  # PyTorch never looks at the numbers of this one, nor starts a driver
COPIES = ("_to_copy", "copy_")  # what may read one device and write the other


class PretendTensor(torch.Tensor):
    """A tensor that says it is on DEVICE; `inner` holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        facts = dict(strides=inner.stride(), storage_offset=inner.storage_offset(),
                     dtype=inner.dtype, device=DEVICE)
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **facts)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """The context in which DEVICE can be used."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


@cache
def is_composite(operation):
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key)


def compute(operation, args, kwargs):
    """The operation on the CPU, if a GPU would do it as well. RuntimeError if not."""
    if is_composite(operation):  # it counts as what it is made of: .to(device) as a copy
        with PretendDevice():
            return operation.decompose(*args, **kwargs)
    name = operation.overloadpacket.__name__
    tensors = []
    inner_args = [unwrap(x, tensors) for x in args]
    inner_kwargs = {key: unwrap(x, tensors) for key, x in kwargs.items()}
    device = kwargs.get("device") or find_device(name, tensors)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise RuntimeError(f"{name} on {device} with a generator of {generator.device}")

    if "device" in kwargs:
        inner_kwargs["device"] = torch.device("cpu")
    result = operation(*inner_args, **inner_kwargs)
    if device != DEVICE:
        return result
    if isinstance(result, (list, tuple)):
        return type(result)(wrap(x, tensors) for x in result)
    return wrap(result, tensors)


def unwrap(x, tensors):
    """What stands for x on the CPU; all tensors in x are added to `tensors`."""
    if isinstance(x, (list, tuple)):
        return [unwrap(part, tensors) for part in x]
    if isinstance(x, torch.Tensor):
        tensors.append(x)
    return x.inner if isinstance(x, PretendTensor) else x


def find_device(name, tensors):
    """Where the result is. RuntimeError if the operation mixes devices."""
    if not tensors:
        return torch.device("cpu")
    if name in COPIES:
        return tensors[0].device
    if name.startswith(("index", "_index")):
        places = {x.device for x in tensors if x.device == DEVICE or x is tensors[0]}
    else:  # single numbers of the CPU may be anywhere
        places = {x.device for x in tensors if x.device == DEVICE or x.ndim > 0}
    if len(places) > 1:
        raise RuntimeError(f"{name} of tensors on {sorted(map(str, places))}")
    return places.pop() if places else torch.device("cpu")


def wrap(result, tensors):
    """A result as a tensor of DEVICE: an old one if the operation answers what it was given."""
    if not isinstance(result, torch.Tensor):
        return result
    if result.dtype == torch.float64:
        raise RuntimeError("float64 on the device: Apple's chips have none")
    for x in tensors:
        if isinstance(x, PretendTensor) and x.inner is result:
            return x
    return PretendTensor(result)
