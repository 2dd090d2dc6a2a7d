"""How well (`Recipe`) and where (`Plan`): policies as data, written into every output's record.

A Recipe may change pixels within a stated bound; a Plan may not, except for reduction order. Both are frozen,
print themselves in one line, and turn into plain dicts. Imports the standard library alone.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

_ALLOWED: dict[str, tuple[str, ...]] = {
    "dtype": ("bf16", "fp32"),
    "linear": ("bf16", "fp8", "fp8_te"),
    "attention": ("bf16", "fp8"),
    "vae": ("bf16", "fp8"),
}
EXCHANGES = ("auto", "copies", "collectives")
_PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32"},
    "fp8": {"dtype": "bf16", "linear": "fp8", "attention": "fp8"},
    "fp8_sparse": {
        "dtype": "bf16",
        "linear": "fp8",
        "attention": "fp8",
        "attention_share": 0.5,
        "attention_head": 0.2,
    },
    "fp8_linear": {"dtype": "bf16", "linear": "fp8"},
    "fp8_vae": {"dtype": "bf16", "vae": "fp8"},
}


def _one_line(record: Any) -> str:
    values = ", ".join(f"{f.name}={getattr(record, f.name)!r}" for f in fields(record))
    return f"{type(record).__name__}({values})"


@dataclass(frozen=True, repr=False)
class Recipe:
    """Precision policy of one engine.

    dtype: arithmetic of weights and activations, "bf16" (as the models were published) or "fp32".
    linear: the linear layers of the blocks, "bf16" for "in `dtype`, not quantised", "fp8", or "fp8_te" for those of
    Transformer Engine; 8 bits need dtype "bf16". attention: self-attention, "bf16" for the same, or "fp8".
    vae: convs of the video VAE's residual blocks, "bf16" for the same, or "fp8".
    attention_head, attention_tail: shares of the steps, the first and the last ones, that attend in `dtype` all the same.
    attention_share, attention_mass: 8-bit attention over the key tiles that an estimate keeps for each tile of queries: at
    most this share of them, and no more than hold this share of the estimated weight; 1 and 1 keep all.
    Raises ValueError for any other value.
    """

    name: str = "exact"
    dtype: str = "bf16"
    linear: str = "bf16"
    attention: str = "bf16"
    vae: str = "bf16"
    attention_head: float = 0.0
    attention_tail: float = 0.0
    attention_share: float = 1.0
    attention_mass: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"recipe: name must be a non-empty string, got {self.name!r}.")
        for key, allowed in _ALLOWED.items():
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"recipe: {key} must be one of {', '.join(allowed)}, got {value!r}.")
        for key in ("linear", "vae"):
            if (value := getattr(self, key)) != "bf16" and self.dtype != "bf16":
                raise ValueError(f"recipe: {key} must be bf16 where dtype is {self.dtype}, got {value!r}.")
        shares = self.attention_head, self.attention_tail
        if not all(type(x) in (int, float) and x >= 0 for x in shares) or sum(shares) > 1:
            rule = "attention_head and attention_tail must be shares of the steps that do not overlap"
            raise ValueError(f"recipe: {rule}, got {shares}. 0.2 and 0.1 leave the middle 70 % to 8 bits.")

        for key in ("attention_share", "attention_mass"):
            value = getattr(self, key)
            if type(value) not in (int, float) or not 0 < value <= 1:
                raise ValueError(f"recipe: {key} must be above 0 and at most 1, got {value!r}. 1 keeps all.")
        if self.is_sparse and self.attention != "fp8":
            given = self.attention_share, self.attention_mass
            raise ValueError(
                f"recipe: attention must be fp8 where not all key tiles are kept, got {self.attention!r} and {given}."
            )

    @property
    def is_sparse(self) -> bool:
        """Whether attention leaves key tiles out."""
        return min(self.attention_share, self.attention_mass) < 1

    __repr__ = __str__ = _one_line

    @classmethod
    def exact(cls) -> Recipe:
        """bf16 everywhere, as the models were published. The default."""
        return cls.preset("exact")

    @classmethod
    def fp32(cls) -> Recipe:
        """fp32 everywhere: twice the memory, for checks on a CPU."""
        return cls.preset("fp32")

    @classmethod
    def fp8(cls) -> Recipe:
        """bf16 with the linear layers and the self-attention of the blocks in 8 bits."""
        return cls.preset("fp8")

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """Recipe of that name; ValueError lists the presets when there is none."""
        if name not in _PRESETS:
            raise ValueError(f"recipe: preset must be one of {', '.join(_PRESETS)}, got {name!r}.")
        return cls(name=name, **_PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, repr=False)
class Plan:
    """Where the work runs.

    device: "cuda", "cuda:N", "cpu", or None to take a GPU when there is one.
    context, cfg: ranks that share the tokens, any number, and that share the two guidance passes, 1 or 2; their product
    is how many ranks are started. A model without guidance gains nothing from cfg=2.
    vae_encode_window: video frames encoded at once after the first, a multiple of 4. The published system
    takes 16; 4 costs little time and less than half the memory (docs/log.md).
    vae_decode_window: latent frames decoded at once. Both windows change memory, never the result; ranks that share a clip
    take as many times more frames as they are, of a strip each.
    vae_encode_batch: controls encoded side by side, each with the memory of one; the latents are those of one alone.
    vae_strips: strips of rows that the VAE cuts a picture into, one after the other, for cards with little memory: 4 take
    about a third of it at 720p for a fifth more arithmetic. Strips overlap by what the convolutions reach: no seam.
    exchange: how ranks that share tokens pass q, k, v and results on: "copies" by the copy engines, for GPUs of one host that
    can read each other's memory, else EnvironmentProblem; "collectives" (NCCL, gloo); "auto" is copies where a proof at the
    start says that they work, else collectives, and Mesh.notes why. Equal bit for bit.
    graphs: record a denoising step into a CUDA graph once per chunk and replay it; equal bit for bit. Meant for sizes so
    small that launching kernels takes longer than running them; it holds the activations of a step for the whole chunk.
    None: where that is so (graphs.pays).
    """

    device: str | None = None
    context: int = 1
    cfg: int = 1
    vae_encode_window: int = 4
    vae_decode_window: int = 1
    vae_encode_batch: int = 1
    vae_strips: int = 1
    exchange: str = "auto"
    graphs: bool | None = None

    def __post_init__(self) -> None:
        device = self.device
        if device is not None and not (isinstance(device, str) and re.fullmatch(r"cpu|cuda(:\d+)?", device)):
            raise ValueError(f"plan: device must be cpu, cuda, cuda:N or None, got {device!r}.")
        for key in ("context", "cfg"):
            value = getattr(self, key)
            if type(value) is not int or value < 1 or (key == "cfg" and value > 2):
                rule = "1 or 2, the passes of guidance" if key == "cfg" else "a positive number of ranks"
                raise ValueError(f"plan: {key} must be {rule}, got {value!r}.")
        for key, unit in (("vae_encode_window", 4), ("vae_decode_window", 1)):
            value = getattr(self, key)
            if type(value) is not int or value < unit or value % unit:
                what = (
                    "a positive multiple of 4 frames" if unit == 4 else "a positive number of latent frames"
                )
                raise ValueError(f"plan: {key} must be {what}, got {value!r}.")
        for key, what in (("vae_encode_batch", "controls"), ("vae_strips", "strips")):
            value = getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"plan: {key} must be a positive number of {what}, got {value!r}.")
        if self.vae_strips > 1 < self.context * self.cfg:
            raise ValueError(
                f"plan: vae_strips must be 1 where ranks share a clip, got {self.vae_strips}. Each takes a strip of its own."
            )
        if self.vae_strips > 1 < self.vae_encode_batch:
            raise ValueError(
                f"plan: vae_encode_batch must be 1 with vae_strips, got {self.vae_encode_batch}. One saves the memory "
                "that the other takes."
            )
        if self.exchange not in EXCHANGES:
            raise ValueError(f"plan: exchange must be one of {', '.join(EXCHANGES)}, got {self.exchange!r}.")
        if self.graphs is not None and type(self.graphs) is not bool:
            raise ValueError(f"plan: graphs must be True, False or None, got {self.graphs!r}.")
        if self.graphs and self.device == "cpu":
            raise ValueError("plan: graphs need a CUDA device, got device='cpu'. Leave graphs off.")
        if self.graphs and self.context > 1:
            raise ValueError(
                f"plan: graphs need context=1, got {self.context}. Exchanges between ranks are not recorded."
            )

    __repr__ = __str__ = _one_line

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
