"""The inputs of every op at the shapes that matter, for tests and benchmarks.

Letters: L tokens, D width, M MLP width, R modulation rows, J hints, N heads, K head width, S keys, C T H W latent axes,
F video frames. Groups: `production` shapes need a GPU; `small` ones run anywhere, also in Triton's interpreter;
`odd` ones break wrong assumptions; `empty` ones have no element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import ops_attention8 as ops_attention8  # its ops too are in the table
from . import ops_exchange as ops_exchange
from . import ops_linear8 as ops_linear8
from . import ops_tiles as ops_tiles
from . import ops_vae as ops_vae
from .cases_vae import CASES as VAE_CASES
from .cases_vae import MAKERS as VAE_MAKERS
from .drawn import Args as Args
from .drawn import Case as Case
from .drawn import Random as Random
from .ops import EPS
from .packing import TILE_KEYS, TILE_QUERIES, packed
from .reference import attended_steps
from .schedule import base_schedule, unipc_coefficients


def _tables(r: Random, count: int, R: int, D: int) -> tuple[Tensor, ...]:
    # Rows of one bigger table, as the network passes them: the row stride is D, the start is not the storage's.
    return tuple(r.normal(count, R, D).unbind(0))


def _per_frame(L: int, R: int, offset: int) -> int:
    return max(-(-(offset + L) // R), 1)


def _adaln(r: Random, L: int, D: int, R: int = 1, offset: int = 0, fp32_out: int = 0) -> Args:
    shift, scale = _tables(r, 2, R, D)
    out = torch.float32 if fp32_out else r.dtype
    return r.normal(L, D), shift, scale, _per_frame(L, R, offset), offset, EPS, out


def _residual(r: Random, L: int, D: int, R: int = 1, offset: int = 0, J: int = 0, maps: int = 0) -> Args:
    (gate,) = _tables(r, 1, R, D)
    weights = r.normal(J, L if maps else 1, dtype=torch.float32) if J else None
    hints = [r.normal(L, D) for _ in range(J)]
    return r.normal(L, D), r.normal(L, D), gate, hints, weights, _per_frame(L, R, offset), offset


def _residual_adaln(
    r: Random, L: int, D: int, R: int = 1, offset: int = 0, fp32_out: int = 0, **hints: int
) -> Args:
    x, branch, gate, held, weights, *rows = _residual(r, L, D, R, offset, **hints)
    shift, scale = _tables(r, 2, R, D)
    return x, branch, gate, held, weights, shift, scale, *rows, EPS, torch.float32 if fp32_out else r.dtype


def _rows_fp8(r: Random, L: int, D: int) -> tuple[Tensor, Tensor]:
    """Codes of rows with the norm that their steps stand for, and steps of several sizes."""
    codes = r.normal(L, D, dtype=torch.float32) * (448 * D**-0.5)
    steps = 0.01 * (1 + r.normal(L, dtype=torch.float32).abs())
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn), steps


def _linear_fp8(r: Random, L: int, D: int, M: int, bias: int = 0) -> Args:
    return *_rows_fp8(r, L, D), *_rows_fp8(r, M, D), r.normal(M) * 100 if bias else None, r.dtype


def _linear_gelu_fp8(r: Random, L: int, D: int, M: int) -> Args:
    a, a_steps, w, w_steps, *_ = _linear_fp8(r, L, D, M)
    w_steps = w_steps * (0.05 * D**-0.5 * r.normal(1, dtype=torch.float32).abs().add(1))
    return a, a_steps, a_steps * (480 * w_steps.amax()), w, w_steps


def _head_norm(r: Random, L: int, N: int, K: int, packed: int = 1) -> Args:
    x = r.normal(L, packed * N * K)
    return x[:, (packed - 1) * N * K :], r.normal(K), EPS


def _qk_norm_rope(r: Random, L: int, N: int, K: int) -> Args:
    angles = r.normal(L, K // 2, dtype=torch.float32) * 3
    return r.normal(L, 3 * N * K), r.normal(K), r.normal(K), angles.cos(), angles.sin(), EPS


def _qkv_packed(r: Random, L: int, N: int, K: int, columns: int = 2, first: int = 0, last: int = 0) -> Args:
    return *_qk_norm_rope(r, L, N, K)[:-1], columns, first, last or N // columns, EPS


def _qkv_sums(r: Random, L: int, N: int, K: int) -> Args:
    qkv, _, *rest = _qk_norm_rope(r, L, N, K)
    return qkv, *rest


def _moments_of_sums(r: Random, parts: int, N: int, K: int, tokens: int = 500) -> Args:
    ends = r.normal(parts, 2, N, K, dtype=torch.float32).sort(1).values
    ends += ends.new_tensor([-3, 3])[:, None, None]
    return r.normal(parts, 2, N, K, dtype=torch.float64) * 2 * tokens, ends, r.normal(K), r.normal(K), tokens


def _channels(r: Random, N: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """k_mean, v_mean, v_step."""
    k_mean, v_mean = (r.normal(N, K, dtype=torch.float32) * 0.5 for _ in range(2))
    return k_mean, v_mean, r.normal(N, K, dtype=torch.float32).abs() * 0.01 + 0.005


def _qkv_codes(r: Random, L: int, N: int, K: int, rotate: int = 0, pack: int = 0) -> Args:
    qkv, q_gain, k_gain, cos, sin, eps = _qk_norm_rope(r, L, N, K)
    steps = torch.tensor([0.03, 0.06, 2e-4], device=r.device)
    tables = _channels(r, N, K)
    return qkv, q_gain, k_gain, cos, sin, *tables, steps, bool(rotate), bool(pack), eps


def _codes_packed(
    r: Random, L: int, N: int, K: int, rotate: int = 1, columns: int = 2, parts: int = 2
) -> Args:
    *given, _, eps = _qkv_codes(r, L, N, K, rotate)
    return *given, columns, parts, eps


def _values_packed(r: Random, S: int, N: int, K: int) -> Args:
    """The last third of a row, as it arrives beside q and k."""
    rows = (r.normal(S, 3, N, K) * 30).to(torch.float8_e4m3fn)
    return (rows[:, 2] if S else rows.new_empty(0, N, K),)  # nothing lies apart from nothing


def _attention_fp8(
    r: Random, L: int, S: int, N: int, K: int, pack: int = 0, apart: int = 0, codes: int = 0
) -> Args:
    """apart: q and k in rows that lie apart, as they arrive from other ranks. codes: the result is such too."""
    q, k, v = ((r.normal(n, N, (1 + 2 * apart) * K) * 30).to(torch.float8_e4m3fn) for n in (L, S, S))
    q, k, v = (x.view(len(x), 1 + 2 * apart, N, K)[:, 0] for x in (q, k, v))
    v = v.contiguous()
    _, v_mean, v_step = _channels(r, N, K)
    score_step = torch.full((1,), 1.5 * K**-0.5 / 900, device=r.device)
    given = q, k, packed(v) if pack else v, score_step, v_step, v_mean
    return (*given, torch.float8_e4m3fn, attended_steps(v_step, v_mean, 1)) if codes else (*given, r.dtype)


def _attention_fp8_tiles(r: Random, L: int, S: int, N: int, K: int, pack: int = 0, codes: int = 0) -> Args:
    """Lists of any length from one tile on, in any order, with what is no tile behind their ends."""
    rows, columns = -(-L // TILE_QUERIES), -(-S // TILE_KEYS)
    tiles = torch.rand(N, rows, columns, generator=r.generator, device=r.device).argsort(-1).int()
    lengths = torch.randint(1, columns + 1, (N, rows), generator=r.generator, device=r.device)
    tiles = torch.where(torch.arange(columns, device=r.device) < lengths[..., None], tiles, 10**6)
    q, k, v, score_step, v_step, v_mean, out = _attention_fp8(r, L, S, N, K, pack)
    given = q, k, v, score_step, v_step, v_mean
    steps = (attended_steps(v_step, v_mean, 1),) if codes else ()
    return *given, torch.float8_e4m3fn if codes else out, tiles, lengths.int(), *steps


def _attended_steps(r: Random, N: int, K: int, rows: int) -> Args:
    _, v_mean, v_step = _channels(r, N, K)
    return v_step, v_mean, rows


def _values_restored(r: Random, L: int, N: int, K: int, codes: int = 0) -> Args:
    _, v_mean, v_step = _channels(r, N, K)
    given = r.normal(L, N, K) * 30, v_step, v_mean
    return (*given, attended_steps(v_step, v_mean, 1)) if codes else given


def _patchify(r: Random, C: int, T: int, H: int, W: int, view: int = 0) -> Args:
    z = r.normal(T, C, H, W).transpose(0, 1) if view else r.normal(C, T, H, W)
    return z, (torch.arange(T, device=r.device) < 1).to(r.dtype)


def _unpatchify(r: Random, C: int, T: int, H: int, W: int) -> Args:
    return r.normal(T * (H // 2) * (W // 2), 4 * C), T, H, W


def _guided_unipc(r: Random, T: int, H: int, W: int, step: int = 5, alone: int = 0) -> Args:
    shape = (1, 16, T, H, W)
    x, m1, m2, last = (r.normal(*shape, dtype=torch.float32) for _ in range(4))
    uncond = None if alone else r.normal(*shape)
    coefficients = list(unipc_coefficients(base_schedule(35))[step])
    return x, r.normal(*shape), uncond, m1, m2, last, 3.0, coefficients


MAKERS: dict[str, Callable[..., Args]] = {
    "adaln": _adaln, "residual": _residual, "residual_adaln": _residual_adaln, "head_norm": _head_norm,
    "qk_norm_rope": _qk_norm_rope, "qkv_packed": _qkv_packed, "patchify": _patchify, "unpatchify": _unpatchify,
    "gelu": lambda r, L, M: (r.normal(L, M) * 2,),
    "linear_gelu": lambda r, L, D, M: (r.normal(L, D), r.normal(M, D) * (2 * D**-0.5)),
    "linear_head_norm": lambda r, L, D, N, K: (r.normal(L, D), r.normal(N * K, D) * D**-0.5, r.normal(K), EPS),
    "attention": lambda r, L, S, N, K: (r.normal(L, N, K), r.normal(S, N, K), r.normal(S, N, K)),
    "quantise": lambda r, L, D: (r.normal(L, D) * (r.normal(L, 1).abs() + 0.1),),
    "adaln_fp8": lambda r, **sizes: _adaln(r, **sizes)[:-1],
    "residual_adaln_fp8": lambda r, **sizes: _residual_adaln(r, **sizes)[:-1],
    "gelu_fp8": lambda r, L, M: (r.normal(L, M) * 2, r.normal(L, dtype=torch.float32).abs() * 0.05 + 0.1),
    "linear_fp8": _linear_fp8, "linear_gelu_fp8": _linear_gelu_fp8,
    "qkv_moments": _qk_norm_rope, "qkv_sums": _qkv_sums, "moments_of_sums": _moments_of_sums, "qkv_codes": _qkv_codes, "attention_fp8": _attention_fp8, "values_restored": _values_restored,
    "attention_fp8_tiles": _attention_fp8_tiles, "attended_steps": _attended_steps, "codes_packed": _codes_packed, "values_packed": _values_packed,
    "tile_means": lambda r, L, N, K, rows: ((r.normal(L, N, K) * 30).to(torch.float8_e4m3fn), rows),
    **VAE_MAKERS,
    "guided_unipc": _guided_unipc, "pixels": lambda r, F, H, W, last=0: (r.normal(1, F, H, W, 3).permute(0, 4, 1, 2, 3) if last else r.normal(1, 3, F, H, W),),
    "normalized": lambda r, F, H, W: (r.codes(F, H, W, 3), r.dtype),
}  # fmt: skip

# --- the cases -------------------------------------------------------------------------------------

_720P, _480P, _SLICE = 24 * 44 * 80, 24 * 30 * 52, 3 * 44 * 80


def _token_cases(
    production: dict[str, int], small: dict[str, int], odd: Sequence[Case] = ()
) -> tuple[Case, ...]:
    return (
        Case("720p", "production", "93 frames of 1280x704", {"L": _720P, **production}),
        Case("480p", "production", "93 frames of 832x480", {"L": _480P, **production}),
        Case("slice", "production", "one of eight context ranks at 720p", {"L": _SLICE, **production}),
        Case("small", "small", "a few whole tokens", {"L": 24, **small}),
        Case("one token", "odd", "L = 1", {"L": 1, **small}),
        Case("empty", "empty", "a rank without tokens", {"L": 0, **small}),
        *odd,
    )


def _row_cases(hints: bool) -> tuple[Case, ...]:
    wide, rows = {"D": 2048}, [
        Case("720p frames", "production", "per-frame times of the distilled model", {"L": _720P, "D": 2048, "R": 24}),
        Case("later rank", "production", "token_offset of a rank in the middle", {"L": _SLICE, "D": 2048, "R": 8, "offset": 3 * _SLICE}),
        Case("frames", "small", "rows change inside", {"L": 24, "D": 128, "R": 4}),
        Case("width 96", "odd", "D is no power of two", {"L": 7, "D": 96, "R": 3}),
        Case("width 2304", "odd", "D is no power of two and wide", {"L": 5, "D": 2304}),
        Case("offset", "odd", "starts inside a frame", {"L": 10, "D": 64, "R": 5, "offset": 9}),
        Case("one frame", "odd", "an image", {"L": 6, "D": 64, "R": 1}),
    ]  # fmt: skip
    if hints:
        rows += [
            Case("720p 1 hint", "production", "single control", {"L": _720P, "D": 2048, "J": 1}),
            Case("720p 4 hints", "production", "all controls with spatial weights", {"L": _720P, "D": 2048, "J": 4, "maps": 1}),
            *(Case(f"{j} hints", "small", "each count is its own kernel", {"L": 9, "D": 128, "J": j}) for j in (1, 2, 3, 4)),
            Case("maps", "odd", "weights per token", {"L": 9, "D": 96, "R": 3, "J": 4, "maps": 1}),
        ]  # fmt: skip
    return _token_cases(wide, {"D": 128}, rows)


_OUT32 = Case("head", "small", "the head normalises into fp32", {"L": 6, "D": 128, "fp32_out": 1})
_HEAD = Case("720p head", "production", "as the head does", {"L": _720P, "D": 2048, "fp32_out": 1})
_HEADS, _TINY = {"N": 16, "K": 128}, {"N": 2, "K": 64}
_ODD_HEADS = Case("3 heads of 96", "odd", "nothing is a power of two", {"L": 5, "N": 3, "K": 96})
_ONE_HEAD = Case("published head", "small", "the published heads", {"L": 3, **_HEADS})
_LATENT = {"T": 24, "H": 88, "W": 160}
_PICTURE = {"F": 93, "H": 704, "W": 1280}

CASES: dict[str, tuple[Case, ...]] = {
    "adaln": (*_row_cases(hints=False), _OUT32),
    "residual": _row_cases(hints=True),
    "residual_adaln": (*_row_cases(hints=True), _OUT32, _HEAD),
    "head_norm": _token_cases(_HEADS, _TINY, [
        _ODD_HEADS, _ONE_HEAD,
        Case("packed", "odd", "the last third of a packed projection: strided rows", {"L": 5, "N": 2, "K": 64, "packed": 3}),
        Case("720p packed", "production", "strided rows", {"L": _720P, **_HEADS, "packed": 2}),
    ]),
    "qk_norm_rope": _token_cases(_HEADS, _TINY, [_ODD_HEADS, _ONE_HEAD]),
    "qkv_packed": _token_cases(_HEADS, _TINY, [
        Case("720p quarter", "production", "a part of what one of two ranks sends", {"L": _720P // 2, **_HEADS, "first": 2, "last": 4}),
        Case("2 of 6 heads", "odd", "two columns, K no power of two", {"L": 5, "N": 6, "K": 96, "first": 1}),
        Case("1 of 4 heads", "odd", "four columns, a program ends inside a token", {"L": 7, "N": 16, "K": 32, "columns": 4, "first": 1, "last": 2}),
        Case("one column", "odd", "heads stay together", {"L": 2, "N": 3, "K": 64, "columns": 1}),
    ]),
    "gelu": _token_cases({"M": 8192}, {"M": 256}, [
        Case("tail", "odd", "last block partly full", {"L": 37, "M": 129}),
        Case("beyond 31 bits", "production", "more than 2**31 elements", {"L": 263_000, "M": 8192}),
    ]),
    "linear_gelu": _token_cases({"D": 2048, "M": 8192}, {"D": 64, "M": 256}, [
        Case("tails", "odd", "every edge: rows, features and depth end inside a tile", {"L": 133, "D": 72, "M": 264}),
        Case("narrow", "odd", "one step, 8 features", {"L": 3, "D": 8, "M": 8}),
    ]),
    "quantise": _token_cases({"D": 2048}, {"D": 128}, [
        Case("720p mlp", "production", "the hidden layer's width", {"L": _720P, "D": 8192}),
        Case("width 96", "odd", "D is no power of two", {"L": 7, "D": 96}),
    ]),
    "adaln_fp8": _row_cases(hints=False), "residual_adaln_fp8": _row_cases(hints=True),
    "gelu_fp8": _token_cases({"M": 8192}, {"M": 256}, [Case("tail", "odd", "M is no power of two", {"L": 3, "M": 4176})]),
    "linear_fp8": _token_cases({"D": 2048, "M": 2048}, {"D": 64, "M": 96}, [
        Case("720p qkv", "production", "packed projection", {"L": _720P, "D": 2048, "M": 6144}),
        Case("720p fc2", "production", "the longest sums", {"L": _720P, "D": 8192, "M": 2048}),
        Case("bias", "odd", "image attention folded into a bias", {"L": 17, "D": 32, "M": 48, "bias": 1}),
    ]),
    "linear_gelu_fp8": _token_cases({"D": 2048, "M": 8192}, {"D": 64, "M": 256}, [
        Case("tails", "odd", "every edge: rows, features and depth end inside a tile", {"L": 133, "D": 144, "M": 272}),
        Case("narrow", "odd", "one step, 16 features", {"L": 3, "D": 16, "M": 16}),
    ]),
    "linear_head_norm": _token_cases({"D": 2048, **_HEADS}, {"D": 64, **_TINY}, [
        Case("published head", "small", "the published heads", {"L": 3, "D": 64, "N": 3, "K": 128}),
        Case("tails", "odd", "every edge: rows, heads and depth end inside a tile", {"L": 133, "D": 72, "N": 5, "K": 16}),
    ]),
    "attention": _token_cases({"S": 512, **_HEADS}, {"S": 9, **_TINY}, [
        Case("one key", "odd", "softmax of one value", {"L": 3, "S": 1, **_TINY}),
        Case("self", "production", "self-attention of one rank", {"L": _SLICE, "S": _SLICE, **_HEADS}),
    ]),
    "qkv_moments": _token_cases(_HEADS, _TINY, [
        _ODD_HEADS, _ONE_HEAD, Case("chunks", "odd", "several partial sums, the last of few tokens", {"L": 261, "N": 1, "K": 32}),
    ]),
    "qkv_sums": (
        Case("half of 720p", "production", "one of two ranks", {"L": _720P // 2, **_HEADS}),
        Case("small", "small", "a few whole tokens", {"L": 24, **_TINY}),
        Case("chunks", "odd", "several partial sums, the last of few tokens", {"L": 261, "N": 3, "K": 96}),
        Case("one token", "odd", "L = 1", {"L": 1, **_TINY}),
        Case("empty", "empty", "no token", {"L": 0, **_TINY}),
    ),
    "moments_of_sums": (
        Case("8 ranks", "production", "the published heads", {"parts": 8, **_HEADS}),
        Case("2 ranks", "small", "the smallest exchange", {"parts": 2, **_TINY}),
        Case("one part", "odd", "nothing to add, K no power of two", {"parts": 1, "N": 3, "K": 96}),
        Case("65 parts", "odd", "more than are added at once", {"parts": 65, "N": 1, "K": 32}),
        Case("empty", "empty", "no token on any rank", {"parts": 2, **_TINY, "tokens": 0}),
    ),
    "qkv_codes": _token_cases(_HEADS, _TINY, [
        _ODD_HEADS, _ONE_HEAD,
        Case("720p rotated", "production", "as the network does", {"L": _720P, **_HEADS, "rotate": 1}),
        Case("720p packed", "production", "v transposed", {"L": _720P, **_HEADS, "rotate": 1, "pack": 1}),
        Case("rotated", "small", "the published heads, tokens that do not fill a program", {"L": 6, **_HEADS, "rotate": 1}),
        Case("rotated pair", "odd", "few heads: a product needs 16 rows", {"L": 3, "N": 3, "K": 32, "rotate": 1}),
        Case("packed", "odd", "v transposed, its last tile partly full", {"L": 131, **_TINY, "pack": 1}),
    ]),
    "attention_fp8": _token_cases({"S": _SLICE, **_HEADS}, {"S": 40, **_TINY}, [
        Case("one key", "odd", "softmax of one value", {"L": 3, "S": 1, **_TINY}),
        Case("odd", "odd", "no tile is full, v transposed", {"L": 133, "S": 197, "N": 3, "K": 128, "pack": 1}),
        Case("apart", "odd", "q and k as they arrive", {"L": 133, "S": 197, "N": 3, "K": 128, "pack": 1, "apart": 1}),
        Case("720p codes", "production", "as the network does", {"L": _720P, "S": _SLICE, **_HEADS, "pack": 1, "codes": 1}),
        Case("codes", "odd", "rows of codes", {"L": 133, "S": 197, "N": 3, "K": 128, "pack": 1, "codes": 1}),
    ]),
    "codes_packed": _token_cases({**_HEADS}, {**_TINY}, [
        Case("3 of 6 heads", "odd", "parts of 1 and 2 heads, no rotation, K no power of two", {"L": 5, "N": 6, "K": 96, "rotate": 0}),
        Case("4 columns in 3 parts", "odd", "parts of 1, 1 and 2 heads", {"L": 3, "N": 16, "K": 128, "columns": 4, "parts": 3}),
        Case("one column, one part", "odd", "heads stay together", {"L": 130, "N": 3, "K": 64, "columns": 1, "parts": 1}),
    ]),
    "values_packed": (
        Case("720p half the heads", "production", "what one of two ranks gets", {"S": _720P, "N": 8, "K": 128}),
        Case("small", "small", "one group of 16", {"S": 16, **_TINY}),
        Case("odd", "odd", "the last group has five tokens", {"S": 133, "N": 3, "K": 96}),
        Case("one token", "odd", "S = 1", {"S": 1, **_TINY}),
        Case("empty", "empty", "no token", {"S": 0, **_TINY}),
    ),
    "attention_fp8_tiles": (
        Case("two tiles", "production", "the published heads and keys of a rank", {"L": 384, "S": _SLICE, **_HEADS, "pack": 1}),
        Case("small", "small", "a tile of queries, one and a bit of keys", {"L": 192, "S": 104, **_TINY}),
        Case("odd", "odd", "no tile is full, v transposed", {"L": 201, "S": 197, "N": 3, "K": 128, "pack": 1}),
        Case("codes", "odd", "rows of codes", {"L": 201, "S": 197, "N": 3, "K": 128, "pack": 1, "codes": 1}),
        Case("empty", "empty", "no query", {"L": 0, "S": 40, **_TINY}),
    ),
    "tile_means": (
        Case("720p", "production", "tiles of keys", {"L": _720P, **_HEADS, "rows": 96}),
        Case("small", "small", "two tiles", {"L": 192, **_TINY, "rows": 96}),
        Case("odd", "odd", "the last tile has two tokens", {"L": 194, "N": 3, "K": 96, "rows": 64}),
        Case("empty", "empty", "no token", {"L": 0, **_TINY, "rows": 96}),
    ),
    "values_restored": _token_cases(_HEADS, _TINY, [
        _ODD_HEADS, Case("codes", "odd", "nothing is a power of two", {"L": 5, "N": 3, "K": 96, "codes": 1}),
    ]),
    "attended_steps": (
        Case("720p", "production", "93 frames of 1280x704", {"rows": _720P, **_HEADS}),
        Case("small", "small", "one program", {"rows": 24, **_TINY}),
        Case("odd", "odd", "two programs, nothing is a power of two", {"rows": 4099, "N": 3, "K": 96}),
        Case("empty", "empty", "no token", {"rows": 0, **_TINY}),
    ),
    "patchify": (
        Case("720p", "production", "93 frames of 1280x704", {"C": 16, **_LATENT}),
        Case("small", "small", "two frames", {"C": 4, "T": 2, "H": 6, "W": 8}),
        Case("view", "odd", "a transposed latent", {"C": 3, "T": 3, "H": 4, "W": 10, "view": 1}),
        Case("one frame", "odd", "an image of one token", {"C": 1, "T": 1, "H": 2, "W": 2}),
        Case("empty", "empty", "no frame", {"C": 4, "T": 0, "H": 4, "W": 4}),
    ),
    "unpatchify": (
        Case("720p", "production", "93 frames of 1280x704", {"C": 16, **_LATENT}),
        Case("small", "small", "two frames", {"C": 4, "T": 2, "H": 6, "W": 8}),
        Case("odd", "odd", "channels no power of two, last block partly full", {"C": 3, "T": 3, "H": 4, "W": 10}),
        Case("one token", "odd", "an image of one token", {"C": 1, "T": 1, "H": 2, "W": 2}),
        Case("empty", "empty", "no frame", {"C": 4, "T": 0, "H": 4, "W": 4}),
    ),
    **VAE_CASES,
    "guided_unipc": (
        Case("720p", "production", "93 frames of 1280x704, guidance", _LATENT),
        Case("first", "small", "nothing to correct", {"T": 1, "H": 6, "W": 7, "step": 0}),
        Case("second", "small", "corrector of order 1", {"T": 1, "H": 6, "W": 7, "step": 1}),
        Case("middle", "small", "all terms", {"T": 2, "H": 6, "W": 10}),
        Case("last", "odd", "the result is m; last block partly full", {"T": 3, "H": 9, "W": 11, "step": 34}),
        Case("alone", "odd", "no guidance", {"T": 1, "H": 6, "W": 7, "alone": 1}),
        Case("empty", "empty", "no frame", {"T": 0, "H": 4, "W": 4}),
    ),
    "pixels": (
        Case("720p", "production", "93 frames", _PICTURE),
        Case("720p last", "production", "as the channels-last decoder leaves them", {**_PICTURE, "last": 1}),
        Case("small", "small", "channels first", {"F": 2, "H": 6, "W": 10}),
        Case("last", "odd", "channels last, last block partly full", {"F": 3, "H": 9, "W": 23, "last": 1}),
        Case("one pixel", "odd", "F = H = W = 1", {"F": 1, "H": 1, "W": 1}),
        Case("empty", "empty", "no frame", {"F": 0, "H": 4, "W": 4}),
    ),
    "normalized": (
        Case("720p", "production", "93 frames", _PICTURE),
        Case("small", "small", "all codes", {"F": 2, "H": 16, "W": 16}),
        Case("tail", "odd", "last block partly full", {"F": 1, "H": 7, "W": 11}),
        Case("empty", "empty", "no frame", {"F": 0, "H": 4, "W": 4}),
    ),
}  # fmt: skip
