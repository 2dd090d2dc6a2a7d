"""What a clip costs: FLOP of a network call and of the VAE, parameters, and an estimate of peak memory.

FLOP count two per multiply-add, matrix products and convolutions only. Letters: L tokens, D width, S text
tokens, T latent frames. Standard library only; nothing is measured here.
"""

from __future__ import annotations

from math import prod

from .config import NetworkConfig, published_shapes
from .formats import PATCH, SPATIAL, TEMPORAL
from .recipe import Plan, Recipe
from .vae_keys import vae_flops, vae_layout
from .vae_rows import strip_memory

VAE_PARAMETERS = sum(prod(shape) for shape in vae_layout().values())

MEMORY_FORMULA = (
    "estimate, not a measurement: weights (network + VAE) + the largest of "
    "denoise = (3 + 2 * mlp_ratio + control blocks) * L * D + 2 prompts, "
    "encode, decode = histories of the VAE's convs + input, history, output and skip of its widest conv, in windows and "
    "strips of rows as planned"
)


def tokens(frames: int, width: int, height: int) -> int:
    """Tokens L of one chunk of `frames` video frames at width x height pixels."""
    latent_frames = 1 + (frames - 1) // TEMPORAL
    return latent_frames * (width // (SPATIAL * PATCH)) * (height // (SPATIAL * PATCH))


def network_flop(length: int, config: NetworkConfig, active: int = 1) -> float:
    """FLOP of one denoiser call on `length` tokens with `active` control branches."""
    n, d = float(length), float(config.width)
    block = 8 * n * d * d + 4 * n * n * d  # self-attention: projections, then scores and sums
    block += 4 * n * d * d + 4 * n * config.text_tokens * d + 4 * config.text_tokens * config.text_dim * d
    if config.image_width is not None:
        block += 2 * n * d * d + 4 * n * config.image_tokens * d + 4 * config.image_tokens * d * d
    block += 4 * config.mlp_ratio * n * d * d
    block += (
        3 * 2 * (d * config.adaln_rank + config.adaln_rank * 3 * d)
    )  # modulation, per latent frame: small
    branch = config.num_control_blocks * (block + 2 * n * d * d) + 2 * n * d * d
    ends = 2 * n * d * (config.patch_in + active * config.control_in + config.patch_out)
    ends += 2.0 * config.text_tokens * config.text_width * config.text_dim
    return config.blocks * block + active * branch + ends


def vae_encode_flop(frames: int, width: int, height: int) -> float:
    """FLOP to encode `frames` video frames with the published VAE."""
    return vae_flops(frames, height, width)[0]


def vae_decode_flop(frames: int, width: int, height: int) -> float:
    """FLOP to decode the latents of `frames` video frames with the published VAE."""
    return vae_flops(frames, height, width)[1]


def parameters(config: NetworkConfig) -> int:
    """Parameters of one network, all its control branches included."""
    return sum(prod(shape) for shape in published_shapes(config).values())


def network_bytes(config: NetworkConfig, recipe: Recipe) -> int:
    """Bytes of one network's weights: in 8 bits the matrices of `fp8_weights`, with 4 bytes a row, where the recipe has them."""
    size, codes = 4 if recipe.dtype == "fp32" else 2, set()
    if recipe.linear != "bf16":
        from .fp8_weights import published_matrices  # needs torch, which costs are known without

        codes = published_matrices(config)
    shapes = published_shapes(config).items()
    return sum(prod(s) + 4 * s[0] if name in codes else prod(s) * size for name, s in shapes)


def memory_bytes(
    config: NetworkConfig, recipe: Recipe, plan: Plan, frames: int, width: int, height: int
) -> dict[str, int]:
    """Estimated device bytes: "weights", then for each stage the peak with weights. See MEMORY_FORMULA."""
    size = 4 if recipe.dtype == "fp32" else 2
    weights = network_bytes(config, recipe) + VAE_PARAMETERS * size
    live = 3 + 2 * config.mlp_ratio + config.num_control_blocks
    denoise = live * tokens(frames, width, height) * config.width * size
    denoise += 2 * config.text_tokens * config.text_width * size
    encode_window = max(min(plan.vae_encode_window, frames - 1), TEMPORAL)
    decode_window = min(plan.vae_decode_window, 1 + (frames - 1) // TEMPORAL)
    encode, decode = strip_memory(height, width, encode_window, decode_window, plan.vae_strips)
    return {
        "weights": weights,
        "encode": weights + encode * size,
        "denoise": weights + denoise,
        "decode": weights + decode * size,
    }
