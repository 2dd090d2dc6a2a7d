"""Adapters from libraries to attention over 8-bit codes: (q, k, v, score_step, dtype) -> (L, N, K) in that dtype.

softmax(q k^T * score_step) v of e4m3 codes, the weights rounded to e4m3 before the second product, no mask. Each loader
imports its library and then has it compute a small example: some releases return noise on some GPUs, and that must
be a reason not to choose them. `ops` decides which of them may run where.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .packing import TILE_KEYS, packed
from .reference import ATTENTION_ROWS, E4M3, E4M3_MAX

Attend8 = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
AttendOwn = Callable[..., Tensor]

OWN_WIDTH = 128
"""Features of a head that csrc/attention8.cu is built for."""

WEIGHT_SCALE = 256.0
"""Weights are at most 1; as codes they are multiplied by this, so that small ones keep their digits."""

ALLOWED = 0.06
"""Relative error of the example. Rounding the weights costs 0.03; noise costs 1."""


def emulated(q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
    """What the libraries compute, in plain torch: for machines without them, and to compare them with."""
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    parts = []
    for rows in q.split(ATTENTION_ROWS):
        scores = rows.float().transpose(0, 1) @ keys * score_step
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        codes = (weights * WEIGHT_SCALE).to(E4M3).float()
        parts.append(codes @ values / (WEIGHT_SCALE * weights.sum(-1, keepdim=True)))
    return torch.cat([part.transpose(0, 1).to(out) for part in parts])


@cache
def load_fa3() -> Attend8:
    """FlashAttention-3 forward in fp8, from either of its two distributions. Writes bf16."""
    try:
        from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        from fa3_fwd_interface import flash_attn_func  # type: ignore[import-not-found]
    if "q_descale" not in inspect.signature(flash_attn_func).parameters:
        raise RuntimeError("this FlashAttention-3 takes no q_descale; it is too old for fp8")

    def fa3(q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
        if q.shape[0] == 0:
            return q.new_empty(q.shape, dtype=out)
        scale = score_step.expand(1, q.shape[1])
        result = flash_attn_func(q[None], k[None], v.contiguous()[None], softmax_scale=1.0, q_descale=scale)
        return (result[0] if isinstance(result, tuple) else result)[0].to(out)

    return proven("fa3", fa3)


# --- ours ------------------------------------------------------------------------------------------


def own(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
    out_step: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """csrc/attention8.cu, which takes packed v and applies its steps and mean itself. Writes bf16, or codes of out_step."""
    return own_tiles(q, k, v, score_step, v_step, v_mean, out, out_step=out_step)[0]


@cache
def load_own() -> AttendOwn:
    """Our kernel for heads of 128, after it computed the example with steps and a mean of v that matter."""

    def plain(q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
        v_step = torch.linspace(0.5, 2.0, q.shape[1] * q.shape[2], device=q.device).view(q.shape[1:])
        v_mean = 4.0 - v_step
        return (own(q, k, v, score_step, v_step, v_mean, out).float() - v_mean) / v_step

    def in_codes(q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
        one, step = torch.ones(q.shape[1:], device=q.device), torch.full((1,), 0.5, device=q.device)
        return own(q, k, v, score_step, one, 0 * one, E4M3, step).float() * step

    proven("own", plain)
    proven("own as codes", in_codes)
    return own


def own_tiles(
    q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, v_step: Tensor, v_mean: Tensor, out: torch.dtype,
    key_tiles: Tensor | None = None, key_counts: Tensor | None = None, out_step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the log-sum-exp, and over key_tiles and key_counts if they are given."""
    rows, lists = packed(v) if v.shape == k.shape else v, (key_tiles, key_counts)
    y, lse = torch.ops.cosmos_fast.attention8_cuda(q, k, rows, score_step, v_step, v_mean, *lists, out_step)
    return y.to(out), lse


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys from those over disjoint lists: (L, N, K) in the parts' dtype, (N, L) fp32."""
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    # Without keys all parts are alike.
    shares = torch.where(total.isfinite(), (lses - total).exp(), 1 / len(parts))
    out = sum(out.float() * share.T[..., None] for (out, _), share in zip(parts, shares, strict=True))
    return out.to(parts[0][0].dtype), total


