"""Tensors that say they are on a GPU, on a machine without one and a PyTorch without CUDA.

Import it before torch, in a process of its own (`run_pretending` starts one). `FakeTensorMode` then knows the shape,
dtype and device of everything, backward passes and compiled code included. `PretendedCuda` also knows the values: its
tensors compute on the CPU, but refuse what a GPU refuses, CPU tensors among the operands, and count in `waits` how
often the device is asked for a number.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# A guard and hooks, which PyTorch asks wherever a tensor says cuda, and which have nothing to do.
SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
static Guard guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
"""


def build(folder: Path) -> Path:
    """The library with the guard, compiled in two or three seconds."""
    torch_folder = Path(next(iter(importlib.util.find_spec("torch").submodule_search_locations)))
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(SOURCE)
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder / 'lib'}"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(source), f"-I{torch_folder / 'include'}"]
    subprocess.run([*command, *libraries, "-o", str(library)], check=True, capture_output=True, text=True)
    return library


def run_pretending(library: Path, module: str, function: str) -> None:
    """Call module.function where tensors may say cuda, in a process of its own; AssertionError if it fails."""
    tests = Path(__file__).resolve().parent
    folders = [tests, tests / "nanochat", tests.parent / "nb_src"]
    environment = os.environ | {
        "PRETENDED_CUDA": str(library), "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"
    }  # fmt: skip
    command = [sys.executable, "-c", f"import pretended_cuda, {module}; {module}.{function}()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if "PRETENDED_CUDA" in os.environ:
    ctypes.CDLL(os.environ["PRETENDED_CUDA"])

    import torch
    import torch.nn as nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    def replace_tensors(module, fn, recurse=True):
        """`nn.Module._apply` for tensors that cannot be swapped in place."""
        for child in module.children():
            replace_tensors(child, fn)
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    new = fn(tensor.detach())
                    tensors[name] = nn.Parameter(new) if tensors is module._parameters else new
        return module

    CPUGenerator = torch.Generator

    class AnyGenerator(CPUGenerator):
        def __new__(cls, device="cpu"):
            return CPUGenerator()

    aten = torch.ops.aten
    waits = []
    WAITING = (aten._local_scalar_dense.default, aten.nonzero.default)
    MAY_MIX = (aten.copy_.default, aten._to_copy.default)
    INDEXING = (
        aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default
    )  # fmt: skip

    class OnGPU(torch.Tensor):
        """`inner`, a CPU tensor, that says cuda."""

        @staticmethod
        def __new__(cls, inner):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device="cuda:0",
            )  # fmt: skip
            tensor.inner = inner
            return tensor

        def tolist(self):
            waits.append("tolist")
            return self.inner.tolist()

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return on_gpu(function, args, kwargs or {})

    class PretendedCuda(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return on_gpu(function, args, kwargs or {})

    def on_gpu(function, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
        if function in INDEXING:  # indices may be on the CPU, what they index and what is put there may not
            strangers = [x for x in strangers if not any(x is index for index in args[1])]
        if ours and strangers and function not in MAY_MIX:
            raise RuntimeError(f"{function} with operands on cuda and on cpu, of shape {tuple(strangers[0].shape)}")
        device = kwargs.get("device")
        leaves = function is aten._to_copy.default and device is not None and device.type == "cpu"
        arrives = device is not None and device.type == "cuda"
        if ours and (leaves or function in WAITING):
            waits.append(str(function))
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        if arrives:
            kwargs["device"] = torch.device("cpu")
        result = function(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
        if function is aten.copy_.default:
            return args[0]
        if not (arrives or ours and not leaves):
            return result
        known = {id(x.inner): x for x in ours}  # what was changed in place stays the same tensor

        def wrapped(x):
            return known[id(x)] if id(x) in known else OnGPU(x) if isinstance(x, torch.Tensor) else x

        return tree_map(wrapped, result)

    def inner_of(x):
        return x.inner if isinstance(x, OnGPU) else x

    nn.Module._apply = replace_tensors
    torch.Generator = AnyGenerator
    torch.cuda._lazy_init = lambda: None
    torch.cuda.synchronize = lambda device=None: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes a CPU tensor and moves it
