"""GPUs that are not there: tensors lie on the CPU, each with the device it pretends to be on, and no operation may mix
devices.

torch's FakeTensorMode has tensors of cuda:0 without CUDA too, but its autograd graph needs CUDA's own device guard: it
fails at the first convolution that
wants a gradient. Here numbers are computed, so that results can be compared with those of one device.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")
PACKAGE = "diffx2ct"  # its lines are named in messages
COPIES = {"aten::copy_", "aten::_copy_from"}  # operations that may read another device
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # indices may be on the CPU


class MixedDevices(RuntimeError):
    "Error that torch raises on real GPUs: an operation was given tensors of two devices."


@dataclass(frozen=True)
class Copy:
    "A tensor that changed its device."

    source: torch.device
    target: torch.device
    shape: tuple[int, ...]
    function: str  # innermost function of the package, such as `walk`
    name: str  # in `DistributedUNet.walk` what is sent: x, h, emb, tokens, skip0.1, lifted2; else ""

    @property
    def kind(self) -> str:
        "Copies of one line of code between the same devices."
        return f"{self.function} {self.name} {self.source} {self.target}"


@cache
def ours(file: str) -> bool:
    "True if a file is of the package."
    return Path(file).parent.name == PACKAGE


def place(target: torch.device) -> tuple[str, str]:
    "Function and name of a copy to a device, from the frames that lead to it."
    frame = sys._getframe(1)
    while frame and (
        not ours(frame.f_code.co_filename)
        or frame.f_code.co_name in ("to_device", "<listcomp>", "<genexpr>", "<lambda>")
    ):
        frame = frame.f_back
    if frame is None:
        return "", ""
    function, local = frame.f_code.co_name, frame.f_locals
    if function != "walk":
        return function, ""
    return function, local["k"] if local["at"] == target else "h"  # at the end the result goes home


class Transfer(torch.autograd.Function):
    "A copy to another device; its gradient comes back to the device of the source."

    @staticmethod
    def forward(ctx, x, devices, target):
        ctx.devices, ctx.source = devices, devices.of(x)
        return devices.mark(x.detach().clone(), target)

    @staticmethod
    def backward(ctx, grad):
        return ctx.devices.mark(grad.detach().clone(), ctx.source), None, None


class Devices(TorchFunctionMode):
    """Context manager: machine with `gpus` CUDA devices.

    `.device`, `.to`, `.cpu` and every `device=` see pretended devices; an operation on tensors of several devices
    raises `MixedDevices`.
    """

    def __init__(self, gpus: int):
        super().__init__()
        self.gpus = [torch.device("cuda", i) for i in range(gpus)]
        self.places: dict[int, tuple[StorageWeakRef, torch.device]] = {}  # of storages
        self.copies: list[Copy] = []
        self.used: Counter[torch.device] = Counter()  # operations on each device
        self.forget: Callable[[Copy], bool] = lambda copy: False  # which copies are left out
        self.check = Check(self)

    def of(self, x: Tensor) -> torch.device:
        "Return the pretended device of a tensor."
        if x.is_meta:
            return META
        found = self.places.get(x.untyped_storage()._cdata)
        return found[1] if found else CPU

    def mark(self, x: Tensor, device: torch.device) -> Tensor:
        "Put a tensor's storage on a device; the weak reference keeps the storage's address from being used again."
        storage = x.untyped_storage()
        if device is CPU:
            self.places.pop(storage._cdata, None)
        else:
            self.places[storage._cdata] = (StorageWeakRef(storage), device)
        return x

    def named(self, device) -> torch.device:
        "A device as torch would complete it, cuda is cuda:0; one object for each."
        device = torch.device("cuda", device) if type(device) is int else torch.device(device)
        if device.type != "cuda":
            return {"cpu": CPU, "meta": META}[device.type]
        index = device.index or 0
        assert index < len(self.gpus), f"cuda:{index} is not on this machine"
        return self.gpus[index]

    def move(self, x: Tensor, device: torch.device, again: bool = False) -> Tensor:
        "A copy on another device; the tensor itself where it is there already."
        source = self.of(x)
        if source == device and not again:
            return x
        if "meta" in (source.type, device.type):
            return x.to(device)
        if source != device:
            copy = Copy(source, device, tuple(x.shape), *place(device))
            self.copies.append(copy)
            if self.forget(copy):
                return x
        return Transfer.apply(x, self, device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ASKED:
            if not args[0].is_meta:
                return ASKED[func](self, *args, **kwargs)
        elif kwargs.get("device") is not None:
            device = self.named(kwargs["device"])
            if device is META:
                return func(*args, **kwargs)
            made = func(*args, **kwargs | {"device": CPU})
            is_copy = func is torch.as_tensor and isinstance(args[0], Tensor)
            return self.move(made, device) if is_copy else self.mark(made, device)
        made = func(*args, **kwargs)
        return self.mark(made, self.of(args[0])) if func is Tensor.new_tensor else made

    def numpy(self, x: Tensor, *args, **kwargs):
        "Numbers on a GPU are no array."
        if self.of(x) is not CPU:
            raise MixedDevices(f"numpy of a tensor on {self.of(x)}")
        return x.numpy(*args, **kwargs)

    def to(self, x: Tensor, *args, **kwargs) -> Tensor:
        "`Tensor.to` with a device, a type, or a tensor that has both."
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        if other is not None:
            return self.to(x, self.of(other), other.dtype, *args[1:], **kwargs)
        args = tuple(torch.device("cuda", a) if type(a) is int else a for a in args)
        copy = bool(kwargs.pop("copy", False))
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != x.dtype:
            x = x.to(dtype)
        if layout is not None:
            x = x.contiguous(memory_format=layout)
        if device is None:
            return x.clone() if copy else x
        return self.move(x, self.named(device), copy)

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(self.patches())
        super().__enter__()
        self.check.__enter__()
        return self

    def __exit__(self, *error):
        self.check.__exit__(*error)
        super().__exit__(*error)
        self.stack.close()

    @contextmanager
    def patches(self) -> Iterator[None]:
        "Replace the calls of CUDA itself: number of devices, autocast, and the grouping of tensors by device."
        init = torch.autocast.__init__

        def autocast(this, device_type, *args, **kwargs):
            init(this, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

        def grouped(lists, with_indices=False):
            groups: dict = {}
            for i, tensors in enumerate(zip(*[v or [None] * len(lists[0]) for v in lists], strict=True)):
                key = next((self.of(t), t.dtype) for t in tensors if t is not None)
                columns, places = groups.setdefault(key, ([[] for _ in lists], []))
                for column, t in zip(columns, tensors, strict=True):
                    column.append(t)
                places.append(i)
            return {k: ([c if v else [] for c, v in zip(columns, lists)], p) for k, (columns, p) in groups.items()}

        with (
            mock.patch.object(torch.cuda, "device_count", lambda: len(self.gpus)),
            mock.patch.object(torch.autocast, "__init__", autocast),
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        ):
            yield


def tensors_in(values: Iterable) -> Iterator[Tensor]:
    "Tensors among arguments and in lists of them."
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from tensors_in(v)


ASKED: dict[Callable, Callable] = {  # what is answered for a pretended device
    Tensor.device.__get__: lambda devices, x, *_: devices.of(x),
    Tensor.is_cuda.__get__: lambda devices, x, *_: devices.of(x).type == "cuda",
    Tensor.get_device: lambda devices, x: -1 if devices.of(x) is CPU else devices.of(x).index,
    Tensor.numpy: Devices.numpy,
    Tensor.cpu: lambda devices, x, **_: devices.move(x, CPU),
    Tensor.cuda: lambda devices, x, device=0, **_: devices.move(x, devices.named(device)),
    Tensor.to: Devices.to,
}


class Check(TorchDispatchMode):
    "Below autograd: refuses operations on tensors of several devices, and puts results where the operands are."

    def __init__(self, devices: Devices):
        super().__init__()
        self.devices = devices

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        "Nothing is compiled here; torch's guard against it would cost a tenth of the time."
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():  # `.device` and the like are the real ones in here
            return self.checked(func, args, kwargs or {})

    def checked(self, func, args, kwargs):
        "Run an operation whose tensors are on one device."
        of = self.devices.of
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        places = [of(t) for t in tensors]
        at = places[0] if places else CPU
        if META in places:
            return func(*args, **kwargs)
        if any(p is not at for p in places):
            at = self.common(func._schema.name, tensors, places)
        out = func(*args, **kwargs)
        self.devices.used[at] += 1
        if at is not CPU:
            for t in tensors_in((out,)):
                if of(t) is not at:
                    self.devices.mark(t, at)
        return out

    def common(self, name: str, tensors: list[Tensor], places: list[torch.device]) -> torch.device:
        "Return the device on which an operation on several devices runs, if it may."
        joined = {  # a number on the CPU may join any device, and so may indices; a copy's source may be anywhere
            p
            for i, (t, p) in enumerate(zip(tensors, places, strict=True))
            if (p is not CPU or t.dim() > 0 and (i == 0 or name not in INDEXED)) and (i == 0 or name not in COPIES)
        }
        if len(joined) > 1:
            what = ", ".join(f"{tuple(t.shape)} on {p}" for t, p in zip(tensors, places, strict=True))
            raise MixedDevices(f"{name} of tensors on several devices: {what}")
        return joined.pop() if joined else CPU
