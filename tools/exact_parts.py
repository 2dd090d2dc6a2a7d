"""The parts of tools/tune_exact.py: every way to compute a part of a block, with its check and its FLOP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cosmos_fast import ops, reference, testing
from cosmos_fast.dispatch import TABLE
from cosmos_fast.formats import Rows

testing.kernels_from_checkout()

from cosmos_fast.kernels import linear_gelu as gelu_kernel  # noqa: E402
from cosmos_fast.kernels import linear_heads as heads_kernel  # noqa: E402
from cosmos_fast.kernels.tiles import Tiles, halves, place, product, programs, read, write  # noqa: E402

ROWS = 256
"""Rows that a check looks at, at the start, in the middle and at the end."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """L tokens, D width, N heads of K, S keys of the prompt."""

    L: int = 84480
    D: int = 2048
    N: int = 16
    K: int = 128
    S: int = 512


SMALL = Sizes(48, 64, 4, 16, 9)


@dataclass
class Way:
    """One way to compute a part. check: what is wrong with its result, or None. work: FLOP of one call."""

    name: str
    call: Call
    check: Callable[[Any], str | None] = lambda out: None
    work: float = 0.0
    ms: list[float] = field(default_factory=list)


@triton.jit
def _store(out, acc, row, column, PARTS: tl.constexpr):
    if PARTS == 1:
        out.store([row, column], acc.to(out.dtype))
    else:
        low, high = halves(acc)
        _store(out, low, row, column, PARTS // 2)
        _store(out, high, row, column + high.shape[1], PARTS // 2)


@triton.jit
def _linear_plain_kernel(
    x, w, out, L, M, D, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    l_tiles, m_tiles = tl.cdiv(L, BLOCK_L), tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), l_tiles * m_tiles, tl.num_programs(0), flatten=True):
        row, column = place(tile, l_tiles, m_tiles, BLOCK_L, BLOCK_M, GROUP)
        acc = product(x, w, row, column, D, BLOCK_L, BLOCK_M, BLOCK_D, PRECISION)
        _store(out, acc, row, column, PARTS)


def plain(x: Tensor, w: Tensor, t: Tiles) -> Tensor:
    """x @ w^T by the same tiles as the fused kernels: what their last steps cost shows against it."""
    (L, D), M = x.shape, w.shape[0]
    out = x.new_empty(L, M)
    _linear_plain_kernel[(programs(x, w, t),)](
        read(x, [t.l, t.d]), read(w, [t.m, t.d]), write(out, [t.l, t.m // t.parts]), L, M, D, BLOCK_L=t.l, BLOCK_M=t.m,
        BLOCK_D=t.d, GROUP=t.group, PARTS=t.parts, PRECISION="tf32" if x.dtype != torch.float32 else "ieee",
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return out


def tiles_of(smoke: bool) -> dict[str, Tiles]:
    if smoke:
        return {"small": Tiles(16, 64, 16, 4, 2)}
    rows = (
        Tiles(128, 256, 64, 8, 4), Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 3, parts=1), Tiles(128, 256, 64, 8, 4, parts=4),
        Tiles(128, 256, 64, 8, 4, group=16), Tiles(256, 128, 64, 8, 3),
    )  # fmt: skip
    return {f"{t.l}x{t.m} {t.stages} stages group {t.group} parts {t.parts}": t for t in rows}


# --- the parts -------------------------------------------------------------------------------------


class Parts:
    """Each method is one part, and yields its ways; operands are normal random values."""

    def __init__(self, s: Sizes, device: torch.device, dtype: torch.dtype, smoke: bool) -> None:
        self.s, self.device, self.dtype, self.smoke = s, device, dtype, smoke
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return x.mul_(scale)

    def starts(self) -> list[int]:
        L = self.s.L
        return sorted({0, max(L // 2 - ROWS // 2, 0), max(L - ROWS, 0)})

    def faults(self, op: str, args: Callable[[slice], tuple[Any, ...]]) -> Callable[[Tensor], str | None]:
        """A check of an op's output on rows against its reference."""

        def check(out: Tensor) -> str | None:
            for start in self.starts():
                part = slice(start, start + ROWS)
                if found := testing.faults(op, out[part].contiguous(), args(part)):
                    return f"rows from {start}: {found[0]}"
            return None

        return check

    def near(self, exact: Callable[[slice], Tensor], allowed: float) -> Callable[[Tensor], str | None]:
        def check(out: Tensor) -> str | None:
            for start in self.starts():
                part = slice(start, start + ROWS)
                error = testing.rel_error(out[part], exact(part))
                if not error <= allowed:
                    return f"rows from {start}: relative error {error:.1e}, allowed {allowed:.1e}"
            return None

        return check

    def products(self) -> Iterator[Way]:
        D, L = self.s.D, self.s.L
        for name, M, inner in (("out", D, D), ("qkv", 3 * D, D), ("fc2", D, 4 * D)):
            x, w, bias = self.normal(L, inner), self.normal(M, inner, scale=inner**-0.5), self.normal(M)
            check = self.near(lambda part, x=x, w=w: x[part].float() @ w.float().T, 4e-3)
            work = 2.0 * L * M * inner
            yield Way(f"{name} vendor", lambda x=x, w=w: F.linear(x, w), check, work)
            if name == "out":
                with_bias = self.near(
                    lambda part, x=x, w=w, b=bias: x[part].float() @ w.float().T + b.float(), 4e-3
                )
                yield Way("out vendor, bias", lambda x=x, w=w, b=bias: F.linear(x, w, b), with_bias, work)
            if name == "qkv":
                pairs = w[: 2 * D], w[2 * D :]
                yield Way(
                    "qkv vendor, qk and v", lambda x=x, p=pairs: [F.linear(x, part) for part in p], work=work
                )
                thirds = w.split(D)
                yield Way(
                    "qkv vendor, q, k and v",
                    lambda x=x, p=thirds: [F.linear(x, part) for part in p],
                    work=work,
                )
            for label, t in tiles_of(self.smoke).items():
                yield Way(f"{name} {label}", lambda x=x, w=w, t=t: plain(x, w, t), check, work)

    def gelu(self) -> Iterator[Way]:
        D, L = self.s.D, self.s.L
        x, w = self.normal(L, D), self.normal(4 * D, D, scale=2 * D**-0.5)
        check, work = self.faults("linear_gelu", lambda part: (x[part], w)), 2.0 * L * D * 4 * D
        yield Way("vendor alone", lambda: F.linear(x, w), work=work)
        yield Way("vendor, gelu", lambda: composed("linear_gelu")(x, w), check, work)
        for label, t in tiles_of(self.smoke).items():
            yield Way(
                f"short {label}", lambda t=t: gelu_kernel.linear_gelu(x, w, tiles=t, fine=False), check, work
            )
        label, t = next(iter(tiles_of(self.smoke).items()))
        yield Way(f"fine {label}", lambda: gelu_kernel.linear_gelu(x, w, tiles=t, fine=True), check, work)

    def heads(self) -> Iterator[Way]:
        D, L, N, K = self.s.D, self.s.L, self.s.N, self.s.K
        x, w, gain = self.normal(L, D), self.normal(N * K, D, scale=D**-0.5), self.normal(K)
        check = self.faults("linear_head_norm", lambda part: (x[part], w, gain, ops.EPS))
        work = 2.0 * L * D * N * K
        yield Way("vendor alone", lambda: F.linear(x, w), work=work)
        yield Way("vendor, head_norm", lambda: composed("linear_head_norm")(x, w, gain, ops.EPS), check, work)
        for label, t in tiles_of(self.smoke).items():
            if t.parts == 2:
                yield Way(
                    label,
                    lambda t=t: heads_kernel.linear_head_norm(x, w, gain, ops.EPS, tiles=t),
                    check,
                    work,
                )

    def residual(self) -> Iterator[Way]:
        """x + gate * (h @ w^T), normalised: the gate is one row for all tokens, so it can scale w's rows instead."""
        D, L = self.s.D, self.s.L
        rows, x = Rows(L), self.normal(L, D)
        gate, shift, scale = (self.normal(1, D, scale=0.02) for _ in range(3))
        for name, inner in (("out", D), ("fc2", 4 * D)):
            h, w, kept = self.normal(L, inner), self.normal(D, inner, scale=inner**-0.5), x.clone()
            work = 2.0 * L * D * inner

            def exact(part: slice, h: Tensor = h, w: Tensor = w) -> Tensor:
                return reference.residual(
                    x[part].double(), h[part].double() @ w.double().T, gate.double(), (), None, L, 0
                )

            def apart(h: Tensor = h, w: Tensor = w) -> tuple[Tensor, Tensor]:
                return ops.residual_adaln(x, ops.Pending(F.linear(h, w), gate), shift, scale, rows)

            def added(h: Tensor = h, w: Tensor = w, into: Tensor = kept) -> Tensor:
                return into.addmm_(h, (w * gate[0, :, None]).t())

            def together(h: Tensor = h, w: Tensor = w, into: Tensor = kept) -> tuple[Tensor, Tensor]:
                return added(h, w, into), ops.adaln(into, shift, scale, rows)

            check = self.near(exact, 4e-3)
            yield Way(f"{name}: product, then residual_adaln", apart, lambda out, c=check: c(out[0]), work)
            yield Way(
                f"{name}: product adds itself, then adaln", together, lambda out, c=check: c(out[0]), work
            )
            yield Way(f"{name}: product that adds itself", added, work=work)
            yield Way(f"{name}: product", lambda h=h, w=w: F.linear(h, w), work=work)
        branch = self.normal(L, D)
        yield Way(
            "residual_adaln", lambda: ops.residual_adaln(x, ops.Pending(branch, gate), shift, scale, rows)
        )
        yield Way("adaln", lambda: ops.adaln(x, shift, scale, rows))

    def cross(self) -> Iterator[Way]:
        yield from self._attention(self.s.S)

    def self(self) -> Iterator[Way]:
        yield from self._attention(self.s.L)

    def _attention(self, S: int) -> Iterator[Way]:
        L, N, K = self.s.L, self.s.N, self.s.K
        q, k = self.normal(L, N, K), self.normal(S, N, K)
        packed = self.normal(S, 3 * N * K)
        v = packed.unflatten(1, (3, N, K))[:, 2]  # a view, as the projection leaves it
        # Weights of the softmax are rounded to bf16: as much as the result is.
        check = self.near(lambda part: reference.attention(q[part].float(), k.float(), v.float()), 8e-3)
        work, alone = 4.0 * L * S * N * K, v.contiguous()
        for candidate in TABLE["attention"].candidates:
            if candidate.name == "reference" or (reason := candidate.obstacle(self.device, self.dtype)):
                if candidate.name != "reference":
                    yield Way(candidate.name, lambda why=reason: refuse(why))
                continue
            try:
                attend = candidate.load()
            except (ImportError, OSError, RuntimeError) as error:
                yield Way(candidate.name, lambda why=str(error): refuse(why))
                continue
            if candidate.name == "sdpa" and L * S > 2**31:
                continue  # torch's choice at this length is one of those above
            yield Way(candidate.name, lambda f=attend: f(q, k, v), check, work)
            yield Way(f"{candidate.name}, v alone", lambda f=attend: f(q, k, alone), check, work)
            if candidate.name in ("fa3", "cudnn"):
                first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
                yield Way(
                    f"{candidate.name}, heads first in memory", lambda f=attend, t=first: f(*t), check, work
                )
        yield from (Way(f"fa3 {o}", lambda o=o: fa3(q, k, alone, **o), check, work) for o in FA3_OPTIONS)


FA3_OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_splits": 0},
    {"num_splits": 2},
    {"pack_gqa": False},
    {"sm_margin": 4},
)


def fa3(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    try:
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]
    out = flash_attn_func(q[None], k[None], v[None], **options)
    return (out[0] if isinstance(out, tuple) else out)[0]


def refuse(why: str | None) -> None:
    raise RuntimeError(why)


def composed(op: str) -> Callable[..., Tensor]:
    return next(c for c in TABLE[op].candidates if c.name == "composed").load()
