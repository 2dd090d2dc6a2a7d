"""Write a checkpoint of random weights in the published file layout, for tests, demos and timing.

    python tools/make_checkpoint.py OUT --kind edge --size tiny --with-vae

Weights are scaled so that the network's output is finite and of order one. The same seed gives the same file
on the same kind of device. Prints the files or folders written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cosmos_fast.checkpoint import CONFIG_KEY
from cosmos_fast.config import NetworkConfig, published_shapes
from cosmos_fast.formats import CONTROLS
from cosmos_fast.network_keys import diffusers_names
from cosmos_fast.registry import find
from cosmos_fast.safetensors_file import write_safetensors
from cosmos_fast.vae_keys import VAEConfig, diffusers_vae_keys, vae_layout

KINDS = (*CONTROLS, "multi", "distilled")
FORMATS = ("pt", "safetensors", "diffusers", "dcp")
# Modulations near zero keep every sub-layer's share of the residual stream moderate at any depth.
MODULATION_SCALE = 0.5


def config_of(kind: str, size: str) -> NetworkConfig:
    """Sizes of a kind ("edge", ..., "multi", "distilled") at a size ("tiny" or "2b")."""
    named = {"multi": NetworkConfig.multi(), "distilled": NetworkConfig.distilled()}
    full = named.get(kind, NetworkConfig.single())
    if size == "2b":
        return full
    tiny = NetworkConfig.tiny(branches=full.branches, timestep_scale=full.timestep_scale, image_width=None)
    return replace(tiny, image_width=NetworkConfig.tiny().image_width) if full.image_width else tiny


def random_tensor(name: str, shape: tuple[int, ...], seed: str, device: str, dtype: torch.dtype) -> Tensor:
    """One weight, the same whatever else is made: its generator is seeded by `seed` and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "little"))
    noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    if name.endswith("gamma") or "_norm." in name:
        return noise.mul_(0.1).add_(1).cpu()
    if name.endswith("bias"):
        return noise.mul_(0.1).cpu()
    scale = math.prod(shape[1:]) ** -0.5
    return noise.mul_(scale * (MODULATION_SCALE if "adaln" in name else 1)).cpu()


def random_state(
    config: NetworkConfig, seed: int, control: str = "", device: str = "cpu"
) -> dict[str, Tensor]:
    """Published name -> bf16 tensor. Networks of one seed share their base; `control` varies the rest."""
    state = {}
    for name, shape in published_shapes(config).items():
        is_own = name.startswith("control_") or "img" in name
        state[name] = random_tensor(name, shape, f"{seed}{control if is_own else ''}", device, torch.bfloat16)
    return state


