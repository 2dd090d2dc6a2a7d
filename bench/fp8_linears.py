"""What tools/bench_fp8.py times of 8-bit linear layers: products, what rounds their rows, the MLP, a block; ours and peers.

A part is a table of ways: each is built, its error on sampled rows is noted, then all run in turns so that they meet the
same clock. What cannot run here is recorded with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from denoiser import Bench
from published import relative_l2
from torch import Tensor, nn

from cosmos_fast import dispatch, ops, ops_linear8, quant, te_linears
from cosmos_fast.config import NetworkConfig
from cosmos_fast.context import Modulation
from cosmos_fast.formats import Rows
from cosmos_fast.fp8_weights import quantised_rows
from cosmos_fast.network import Block
from cosmos_fast.ops import Pending
from cosmos_fast.self_attention import exact

SAMPLED, TURN_S = 256, 0.06
PRODUCTS = ("qkv", "attn_out", "cross.q", "cross.out", "fc1", "fc2")
"""Of a block's layers those that see every token, once each."""
Call = Callable[[], Any]


class TeDelayed(te_linears.TeLinear):
    """Transformer Engine with scales of the calls before; used inside `delayed_region` alone."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        te, w = te_linears.engine(linear.weight.device), linear.weight
        self.inner = te.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=w.dtype, device=w.device)
        with torch.no_grad():
            self.inner.weight.copy_(w)
        self.inner.weight.requires_grad_(False)
        self.bias, self.calls = linear.bias, 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # Weights are rounded again until their scales have settled, then kept.
        self.calls += 1
        y: Tensor = self.inner(x, is_first_microbatch=self.calls <= 4)
        return y if bias is None else y + bias


class TeDelayedGelu(TeDelayed):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.gelu(super().forward(x, bias))


@contextmanager
def delayed_region() -> Iterator[None]:
    """Scales are renewed at its end, which Transformer Engine does only where gradients are enabled."""
    with torch.enable_grad(), te_linears.region(delayed_recipe()):
        yield


@cache
def delayed_recipe() -> Any:
    return import_module("transformer_engine.common.recipe").DelayedScaling(amax_history_len=16)


def delayed(call: Call) -> Call:
    def inside() -> Any:
        with delayed_region():
            return call()

    return inside


def forced(call: Call, **choice: str) -> Call:
    def inside() -> Any:
        with dispatch.use(**choice):
            return call()

    return inside


class Linears:
    """The parts of a block, at the sizes of a call."""

    def __init__(self, b: Bench) -> None:
        self.b, self.device = b, b.device
        self.c = b.config if b.args.smoke else NetworkConfig.single()
        self.L = 64 if b.args.smoke else 84480
        self.g = torch.Generator(self.device).manual_seed(0)
        self.composed = "composed" if b.device.type == "cuda" else "reference"
        self.rows = torch.randperm(self.L, generator=self.g, device=self.device)[:SAMPLED]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.g, device=self.device, dtype=torch.bfloat16)
        return x.mul_(scale)

    def activations(self, width: int) -> Tensor:
        """Rows whose channels differ in size, some of them a lot: as trained networks have them."""
        gains = torch.randn(width, generator=self.g, device=self.device).mul_(0.7).exp()
        return self.normal(self.L, width).mul_(gains.bfloat16())

    def part(self, name: str, ways: dict[str, Callable[[], Call]], flop: float = 0.0,
             exact: Callable[[], Tensor] | None = None) -> None:  # fmt: skip
        """Build every way, note its error on the sampled rows against `exact`, then time all that run, in turns."""
        out: dict[str, Any] = {}
        self.b.record.setdefault("linears", {})[name] = out
        want = None if exact is None else exact()
        calls: dict[str, Call] = {}
        for way, make in ways.items():
            try:
                call = make()
                for _ in range(5 if "delayed" in way else 1):
                    got = call()
                out[way] = {}
                if want is not None:
                    got = got if isinstance(got, Tensor) else self.wide(got)
                    out[way]["relative_l2"] = relative_l2(got[self.rows], want)
                calls[way] = call
            except Exception as error:  # a way this machine lacks must not end the comparison
                out[way] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        rows = in_turns(self.b, calls, name)
        for way, row in rows.items():
            out[way] |= row | ({"tflop_s": flop / row["ms"] / 1e9} if flop else {})
        for way, row in out.items():
            rate = f"{row['tflop_s']:6.0f} TFLOP/s" if "tflop_s" in row else ""
            told = row.get("error") or f"{row['ms']:8.3f} ms {rate}"
            print(
                f"{name:10s} {way:44s} {told}  error {row.get('relative_l2', float('nan')):.2e}", flush=True
            )

    @staticmethod
    def wide(x: ops_linear8.Quantised) -> Tensor:
        return x.codes.float() * x.steps[:, None]

    def product(self, name: str, D: int, M: int) -> None:
        x, w = self.activations(D), self.normal(M, D, scale=D**-0.5)
        layer = self.layer(w)
        h, (codes, scale) = ops_linear8.quantised(x), quantised_rows(w)
        ways: dict[str, Callable[[], Call]] = {
            "bf16": lambda: lambda: F.linear(x, w),
            "fp8": lambda: lambda: ops_linear8.linear(h, codes, scale),
            "fp8 and its rows": lambda: lambda: ops_linear8.linear(ops_linear8.quantised(x), codes, scale),
            "fp8, sums in fp32": lambda: (
                lambda: ops_linear8.scaled_mm(h.codes, h.steps, codes, scale, None, torch.bfloat16, False)
            ),
            "te, current scaling": lambda: self.te(layer, x),
            "te, delayed scaling": lambda: self.te_delayed(layer, x),
        }
        flop = 2.0 * self.L * D * M
        self.part(name, ways, flop, lambda: x[self.rows].double() @ w.double().T)

    @staticmethod
    def layer(w: Tensor) -> nn.Linear:
        linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(w, requires_grad=False)
        return linear

    @staticmethod
    def te(linear: nn.Linear, x: Tensor) -> Call:
        layer = te_linears.TeLinear(linear)
        return lambda: layer(x)

    @staticmethod
    def te_delayed(linear: nn.Linear, x: Tensor) -> Call:
        layer = TeDelayed(linear)
        return delayed(lambda: layer(x))

    def rounding(self) -> None:
        """What makes rows and what rounds them: bytes, not arithmetic."""
        D, M = self.c.width, self.c.mlp_width
        x, branch, hidden = self.activations(D), self.normal(self.L, D), self.normal(self.L, M)
        gate, shift, scale = (self.normal(1, D) for _ in range(3))
        pending, rows = Pending(branch, gate), Rows(self.L)
        steps = torch.full((self.L,), 0.1, device=self.device)
        self.part("rounding", {
            "normed, bf16": lambda: lambda: ops.residual_adaln(x, pending, shift, scale, rows)[1],
            "normed, fp8": lambda: lambda: ops_linear8.residual_adaln(x, pending, shift, scale, rows)[1],
            "rows alone, fp8": lambda: lambda: ops_linear8.quantised(x),
            "gelu, bf16": lambda: lambda: ops.gelu(hidden),
            "gelu, fp8": lambda: lambda: torch.ops.cosmos_fast.gelu_fp8(hidden, steps),
        })  # fmt: skip

    def mlp(self, sweep: bool = True) -> None:
        """The MLP's first layer with its GELU, in the form that the second one takes. sweep: our kernel with every tile.

        Ours starts from codes, "and its rows" from bf16, and ends in codes: their rounding is in its time and its error.
        Transformer Engine's starts and ends in bf16 and rounds again in the second layer: only `block` compares all of both.
        """
        D, M = self.c.width, self.c.mlp_width
        x, w = self.activations(D), self.normal(M, D, scale=D**-0.5)
        h, (codes, scale) = ops_linear8.quantised(x), quantised_rows(w)
        reach, layer = quant.reach(codes, scale), self.layer(w)

        def ours() -> Any:
            return ops_linear8.linear_gelu(h, codes, scale, reach)

        def with_rows() -> Any:
            return ops_linear8.linear_gelu(ops_linear8.quantised(x), codes, scale, reach)

        ways: dict[str, Callable[[], Call]] = {
            "bf16": lambda: lambda: ops.linear_gelu(x, w),
            "fp8, torch's product, our gelu": lambda: forced(ours, linear_gelu_fp8=self.composed),
            "te, current scaling, our gelu": lambda: self.te_gelu(layer, x),
            "te, delayed scaling, our gelu": lambda: self.te_gelu(layer, x, TeDelayed),
        }
        if self.device.type == "cuda":
            ways["fp8, gelu in the product"] = lambda: forced(ours, linear_gelu_fp8="triton")
            ways["fp8, gelu in the product, and its rows"] = lambda: forced(
                with_rows, linear_gelu_fp8="triton"
            )
            ways |= self.tiles(h, codes, scale, reach) if sweep else {}
        flop = 2.0 * self.L * D * M
        self.part("fc1", ways, flop, lambda: F.gelu(x[self.rows].double() @ w.double().T))

    def te_gelu(
        self, linear: nn.Linear, x: Tensor, kind: type[te_linears.TeLinear] = te_linears.TeLinear
    ) -> Call:
        layer = kind(linear)
        call = lambda: ops.gelu(layer(x))  # noqa: E731
        return delayed(call) if kind is TeDelayed else call

    @staticmethod
    def tiles(h: Any, codes: Tensor, scale: Tensor, reach: Tensor) -> dict[str, Callable[[], Call]]:
        from cosmos_fast.kernels.linear_gelu_fp8 import linear_gelu_fp8
        from cosmos_fast.kernels.tiles import Tiles

        found: dict[str, Callable[[], Call]] = {}
        for t in (
            Tiles(128, 256, 128, 8, 4),
            Tiles(128, 256, 128, 8, 4, parts=4, group=16),
            Tiles(128, 256, 128, 8, 3, flatten=False),
            Tiles(128, 128, 128, 4, 3, programs=264),
            Tiles(128, 128, 128, 4, 3, programs=264, flatten=False),
            Tiles(64, 256, 128, 4, 2, programs=264),
        ):
            steps = h.steps * reach

            def call(t: Tiles = t, steps: Tensor = steps) -> Any:
                made = linear_gelu_fp8(h.codes, h.steps, steps, codes, scale, tiles=t)
                return ops_linear8.Quantised(made, steps, h.dtype)

            most = "" if t.programs is None else f" {t.programs} programs"
            name = f"fp8 triton {t.l}x{t.m}x{t.d} {t.warps} warps {t.stages} stages parts {t.parts}"
            found[name + most + ("" if t.flatten else " by tile")] = lambda call=call: call
        return found

    def block(self) -> None:
        """A block's forward without its two attentions: norms, products, GELU, and all rounding.

        The comparison of layers that is like for like: every way takes bf16 in and gives bf16 out, so each pays for the
        codes it needs, wherever it makes them. FLOP are those of the products.
        """
        c = self.c
        x = self.normal(self.L, c.width)
        attended, seen = self.activations(c.width), self.activations(c.width)
        table = self.normal(1, 9, 1, c.width, scale=0.3)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in self.holder().named_parameters()}
        state = {n: self.normal(*s, scale=s[-1] ** -0.5 if len(s) > 1 else 1.0) for n, s in shapes.items()}
        keys = SimpleNamespace(attend=lambda cross, h: (cross.q.heads(h, cross.q_gain), seen)[1])
        ctx = SimpleNamespace(rows=Rows(self.L), cos=None, sin=None)
        pending = Pending(self.normal(self.L, c.width), table[0, 2])

        def bound(linear: str, layers: Callable[[nn.Module], None] | None = None) -> Call:
            with torch.device("meta"):
                holder = self.holder()
            holder = quant.loaded(holder, dict(state), linear)
            if layers is not None:
                layers(holder)
            (one,) = holder.blocks
            one.attend = lambda *_: attended
            mod = Modulation(table)
            return lambda: ops.residual(*one(x, pending, keys, mod, 0, ctx), ctx.rows)

        def to_delayed(holder: nn.Module) -> None:
            quant.replace(holder, te_linears.layers(self.device, TeDelayed, TeDelayedGelu))

        self.part("block", {
            "bf16": lambda: bound("bf16"),
            "fp8": lambda: forced(bound("fp8"), linear_gelu_fp8=self.composed),
            "fp8, gelu in the product": lambda: forced(bound("fp8"), linear_gelu_fp8="triton"),
            "te, current scaling": lambda: bound("fp8_te"),
            "te, delayed scaling": lambda: delayed(bound("bf16", to_delayed)),
        }, 2.0 * self.L * sum(math.prod(shapes[f"blocks.0.{name}.weight"]) for name in PRODUCTS),
            exact=lambda: bound("bf16")()[self.rows])  # fmt: skip

    def holder(self) -> nn.Module:
        holder = nn.Module()
        holder.blocks = nn.ModuleList([Block(self.c, exact)])
        return holder


def in_turns(b: Bench, calls: dict[str, Call], label: str) -> dict[str, dict[str, Any]]:
    """Milliseconds of one launch: every round runs each way for TURN_S without a break; the first round settles clocks."""
    runs: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(b.args.rounds + 1):
        for way, call in calls.items():
            start = b.sync()
            call()
            once = max(b.sync() - start, 1e-5)
            count = max(1, min(50, int(TURN_S / once)))
            with b.watch(f"{label}/{way}"):
                start = b.sync()
                for _ in range(count):
                    call()
                took = (b.sync() - start) / count
            if turn:
                runs[way].append(1e3 * took)
    rows = {}
    for way, times in runs.items():
        low, _, high = quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        rows[way] = {"ms": median(times), "iqr_ms": high - low, "gpu": b.watch.summary(f"{label}/{way}")}
    return rows
