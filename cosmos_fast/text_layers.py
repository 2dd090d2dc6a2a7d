"""The layers of a language model one after another, over all prompts at once, wherever their weights lie.

Every layer goes from its file through one of two staging buffers to the device while the layer before is at
work. `offload` then drops it, `bf16` and `int8` keep it for the next call. So a first call reads each weight once
in every mode, and neither the whole model nor a second copy of it is ever held in host memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .formats import CheckpointError
from .safetensors_file import LazyTensor

MODES: Final = ("bf16", "int8", "offload")
"""Where weights stay: on the device as published, there in 8 bits, or on the disk. Only int8 changes results."""

_ALIGNED: Final = 64


class Int8Linear(nn.Module):
    """A linear layer whose weight is 8-bit integers with one scale per output channel; activations stay as they are.

    Shapes: weight (M, N) int8, scale (M,) fp32, bias (M,) or None. y = round(x W^T) * scale + bias, integers up to
    127 being exact in bf16. A code is off by at most half a step, 1/254 of the largest weight of its channel.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_MN: Tensor, bias_M: Tensor | None = None) -> None:
        super().__init__()
        wide = weight_MN.detach().float()
        scale_M = wide.abs().amax(dim=1).clamp_min(1e-30) / 127
        self.register_buffer("weight", (wide / scale_M[:, None]).round_().to(torch.int8))
        self.register_buffer("scale", scale_M)
        self.register_buffer("bias", None if bias_M is None else bias_M.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = (F.linear(x, self.weight.to(x.dtype)).float() * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def to_int8_(module: nn.Module) -> nn.Module:
    """Replace every nn.Linear below `module` by an Int8Linear; returns `module`."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child.weight, child.bias))
        else:
            to_int8_(child)
    return module


class Layers:
    """Iterating yields each of `layers` with its weights on `device`; a layer is good until the next is asked for.

    layers: modules on the meta device. weights: by layer number, each {parameter name: lazy tensor}, all of them
    on this disk. Names and shapes are checked here, CheckpointError; nothing is read before the first iteration.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        weights: list[Mapping[str, LazyTensor]],
        device: torch.device,
        dtype: torch.dtype,
        mode: str,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"Layers: mode must be one of {', '.join(MODES)}, got {mode!r}.")
        self.device, self.dtype, self.mode = device, dtype, mode
        self._layers, self._weights = layers, weights
        for n, (layer, held) in enumerate(zip(layers, weights, strict=True)):
            check_shapes(f"text: layer {n}", layer, held)
        self.kept: list[nn.Module] = []
        """Layers that stay on the device: all of them, or none."""

    @property
    def bytes(self) -> int:
        """What all layers take on the device in bf16 mode."""
        return sum(_size(tensor.shape, self.dtype) for held in self._weights for tensor in held.values())

    def __iter__(self) -> Iterator[nn.Module]:
        if self.kept:
            yield from self.kept
            return
        kept = []
        largest = max(
            sum(_padded(_size(tensor.shape, self.dtype)) for tensor in held.values())
            for held in self._weights
        )
        is_cuda = self.device.type == "cuda"
        buffers = [torch.empty(largest, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        with ThreadPoolExecutor(1) as reader:
            pending = reader.submit(self._stage, 0, buffers[0])
            for n in range(len(self._layers)):
                staged = pending.result()
                if n + 1 < len(self._layers):
                    # Layer n - 1 left the other buffer: the device was waited for before n was asked for.
                    pending = reader.submit(self._stage, n + 1, buffers[(n + 1) % 2])
                layer = self._filled(n, staged)
                if self.mode != "offload":
                    kept.append(layer)
                yield layer
                if is_cuda:
                    torch.cuda.current_stream(self.device).synchronize()
                del layer
        self.kept = kept

    def _stage(self, n: int, buffer: Tensor) -> dict[str, Tensor]:
        """Layer n as views of `buffer`, in the dtype of the computation."""
        at, staged = 0, {}
        for name, tensor in self._weights[n].items():
            size = _size(tensor.shape, self.dtype)
            staged[name] = buffer[at : at + size].view(self.dtype).view(tensor.shape)
            staged[name].copy_(tensor.load())
            at += _padded(size)
        return staged

    def _filled(self, n: int, staged: Mapping[str, Tensor]) -> nn.Module:
        # A copy on every device: the buffer is written again two layers later.
        state = {
            name: torch.empty_like(tensor, device=self.device).copy_(tensor, non_blocking=True)
            for name, tensor in staged.items()
        }
        layer = copy.deepcopy(self._layers[n])  # without data: the original stays on the meta device
        layer.load_state_dict(state, strict=True, assign=True)
        layer.eval().requires_grad_(False)
        return to_int8_(layer) if self.mode == "int8" else layer


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def check_shapes(where: str, module: nn.Module, held: Mapping[str, LazyTensor]) -> None:
    """CheckpointError unless `held` has exactly the tensors of `module`, in its shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in (*wanted, *held):
        got = held[name].shape if name in held else "none"
        if wanted.get(name) != got:
            raise CheckpointError(
                f"{where}: {name} must be {wanted.get(name, 'absent')}, got {got}. "
                "Is this the checkpoint that its config.json describes?"
            )
