"""One denoiser block in fp64, from published weights, for sampled tokens of a grid too large to do whole.

    h = ln(x)(1 + scale) + shift;  q, k, v = h W;  q, k = rope(rms(q)), rope(rms(k));  x += gate * softmax(qk/sqrt K) v Wo
    then the same with attention to text plus the constant that image attention has without an image; then the MLP

Written apart from the package so that neither can hide a mistake of the other; only the rotary tables are shared. Letters
as in `cosmos_fast.network`; n sampled tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_fast.config import SUBLAYERS, NetworkConfig

CHUNK = 8192
"""Tokens normalised and projected at once."""


def _ln(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


def _rms(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _modulation(weights: dict[str, Tensor], prefix: str, tau: float, width: int) -> list[tuple[Tensor, ...]]:
    """(shift, scale, gate) of each sub-layer at a time, each (D,)."""
    device, half = next(iter(weights.values())).device, width // 2
    index = torch.arange(half, dtype=torch.float64, device=device)
    angle = tau * torch.exp(-math.log(10000.0) * index / half)
    s = torch.cat((angle.cos(), angle.sin()))
    a = weights["t_embedder.1.linear_2.weight"] @ F.silu(weights["t_embedder.1.linear_1.weight"] @ s)
    e = F.silu(_rms(s, weights["t_embedding_norm.weight"]))
    rows = []
    for part in SUBLAYERS:
        down, up = (weights[f"{prefix}adaln_modulation_{part}.{k}.weight"] for k in (1, 2))
        rows.append((up @ (down @ e) + a).chunk(3))
    return rows


@torch.no_grad()
def exact_block(
    config: NetworkConfig, state: dict[str, Tensor], index: int, x_LD: Tensor, rows: Tensor, text_SE: Tensor,
    tau: float, cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """Output (n, D) fp64 of base block `index` for the tokens `rows` (n,), no hint added, no reference image.

    state: published names -> weights of any dtype; tau: the time as the sinusoid sees it; cos, sin (L, K/2).
    """
    prefix = f"blocks.{index}."
    shared = ("t_embed", "crossattn_proj", "img_context_proj")
    w = {name: t.double() for name, t in state.items() if name.startswith((prefix, *shared))}
    N, K = config.heads, config.head_width
    mods = _modulation(w, prefix, tau, config.width)

    def part(name: str) -> Tensor:
        return w[prefix + name]

    def heads(x: Tensor, weight: str) -> Tensor:
        return (x @ part(weight).T).unflatten(-1, (N, K))

    shift, scale, gate = mods[0]
    keys, values = [], []
    for x, c, s in zip(x_LD.split(CHUNK), cos.split(CHUNK), sin.split(CHUNK), strict=True):
        h = _ln(x.double()) * (1 + scale) + shift
        k = _rms(heads(h, "self_attn.k_proj.weight"), part("self_attn.k_norm.weight"))
        keys.append(_rotate(k, c.double(), s.double()))
        values.append(heads(h, "self_attn.v_proj.weight"))
    k_LNK, v_LNK = torch.cat(keys), torch.cat(values)
    x = x_LD[rows].double()
    h = _ln(x) * (1 + scale) + shift
    q = _rms(heads(h, "self_attn.q_proj.weight"), part("self_attn.q_norm.weight"))
    attended = _attend(_rotate(q, cos[rows].double(), sin[rows].double()), k_LNK, v_LNK)
    x = x + gate * (attended @ part("self_attn.output_proj.weight").T)

    shift, scale, gate = mods[1]
    h = _ln(x) * (1 + scale) + shift
    text = F.gelu(text_SE.double() @ w["crossattn_proj.0.weight"].T + w["crossattn_proj.0.bias"])
    q = _rms(heads(h, "cross_attn.q_proj.weight"), part("cross_attn.q_norm.weight"))
    k = _rms(heads(text, "cross_attn.k_proj.weight"), part("cross_attn.k_norm.weight"))
    attended = _attend(q, k, heads(text, "cross_attn.v_proj.weight"))
    if config.image_width is not None:
        attended = attended + F.gelu(w["img_context_proj.0.bias"]) @ part("cross_attn.v_img.weight").T
    x = x + gate * (attended @ part("cross_attn.output_proj.weight").T)

    shift, scale, gate = mods[2]
    h = _ln(x) * (1 + scale) + shift
    return x + gate * (F.gelu(h @ part("mlp.layer1.weight").T) @ part("mlp.layer2.weight").T)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head: the scores of one head over all keys are what fits."""
    out = [
        torch.softmax(q[:, n] @ k[:, n].T * q.shape[-1] ** -0.5, dim=-1) @ v[:, n] for n in range(q.shape[1])
    ]
    return torch.cat(out, dim=-1)