@cache
def load_own_tiles() -> Callable[..., tuple[Tensor, Tensor]]:
    """Our kernel over lists, after it computed the example in two parts that together have every key tile once."""

    def in_two_parts(q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
        tiles = -(-k.shape[0] // TILE_KEYS)
        order = torch.arange(tiles - 1, -1, -1, dtype=torch.int32, device=q.device).expand(q.shape[1], 1, -1)
        one, parts = torch.ones(q.shape[1:], device=q.device), []
        for lists in (order[..., :1], order[..., 1:]):
            counts = torch.full((q.shape[1], 1), lists.shape[2], dtype=torch.int32, device=q.device)
            given = q, k, v, score_step, one, 0 * one, out, lists.contiguous(), counts
            parts.append(own_tiles(*given))
        return merged(parts)[0]

    proven("own over lists", in_two_parts)
    return own_tiles


# --- cuDNN -----------------------------------------------------------------------------------------

_IDS = {name: i for i, name in enumerate(
    ("q", "k", "v", "descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o", "o", "amax_s", "amax_o"), 1
)}  # fmt: skip
_SCALARS = tuple(name for name in _IDS if "scale" in name)


class CudnnAttention:
    """cuDNN's fp8 attention through its graph API: one graph per shape, built when first met.

    Releases differ in the keyword for inference and in the outputs besides the result that they demand, GPUs in the
    result's dtype: Hopper has e4m3 alone, which adds its rounding to the result's error, Blackwell wider ones. The first
    of VARIANTS that builds is kept. Raises RuntimeError with what cuDNN says of each if none does.

    A result of e4m3 needs no scale: it is a mean of codes of v, so never above 448. A single query, for which Hopper has no
    engine (cuDNN 9.19), comes with itself twice.
    """

    VARIANTS = tuple(
        (kind, extra, amax)
        for kind in (torch.bfloat16, torch.float16, E4M3)
        for extra in ({"generate_stats": False}, {"is_inference": True})
        for amax in (("amax_s", "amax_o"), ("amax_o",), ())
    )

    def __init__(self, cudnn: Any) -> None:
        self._cudnn = cudnn
        self._handles: dict[torch.device, Any] = {}
        self._constants: dict[torch.device, dict[str, Tensor]] = {}
        self._graphs: dict[Any, tuple[Any, torch.dtype, tuple[str, ...], int]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, score_step: Tensor, out: torch.dtype) -> Tensor:
        if q.shape[0] == 0:
            return q.new_empty(q.shape, dtype=out)
        if q.shape[0] == 1:
            return self(q.repeat(2, 1, 1), k, v, score_step, out)[:1]
        key = (tuple(q.shape), tuple(k.shape), q.device)
        if key not in self._graphs:
            self._graphs[key] = self._build(q, k, v)
        graph, kind, amax, workspace = self._graphs[key]
        result = q.new_empty(q.shape, dtype=kind)
        constants = self._constants[q.device]
        given = {**constants, "descale_q": score_step, "q": q, "k": k, "v": v, "o": result}
        given |= {name: q.new_empty(1, dtype=torch.float32) for name in amax}
        handle = self._handles[q.device]
        self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(q.device).cuda_stream)
        room = q.new_empty(max(workspace, 1), dtype=torch.uint8)
        graph.execute({_IDS[name]: tensor for name, tensor in given.items()}, room, handle=handle)
        return result.to(out)

    def _build(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, torch.dtype, tuple[str, ...], int]:
        if q.device not in self._handles:
            self._handles[q.device] = self._cudnn.create_handle()
            values = {**dict.fromkeys(_SCALARS, 1.0), "scale_s": WEIGHT_SCALE, "descale_s": 1 / WEIGHT_SCALE}
            self._constants[q.device] = {
                name: torch.full((1,), value, device=q.device) for name, value in values.items()
            }
        said = []
        for kind, extra, amax in self.VARIANTS:
            try:
                graph = self._graph(q, k, v, kind, extra, amax)
                return graph, kind, amax, graph.get_workspace_size()
            except Exception as error:  # cuDNN's own types, and TypeError of another release's signature
                text = (str(error).splitlines() or [""])[0]
                said.append(f"{kind} {extra} {amax}: {type(error).__name__}: {text}")
        raise RuntimeError(
            f"cuDNN {self._cudnn.backend_version()} has no such fp8 attention: " + "; ".join(said)
        )

    def _graph(
        self, q: Tensor, k: Tensor, v: Tensor, kind: torch.dtype, extra: dict[str, Any], amax: tuple[str, ...]
    ) -> Any:
        types = self._cudnn.data_type
        graph = self._cudnn.pygraph(
            io_data_type=types.FP8_E4M3, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT,
            handle=self._handles[q.device],
        )  # fmt: skip

        def heads_first(x: Tensor) -> dict[str, list[int]]:
            L, N, K = x.shape
            return {"dim": [1, N, L, K], "stride": [x.numel(), x.stride(1), x.stride(0), x.stride(2)]}

        one = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
        operands = {
            name: graph.tensor(uid=_IDS[name], data_type=types.FP8_E4M3, **heads_first(x))
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        scalars = {name: graph.tensor(uid=_IDS[name], data_type=types.FLOAT, **one) for name in _SCALARS}
        o, _, amax_s, amax_o = graph.sdpa_fp8(
            **operands, **scalars, attn_scale=1.0, use_causal_mask=False, **extra
        )
        shape = heads_first(q)
        o.set_uid(_IDS["o"]).set_output(True).set_dim(shape["dim"]).set_stride(shape["stride"])
        kinds = {torch.bfloat16: types.BFLOAT16, torch.float16: types.HALF, E4M3: types.FP8_E4M3}
        o.set_data_type(kinds[kind])
        for name, tensor in (("amax_s", amax_s), ("amax_o", amax_o)):
            if name in amax:
                tensor.set_uid(_IDS[name]).set_output(True).set_dim(one["dim"]).set_stride(one["stride"])
                tensor.set_data_type(types.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph


@cache
def load_cudnn() -> Attend8:
    """cuDNN's fp8 attention, through the package nvidia-cudnn-frontend."""
    import cudnn  # type: ignore[import-not-found]

    return proven("cudnn", CudnnAttention(cudnn))


# --- is what it returns attention? -----------------------------------------------------------------


def example(device: torch.device | str, L: int = 192, S: int = 320, N: int = 2, K: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v, score_step: scores from flat to peaked, in one head and the other."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, N, K, generator=draw, device="cpu") * 30 for n in (L, S, S))
    q[:, -1] *= 6
    # Clamped: torch makes NaN of what is too large for e4m3 up to 2.11, 448 later.
    q, k, v = (x.clamp(-E4M3_MAX, E4M3_MAX).to(device).to(E4M3) for x in (q, k, v))
    return q, k, v, torch.full((1,), K**-0.5 / 900, device=device)


def proven(name: str, attend: Attend8, device: torch.device | str = "cuda") -> Attend8:
    """`attend`, after it computed an example. Raises RuntimeError with the error measured if it is not attention."""
    operands = example(device)
    exact = emulated(*operands, torch.float32)
    got = attend(*operands, torch.bfloat16).float()
    error = float((got - exact).norm() / exact.norm())
    if not error <= ALLOWED:  # NaN too
        gpu = torch.cuda.get_device_name() if str(device).startswith("cuda") else device
        raise RuntimeError(
            f"{name}: relative error of a small example must be at most {ALLOWED}, got {error:.3g} on {gpu} with "
            f"torch {torch.__version__}. It returns noise here."
        )
    return attend
