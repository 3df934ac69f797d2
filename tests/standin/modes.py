"""What makes torch believe in the device: where tensors are, and that work on them is queued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from standin.device import CUDA, GPU, enqueue, on_gpu, pinned, plain, running
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

T = torch.Tensor
# These have no fixed shape or give a number: the host waits for them.
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::repeat_interleave",
}
ALIASES = {"aten::_unsafe_view", "aten::lift_fresh"}  # views that their schemas do not name
TAKES_INDICES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}


def is_device(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    return torch.device(value) if isinstance(value, str) else None


def _to(tensor: T, *args: Any, **kwargs: Any) -> T:
    kwargs = dict(kwargs)
    device, rest = is_device(kwargs.pop("device", None)), []
    for value in args:
        if is_device(value) is not None:
            device = is_device(value)
        elif isinstance(value, T):
            device, kwargs["dtype"] = (CUDA if on_gpu(value) else value.device), value.dtype
        elif isinstance(value, torch.dtype):
            kwargs["dtype"] = value
        else:
            rest.append(value)
    if rest:
        kwargs["non_blocking"] = rest[0]
        if len(rest) > 1:
            kwargs["copy"] = rest[1]
    here = "cuda" if on_gpu(tensor) else tensor.device.type
    if device is None or device.type == here or device.type == "meta":
        if device is not None and device.type == "meta":
            kwargs["device"] = device
        if "dtype" not in kwargs:
            kwargs["dtype"] = tensor.dtype
        return tensor.to(**kwargs)
    dtype = kwargs.get("dtype") or tensor.dtype
    late = bool(kwargs.get("non_blocking"))
    if device.type == "cuda":
        with plain():
            made = torch.empty(tensor.shape, dtype=dtype)
        return GPU.adopt(made).copy_(tensor, non_blocking=late)
    with plain():
        made = torch.empty(tensor.shape, dtype=dtype)
    made.untyped_storage().pinned = late  # as torch does
    return made.copy_(tensor, non_blocking=late)


def _numpy(tensor: T, *args: Any, **kwargs: Any) -> Any:
    if on_gpu(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    return tensor.numpy()


def _array(tensor: T, *args: Any, **kwargs: Any) -> Any:
    _numpy(tensor)
    return tensor.__array__(*args, **kwargs)


def _tolist(tensor: T) -> Any:
    return _to(tensor, "cpu").tolist()


def _pin(tensor: T, *args: Any) -> T:
    made = tensor.clone()
    made.untyped_storage().pinned = True
    return made


SPECIAL: dict[Any, Callable[..., Any]] = {
    T.device.__get__: lambda t: CUDA if on_gpu(t) else t.device,
    T.is_cuda.__get__: on_gpu,
    T.is_cpu.__get__: lambda t: not on_gpu(t) and t.device.type == "cpu",
    T.is_pinned: lambda t, *_: pinned(t),
    T.get_device: lambda t: 0 if on_gpu(t) else -1,
    torch._C.TensorBase.pin_memory: _pin,
    T.numpy: _numpy,
    T.__array__: _array,
    T.tolist: _tolist,
    T.to: _to,
    T.cpu: lambda t, *a, **k: _to(t, "cpu"),
    T.cuda: lambda t, *a, **k: _to(t, CUDA),
    torch._C.TensorBase.record_stream: lambda *_: None,
}


class Places(TorchFunctionMode):
    """Where tensors are: ``cuda`` means the stand-in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func is T.new_tensor:
            like, *args = args
            device = CUDA if on_gpu(like) else like.device
            func, kwargs = torch.tensor, {"dtype": like.dtype, "device": device} | kwargs
        if kwargs.get("device") is None and not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self.make(func, args, dict(kwargs))

    def make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A factory."""
        pin = kwargs.pop("pin_memory", False)
        device = kwargs.pop("device", None)
        device = None if device is None else torch.device(device)
        cuda = device is not None and device.type == "cuda"
        if pin and device is not None and device.type != "cpu":
            raise RuntimeError("Cannot pin memory: only dense CPU tensors can be pinned")
        if device is not None:
            kwargs["device"] = "cpu" if cuda else device
        if not (cuda or pin):
            return func(*args, **kwargs)
        with plain():
            made = func(*args, **kwargs)
            if func in (torch.as_tensor, torch.asarray):
                made = made.clone()
        if pin:
            made.untyped_storage().pinned = True
            return made
        GPU.adopt(made)
        if GPU.capturing is not None and func not in (torch.empty, torch.empty_strided):
            if func in (torch.tensor, torch.as_tensor):
                GPU.may_wait("a copy from memory that is not pinned")
            with running():
                value = made.clone()
            enqueue(lambda: made.copy_(value))
        return made


class Late(TorchDispatchMode):
    """Work on the device's tensors is queued; ``python_ops`` are written in Python: what they do
    is queued, not that they were called."""

    def __init__(self, python_ops: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.python_ops = python_ops or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        name = schema.name
        if name in self.python_ops:
            with Places(), self:  # torch has left that mode behind
                return self.python_ops[name](*args, **kwargs)
        if name == "aten::copy_":
            return self.copy(*args, **kwargs)
        if name == "aten::_foreach_copy_":
            for target, source in zip(args[0], args[1], strict=True):
                self.copy(target, source, True)
            return None
        if func.namespace == "aten" and func._can_decompose():  # inference mode leaves that to us
            with self:
                return func.decompose(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, T)]
        here = [on_gpu(tensor) for tensor in tensors]
        if not any(here):
            return func(*args, **kwargs)
        if name in ALIASES or any(
            r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
        ):
            return func(*args, **kwargs)
        if not all(here):
            args, kwargs = self.take_along(name, args, kwargs)
        by_mask = name == "aten::index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITS or by_mask:
            GPU.may_wait(name)
            GPU.finish()
            result = func(*args, **kwargs)
            return GPU.adopt(result) if isinstance(result, T) else result
        if name in ("aten::_to_copy",):
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        return self.launch(func, args, kwargs)

    def launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        schema = func._schema
        written = [
            kwargs.get(a.name, args[i] if i < len(args) else None)
            for i, a in enumerate(schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        own = any(r.alias_info is None for r in schema.returns)  # beside what it writes
        if written and not own:
            enqueue(lambda: func(*args, **kwargs))
            results = [w for w, _ in zip(written, schema.returns, strict=False)]
            return results[0] if len(results) == 1 else tuple(results) or None
        key = func, str(tree_map(_shape, (args, kwargs)))
        shapes = GPU.shapes.get(key)
        if shapes is None:
            if GPU.capturing is None:
                GPU.finish()
            with running():
                # vLLM's kernels for the CPU write more than their schemas say.
                copies = (
                    tree_map(_copy, args)
                    if func.namespace != "aten"
                    else [a.clone() if any(a is w for w in written) else a for a in args]
                )
                result = func(*copies, **kwargs)
            several = isinstance(result, (tuple, list))
            results = list(result) if several else [result]
            shapes = [several, *((r.shape, r.stride(), r.dtype) for r in results)]
            GPU.shapes[key] = shapes
        several, *shapes = shapes
        made = [_blank(*shape) for shape in shapes]

        def work() -> None:
            result = func(*args, **kwargs)
            for target, source in zip(made, result if several else [result], strict=True):
                target.copy_(source)

        enqueue(work)
        return tuple(made) if several else made[0]

    def copy(self, target: T, source: T, non_blocking: bool = False) -> T:
        to_gpu, from_gpu = on_gpu(target), on_gpu(source)
        if not to_gpu and not from_gpu:
            return target.copy_(source)
        late = non_blocking and (to_gpu or pinned(target)) and (from_gpu or pinned(source))
        if late or (to_gpu and from_gpu):
            enqueue(lambda: target.copy_(source))
        elif to_gpu:  # the driver takes the value at once
            if source.dim() or GPU.capturing is None:
                GPU.may_wait("a copy from memory that is not pinned")
            with running():
                value = source.clone()
            enqueue(lambda: target.copy_(value))
        else:
            GPU.may_wait("a copy to the host")
            GPU.current.synchronize()
            with running():
                target.copy_(source)
        return target

    def take_along(self, name: str, args: Any, kwargs: Any) -> Any:
        """Scalars and indices of the host go with the launch; nothing else may."""

        def taken(value: Any) -> Any:
            if not isinstance(value, T) or on_gpu(value):
                return value
            if name.startswith("_C::"):  # vLLM's kernels for the CPU: an output made for them
                return GPU.adopt(value)
            if value.dim() and name not in TAKES_INDICES:
                raise RuntimeError(
                    f"{name}: Expected all tensors to be on the same device, but found at least "
                    f"two devices, cuda:0 and cpu! {tuple(value.shape)}"
                )
            with running():
                return value.clone()

        return tree_map(taken, (args, kwargs))


def _shape(value: Any) -> Any:
    if not isinstance(value, T):
        return value
    return tuple(value.shape), value.stride(), value.dtype


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, T) else value


def _blank(shape: Any, stride: Any, dtype: torch.dtype) -> T:
    with plain():
        made = torch.empty_strided(shape, stride, dtype=dtype)
        if made.is_floating_point():
            made.fill_(torch.nan)
        elif dtype != torch.bool:
            made.fill_(torch.iinfo(dtype).min // 2)
    return GPU.adopt(made)


@contextmanager
def on_device(python_ops: dict[str, Callable[..., Any]] | None = None) -> Iterator[None]:
    """``cuda`` is the stand-in in this thread."""
    with Places(), Late(python_ops):
        yield
