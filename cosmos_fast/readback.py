"""Decoded frames on their way from the device to the host, while the device decodes the next.

A window is turned into codes and checked on the device, copied by a stream of its own into pinned memory, and only
waited for when the window after it has been launched. So the device always has work, and the host never waits for
what it does not need yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import ops
from .formats import ClipError

K = TypeVar("K")

IN_FLIGHT: Final = 2
"""Windows launched and not yet taken: one that is copied, one that is computed."""


class _Copy(NamedTuple, Generic[K]):
    """One window under way. done: recorded behind its copies, None where nothing is asynchronous."""

    key: K
    codes: Tensor
    is_finite: Tensor
    done: torch.cuda.Event | None

    def take(self) -> tuple[K, np.ndarray]:
        if self.done is not None:
            self.done.synchronize()
        if not bool(self.is_finite):
            raise ClipError("decode: frames must be finite, got NaN or infinity from the VAE.")
        return self.key, self.codes.numpy()


def read_back(windows: Iterable[tuple[K, Tensor]], device: torch.device) -> Iterator[tuple[K, np.ndarray]]:
    """(key, x) -> (key, frames), in order: x (1, 3, F, H, W) on `device` to (F, H, W, 3) uint8 on the host.

    Every array has memory of its own, pinned on CUDA and recycled when the array is dropped. Raises ClipError for
    values that are not finite, when the window's turn has come.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    waiting: deque[_Copy[K]] = deque()
    for key, x in windows:
        waiting.append(_start(key, x, copies))
        del x  # the next window is computed in the memory of this one
        if len(waiting) >= (IN_FLIGHT if copies is not None else 1):
            yield waiting.popleft().take()
    while waiting:
        yield waiting.popleft().take()


def _start(key: K, x: Tensor, copies: torch.cuda.Stream | None) -> _Copy[K]:
    least, most = x.aminmax()  # NaN if there is one, else infinite if there is one: x is read once
    is_finite, codes = torch.isfinite(least) & torch.isfinite(most), ops.pixels(x)
    if copies is None:
        return _Copy(key, codes, is_finite, None)
    copies.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(copies):
        here = torch.empty_like(codes, device="cpu", pin_memory=True).copy_(codes, non_blocking=True)
        flag = torch.empty_like(is_finite, device="cpu", pin_memory=True).copy_(is_finite, non_blocking=True)
        done = torch.cuda.Event()
        done.record(copies)
    for tensor in (codes, is_finite):
        tensor.record_stream(copies)  # not to be given to the next window before it is copied
    return _Copy(key, here, flag, done)