def extras(config: NetworkConfig) -> dict[str, Tensor]:
    """What a published .pt holds beside parameters: training counters and rotary tables."""
    axes = {"spatial": config.head_width // 6 * 2}
    axes["temporal"] = config.head_width - 2 * axes["spatial"]
    tables = {
        f"pos_embedder.dim_{axis}_range": (torch.arange(0, n, 2)[: n // 2].float() / n).bfloat16()
        for axis, n in axes.items()
    }
    counters = ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration")
    return {
        "pos_embedder.seq": torch.arange(128).bfloat16(),
        **tables,
        **{name: torch.tensor(0) for name in counters},
        "accum_train_in_hours": torch.tensor(0.0).bfloat16(),
    }


def make(
    out: Path,
    kind: str = "edge",
    size: str = "tiny",
    seed: int = 0,
    fmt: str = "pt",
    with_vae: bool = False,
    device: str | None = None,
) -> list[Path]:
    """Write the checkpoint below `out`; returns what `Engine` takes, then the VAE if one is written.

    Multi-control is four single-control files as published, or with safetensors one assembled file.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(kind, size)
    written = []
    if kind == "multi" and fmt == "pt":
        for control in CONTROLS:
            written += make(out, control, size, seed, fmt, False, device)
    elif kind == "multi" and fmt != "safetensors":
        raise SystemExit(f"make_checkpoint: multi is written as pt or safetensors, got {fmt}.")
    else:
        control = "edge" if kind == "distilled" else kind
        written.append(_write(out, kind, fmt, config, random_state(config, seed, control, device)))
    if with_vae:
        written.append(
            _write_vae(out, fmt, VAEConfig.tiny() if size == "tiny" else VAEConfig(), seed, device)
        )
    return written


def _write(out: Path, kind: str, fmt: str, config: NetworkConfig, state: dict[str, Tensor]) -> Path:
    if fmt == "diffusers":
        return _write_diffusers(out, config, state)
    if fmt == "dcp":
        return _write_dcp(out / f"{kind}_dcp" / "model", state)
    published = find("edge/distilled" if kind == "distilled" else kind)
    path = out / (published.file if published else f"general/multi/{kind}_ema_bf16.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {f"net.{name}": tensor for name, tensor in state.items()}
    if fmt == "safetensors":
        metadata = {"format": "pt", CONFIG_KEY: config.to_json()}
        return write_safetensors(path.with_suffix(".safetensors"), named, metadata)
    named |= {f"net.{name}": tensor for name, tensor in extras(config).items()}
    # Token counts of a tiny network cannot be read from its shapes; a full-size file needs no such note.
    note = {} if config.width == NetworkConfig().width else {CONFIG_KEY: config.to_json()}
    torch.save(named | note, path)
    return path


def _write_dcp(folder: Path, state: dict[str, Tensor]) -> Path:
    import torch.distributed.checkpoint as dcp

    raw = {f"net.{name}": tensor + 1 for name, tensor in state.items()}
    averaged = {f"net_ema.{name}": tensor.float() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(raw | averaged, checkpoint_id=folder, no_dist=True)
    return folder


def _diffusers_configs(config: NetworkConfig) -> Iterator[tuple[str, dict[str, object]]]:
    shared = {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_width,
        "mlp_ratio": float(config.mlp_ratio),
        "text_embed_dim": config.text_dim,
        "adaln_lora_dim": config.adaln_rank,
        "max_size": [128, 240, 240],
        "patch_size": [1, 2, 2],
        "rope_scale": [1.0, 3.0, 3.0],
        "extra_pos_embed_type": None,
        "img_context_dim_in": config.image_width,
        "img_context_dim_out": config.width,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": config.text_width,
        "encoder_hidden_states_channels": config.text_dim,
    }
    yield (
        "transformer",
        {
            "_class_name": "CosmosTransformer3DModel",
            **shared,
            "in_channels": config.latent_channels + 1,
            "out_channels": config.latent_channels,
            "num_layers": config.blocks,
            "concat_padding_mask": True,
            "controlnet_block_every_n": config.control_every,
            "img_context_num_tokens": config.image_tokens,
        },
    )
    yield (
        "controlnet",
        {
            "_class_name": "CosmosControlNetModel",
            **shared,
            "n_controlnet_blocks": config.num_control_blocks,
            "in_channels": config.control_in // 4,
            "latent_channels": config.patch_in // 4,
            "model_channels": config.width,
        },
    )


def _write_diffusers(out: Path, config: NetworkConfig, state: dict[str, Tensor]) -> Path:
    for component, values in _diffusers_configs(config):
        folder = out / component
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensors = {
            name: tensor
            for published, tensor in state.items()
            for place, name in diffusers_names(published)
            if place == component
        }
        metadata = {"format": "pt", CONFIG_KEY: config.to_json()}
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, metadata)
    return out


def _write_vae(out: Path, fmt: str, config: VAEConfig, seed: int, device: str) -> Path:
    state = {
        name: random_tensor(name, shape, f"vae{seed}", device, torch.float32)
        for name, shape in vae_layout(config).items()
    }
    out.mkdir(parents=True, exist_ok=True)
    if fmt == "diffusers":
        named = {theirs: state[ours] for theirs, ours in diffusers_vae_keys(config).items()}
        (out / "vae").mkdir(exist_ok=True)
        values = {"_class_name": "AutoencoderKLWan", "base_dim": config.base, "z_dim": config.latent_channels}
        (out / "vae" / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        path = write_safetensors(out / "vae" / "diffusion_pytorch_model.safetensors", named, {"format": "pt"})
        return path.parent
    if fmt == "safetensors":
        return write_safetensors(out / "tokenizer.safetensors", state, {"format": "pt"})
    torch.save(state, out / "tokenizer.pth")
    return out / "tokenizer.pth"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write below")
    parser.add_argument("--kind", choices=KINDS, default="edge")
    parser.add_argument("--size", choices=("tiny", "2b"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, default="pt")
    parser.add_argument("--with-vae", action="store_true", help="also write a VAE of matching size")
    parser.add_argument("--device", help="where to draw the numbers: cpu or cuda (default: cuda if present)")
    args = parser.parse_args(argv)
    for path in make(args.out, args.kind, args.size, args.seed, args.format, args.with_vae, args.device):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
