"""A CUDA device without memory or arithmetic, so that code for one is executed on a machine that has none.

PyTorch's FakeTensorMode knows of every operation which shapes, dtypes and devices it takes and gives. Here only tensors
on CUDA are fake: what is on the host stays real, so lengths and labels can be read there. Where the code reads a number
from the device, which would make it wait for a real one, the mode notes it and answers 1 or True.

Autograd asks for CUDA's streams, and a PyTorch built for CPUs has none: a shared library of a few lines, loaded before
it, answers in their place. So everything happens in a process of its own.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class FakeCuda(FakeTensorMode):
    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.reads: list[str] = []
        """Where a number was read from the device, or a tensor brought from it"""
        self.copies: list[tuple[str, bool, bool]] = []
        """Of each copy to the device: where, whether from pinned memory, and whether the host goes on meanwhile"""
        self.calls: list[tuple[str, list[Any]]] = []
        """Operations on the device, with the shapes, or values, of what they take"""
        self._within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if fake and func is aten._local_scalar_dense.default:
            self.reads.append(_place())
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if self._within:  # what an operation on fake tensors is made of
            return super().__torch_dispatch__(func, types, args, kwargs)
        devices = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
        if fake and func is aten._to_copy.default and "cpu" in devices:
            self.reads.append(_place())
        if func is aten.is_pinned.default and not fake:
            return hasattr(args[0], "_pinned")
        if func is aten._pin_memory.default and not fake:
            pinned = args[0].clone()
            pinned._pinned = True
            return pinned
        if not fake and "cuda" not in devices:
            return func(*args, **kwargs)
        if func is aten._to_copy.default and not fake:
            self.copies.append((_place(), hasattr(args[0], "_pinned"), kwargs.get("non_blocking", False)))
        shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(args)]
        self.calls.append((func.name(), shapes))
        self._within = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = False

    def called(self, name: str) -> list[list[Any]]:
        """What the operation of this name took, each time."""
        return [shapes for called, shapes in self.calls if called == name]


def _place() -> str:
    """The innermost line of minillama that is running."""
    frames = [frame for frame in traceback.extract_stack() if "/minillama/" in frame.filename]
    return (
        f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "no line of minillama"
    )


def _let_flex_attention_pass() -> None:
    """A rule for FakeTensorMode is none for its subclasses."""
    from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward

    for operator in (flex_attention, flex_attention_backward):
        operator.py_impl(FakeCuda)(operator.python_key_table[FakeTensorMode])


@contextmanager
def answering(
    capability: tuple[int, int] = (9, 0), gibibytes: float = 80, devices: int = 1, available: bool = True
) -> Iterator[SimpleNamespace]:
    """What torch.cuda says of a device is said of one that is not there; yields what it was told.

    available=False while something is computed: else PyTorch would try to copy to the device.
    """
    told = SimpleNamespace(device=[], synchronised=0, generators=[], pinned=0)

    def synchronize() -> None:
        told.synchronised += 1

    def pin(*_: int) -> int:
        told.pinned += 1
        return 0

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: available,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "set_device": told.device.append,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=int(gibibytes * 2**30), major=capability[0], minor=capability[1], name="none"
        ),
        "synchronize": synchronize,
        "set_sync_debug_mode": lambda mode: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "memory_reserved": lambda device=None: 3 * 2**30,
        "memory_allocated": lambda device=None: 2 * 2**30,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=pin, cudaHostUnregister=lambda *_: 0),
        "get_rng_state": lambda device="cuda": torch.arange(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": told.generators.append(state.tolist()),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        yield told


# --- the process


STAND_IN = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct OneDevice final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device()); }
  void synchronizeDevice(DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, OneDevice)
}  // namespace c10::impl

namespace at {
struct CUDAHooks : CUDAHooksInterface {  // found by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace accelerator
}  // namespace at
"""


def build_stand_in(folder: Path) -> Path | None:
    """The library to be loaded before a PyTorch that is built for CPUs; None for one that knows CUDA."""
    if torch.cuda._is_compiled():
        return None
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text(STAND_IN)
    root = Path(torch.__file__).parent
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{root / 'include'}", str(source), "-o", str(library)]
    command += [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    subprocess.run(command, check=True)
    return library


class FakeCudaProcess:
    """Calls functions of test modules, with the FakeCuda mode they run in as first argument."""

    def __init__(self, folder: Path) -> None:
        library = build_stand_in(folder)
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        with patch.dict(os.environ, {"LD_PRELOAD": str(library)} if library else {}):
            self.process.start()
        there.close()

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        self.pipe.send((function, args))
        assert self.pipe.poll(600), "no answer"
        kind, value = pickle.loads(self.pipe.recv_bytes())
        assert kind == "ok", value
        return value

    def close(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """For what exchanges pickled objects, in storages of a kind that are not faked: it is called without the mode."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def _serve(pipe: Any) -> None:
    import torch.distributed as dist

    os.environ.pop("LD_PRELOAD", None)  # what this process starts needs none
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _let_flex_attention_pass()
    for name in ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"):
        setattr(dist, name, _outside(getattr(dist, name)))
    torch.compiler.set_stance(force_backend="aot_eager")  # without a compiler for the device
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            with FakeCuda() as mode:
                result = ("ok", function(mode, *args))
        except BaseException:
            result = ("failed", traceback.format_exc())
        sys.stdout.flush()
        pipe.send_bytes(pickle.dumps(result))
