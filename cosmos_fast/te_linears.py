"""Linear layers of Transformer Engine: fp8 with one scale per tensor. A peer of the 8-bit layers of `quant`.

It quantises its input itself, one pass to find the scale and one to apply it (current scaling), and stores its weights
as fp8. Imported only where a recipe asks for it; the package is not a dependency. TE 2, `pip install
transformer-engine[pytorch]`.

The package looks for cuDNN in the system first, and its library names all of cuDNN's parts. torch may have brought another
release, of which the parts used so far are in the process: parts of two do not fit together. `torchs_cudnn` has all of them
come from torch's.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .formats import EnvironmentProblem
from .fp8_weights import is_computed
from .linears import Apart, LinearGelu

MULTIPLE = 16
"""Rows and features that TE multiplies in fp8 come in multiples of so many."""
MAPS = Path("/proc/self/maps")
"""Which files are mapped into this process; Linux alone has it."""


def _mapped(name: str) -> set[Path]:
    """Folders of the libraries in this process whose names fit the pattern."""
    try:
        maps = MAPS.read_text()
    except OSError:
        return set()
    return {Path(folder) for folder in re.findall(rf"(/.*)/{name}(?: \(deleted\))?$", maps, re.MULTILINE)}


def cudnn_folder() -> Path | None:
    """Where the cuDNN lies that torch has loaded; None where it has none or nothing tells.

    Raises EnvironmentProblem where parts of two are in the process.
    """
    torch.backends.cudnn.version()  # has it loaded
    beside = Path(torch.__file__).resolve().parents[1]  # pip puts nvidia/cudnn/lib there
    found = _mapped(r"libcudnn\.so\.\d[\d.]*")
    folders = {folder for folder in found if beside in folder.parents} or found
    others = _mapped(r"libcudnn_\w+\.so\.\d[\d.]*") - folders
    if len(folders) > 1 or (folders and others):
        names = ", ".join(sorted(map(str, folders | others)))
        raise EnvironmentProblem(
            f"linear=fp8_te: one cuDNN must be loaded, torch's, got parts from {names}. Start anew with CUDNN_HOME and "
            "LD_LIBRARY_PATH set to the one beside torch."
        )
    return next(iter(folders), None)


@contextmanager
def torchs_cudnn() -> Iterator[Path | None]:
    """Inside, what asks for a part of cuDNN gets torch's. CUDNN_HOME and CUDNN_PATH stay as the user set them."""
    folder = cudnn_folder()
    if folder is None:
        yield None
        return
    # A library that is loaded is not searched for: each part by its path, the one that others name first.
    parts = folder.glob("libcudnn_*.so.[0-9]*")
    for part in sorted(parts, key=lambda part: ("graph" not in part.name, part.name)):
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL | os.RTLD_LAZY)
    if {"CUDNN_HOME", "CUDNN_PATH"} & os.environ.keys():
        yield folder
        return
    os.environ["CUDNN_HOME"] = str(folder)
    try:
        yield folder
    finally:
        del os.environ["CUDNN_HOME"]


def imported() -> Any:
    """transformer_engine.pytorch, with torch's cuDNN. EnvironmentProblem where it is absent or broken."""
    name = "transformer_engine.pytorch"
    if sys.modules.get(name) is not None:
        return sys.modules[name]
    folder = None
    try:
        with torchs_cudnn() as folder:
            return import_module(name)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        cudnn = isinstance(error, OSError) and "libcudnn" in str(error)
        hint = (
            f"Start with CUDNN_HOME and LD_LIBRARY_PATH set to torch's cuDNN, {folder or 'nvidia/cudnn/lib beside torch'}"
            if cudnn
            else "Install transformer-engine[pytorch] for this torch and CUDA"
        )
        raise EnvironmentProblem(
            f"linear=fp8_te: needs the package transformer_engine, got {type(error).__name__}: {error}. "
            f"{hint}, or use the recipe fp8."
        ) from None


def engine(device: torch.device) -> Any:
    """The package's torch part. EnvironmentProblem where it is absent, broken, or of no use on this device."""
    if device.type != "cuda":
        raise EnvironmentProblem(f"linear=fp8_te: needs a CUDA device, got {device}. Use the recipe fp8.")
    te = imported()
    able, why = import_module("transformer_engine.pytorch.quantization" if hasattr(te, "autocast") else
                              "transformer_engine.pytorch.fp8").check_fp8_support()  # fmt: skip
    if not able:
        raise EnvironmentProblem(f"linear=fp8_te: needs a GPU with fp8, got {why}. Use the recipe exact.")
    return te


def region(recipe: Any) -> Any:
    """In which Transformer Engine's layers multiply as its recipe says; TE 2.9 renamed it and its argument."""
    te = import_module("transformer_engine.pytorch")
    return te.autocast(recipe=recipe) if hasattr(te, "autocast") else te.fp8_autocast(fp8_recipe=recipe)


class TeLinear(Apart, nn.Module):
    """y = x W^T + b, both operands quantised by Transformer Engine, which keeps W as fp8."""

    normed = staticmethod(ops.residual_adaln)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        w = linear.weight
        te = engine(w.device)
        self._recipe = import_module("transformer_engine.common.recipe").Float8CurrentScaling()
        stored = te.quantized_model_init if hasattr(te, "quantized_model_init") else te.fp8_model_init
        # With gradients on it keeps each matrix transposed as well, for a backward pass: twice the bytes.
        with torch.no_grad(), stored(enabled=True, recipe=self._recipe):
            self.inner = te.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=w.dtype, device=w.device)
            self.inner.weight.copy_(w)
        self.inner.weight.requires_grad_(False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (L, in) -> (L, out)."""
        rows = -x.shape[0] % MULTIPLE
        with region(self._recipe):
            y: Tensor = self.inner(nn.functional.pad(x, (0, 0, 0, rows)) if rows else x)[: x.shape[0]]
        return y if self.bias is None else y + self.bias


class TeLinearGelu(TeLinear):
    """gelu(x W^T) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(super().forward(x))


def layers(
    device: torch.device, plain: type[TeLinear] = TeLinear, with_gelu: type[TeLinear] = TeLinearGelu
) -> Callable[[str, nn.Linear], nn.Module | None]:
    """What takes the place of a linear layer of that name, None for those that stay. Raises EnvironmentProblem."""
    engine(device)

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        if not is_computed(name):
            return None
        return with_gelu(linear) if isinstance(linear, LinearGelu) else plain(linear)

    return make
