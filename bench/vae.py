"""What the sections of tools/bench_vae.py share: our VAE and diffusers' with the same weights, stages, a natural clip."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import roofline
import torch
import torch.nn.functional as F
from denoiser import Bench, Call
from peers import absent
from published import gib
from records import ROOT
from torch import Tensor, nn
from watch import Watch

from cosmos_fast import dispatch
from cosmos_fast.vae import VAE, VAEConfig, channels_last_, latent_statistics
from cosmos_fast.vae_keys import (
    Block,
    Conv,
    block_convs,
    decoder_blocks,
    diffusers_vae_keys,
    encoder_blocks,
    vae_layout,
)

SIZE, SMOKE_SIZE = (93, 704, 1280), (9, 32, 48)
SMALL, CPU_SMALL, SMOKE_SMALL = (17, 352, 640), (9, 96, 160), (5, 24, 32)
PARTS = ("encode", "decode")


def random_state(config: VAEConfig, device: torch.device, seed: int = 1) -> dict[str, Tensor]:
    """Our names -> fp32 weights that give latents and pixels of natural size."""
    generator = torch.Generator(device=device).manual_seed(seed)
    state = {}
    for name, shape in vae_layout(config).items():
        noise = torch.randn(shape, generator=generator, device=device)
        if name.endswith("gamma"):
            state[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            state[name] = 0.1 * noise
        else:
            state[name] = noise * 1.3 * noise[0].numel() ** -0.5
    state["decoder.head.2.weight"] *= 0.25  # pixels stay inside diffusers' clamp
    return state


def build(config: VAEConfig, state: dict[str, Tensor], dtype: torch.dtype) -> VAE:
    with torch.device("meta"):
        vae = VAE(config)
    vae.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, assign=True)
    return channels_last_(vae.eval().requires_grad_(False))


UNUSED_BY_PEER = ("transformer_engine", "peft", "xformers")
"""What diffusers imports if it is installed and its VAE has no use for; Transformer Engine may bring another cuDNN along."""


def import_peer() -> str | None:
    """Import diffusers' VAE before anything else can import what is optional to both; why that fails, or None."""
    hidden = [name for name in UNUSED_BY_PEER if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: as if it were not installed
    try:
        from diffusers import AutoencoderKLWan

        assert AutoencoderKLWan
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
    return None


class Diffusers:
    """`AutoencoderKLWan` with our weights, normalised latents in and out as ours has them; pixels are clamped."""

    def __init__(
        self, config: VAEConfig, state: dict[str, Tensor], dtype: torch.dtype, is_last: bool
    ) -> None:
        with absent("transformer_engine"):
            from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            self.net = AutoencoderKLWan(base_dim=config.base, z_dim=config.latent_channels)
        named = {theirs: state[ours].to(dtype) for theirs, ours in diffusers_vae_keys(config).items()}
        self.net.load_state_dict(named, strict=True, assign=True)
        self.net.eval().requires_grad_(False)
        self.is_last = is_last
        if is_last:
            channels_last_(self.net)  # type: ignore[arg-type]  # it takes every conv weight of any module
        self.statistics = latent_statistics(config, next(self.net.parameters()))

    def encode(self, x: Tensor) -> Tensor:
        mean, gain = self.statistics
        return (self.net.encode(self._layout(x)).latent_dist.mode() - mean) * gain

    def decode(self, z: Tensor) -> Tensor:
        mean, gain = self.statistics
        return self.net.decode(self._layout(z / gain + mean)).sample

    def _layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d) if self.is_last else x


def natural(frames: int, height: int, width: int, device: torch.device, seed: int = 0) -> Tensor:
    """A clip (1, 3, F, H, W) in [-1, 1] with the spectrum of a picture, panning, with a little noise on every frame."""
    generator = torch.Generator(device=device).manual_seed(seed)
    wide = torch.zeros(1, 3, height, width + 4 * frames, device=device)
    for octave in range(1, 8):
        size = (2 + (height >> octave), 2 + (wide.shape[3] >> octave))
        noise = torch.randn(1, 3, *size, generator=generator, device=device)
        wide += F.interpolate(noise, wide.shape[2:], mode="bicubic") * 2.0 ** (0.8 * octave)
    wide = torch.tanh(wide / wide.std() * 0.7)
    clip = torch.stack([wide[..., 4 * f : 4 * f + width] for f in range(frames)], dim=2)
    return (clip + 0.02 * torch.randn(clip.shape, generator=generator, device=device)).clamp_(-1, 1)


def compile_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Compile the convs of the clip side by side, before this process touches the GPU: one by one they take a minute."""
    if args.smoke or args.device == "cpu" or not args.workers:
        return {}
    from vae_layers import compiled, ends, in_codes, layers, tiles_of

    start = time.perf_counter()
    both = [*layers(), *ends(), *in_codes(layers())]
    found = [replace(layer, residual=given) for layer in both for given in {layer.residual, False}]
    faults = compiled([(layer, tiles_of(layer)) for layer in found], args.workers, "cuda", start + 45)
    seconds = time.perf_counter() - start
    print(f"{len(found)} kernels compiled in {seconds:.1f} s, {len(faults)} failed", flush=True)
    return {
        "seconds": seconds,
        "workers": args.workers,
        "faults": {found[i].name: why for i, why in faults.items()},
    }


def told(value: object) -> str:
    """An argument for the record; files of the checkout by their place in it."""
    inside = isinstance(value, Path) and value.is_relative_to(ROOT)
    return str(value.relative_to(ROOT) if inside else value)  # type: ignore[attr-defined]


class VAEBench(Bench):
    """Times and records as `Bench` does; what it measures is a VAE."""

    def __init__(self, args: argparse.Namespace, environment: dict[str, Any]) -> None:
        self.args, self.started = args, time.perf_counter()
        self.device = dispatch.pick_device("cpu" if args.smoke else args.device)
        self.config: Any = VAEConfig(base=8) if args.smoke else VAEConfig()
        self.size, self.small = (SMOKE_SIZE, SMOKE_SMALL) if args.smoke else (SIZE, SMALL)
        if args.device == "cpu" and not args.smoke:
            self.small = CPU_SMALL
        self.watch = Watch()
        self.peaks: roofline.Peaks | None = None
        self.record: dict[str, Any] = {
            "kind": "vae", "environment": environment,
            "args": {k: told(v) for k, v in vars(args).items() if k != "out"}, "sections": {}, "cases": {},
        }  # fmt: skip

    def build(self) -> None:
        self.state = random_state(self.config, self.device)
        self.vae = build(self.config, self.state, torch.bfloat16)
        from cosmos_fast import ops_vae  # its ops enter the table when it is imported

        assert ops_vae
        rows = dispatch.explain(self.device, torch.bfloat16)
        self.record["ops"] = [{"op": op, "chosen": name, "others": why} for op, name, why in rows]
        self.record["weights_gib"] = gib(
            sum(w.numel() * w.element_size() for w in self.vae.state_dict().values())
        )
        self.record["input"] = "random weights; noise with the spectrum of a picture, panning"

    def clip(self, size: tuple[int, int, int] | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return natural(*(size or self.size), self.device).to(dtype)

    def latent(self, size: tuple[int, int, int] | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        frames, height, width = size or self.size
        generator = torch.Generator(device=self.device).manual_seed(3)
        shape = (1, self.config.latent_channels, 1 + (frames - 1) // 4, height // 8, width // 8)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def measured(self, call: Call) -> dict[str, float]:
        """Seconds of one call; on a GPU also the GiB held before it, its input among them, and the most held during it."""
        gc.collect()
        if self.device.type != "cuda":
            return {"seconds": self.timed(call)}
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds = self.timed(call)
        peak = torch.cuda.max_memory_allocated()
        return {"seconds": seconds, "resident_gib": gib(before), "peak_gib": gib(peak)}

    def decode_all(self, z: Tensor, window: int, vae: VAE | None = None) -> Call:
        """A decode as a clip makes it: every window is used and dropped. vae: another than the one that is measured."""

        def call() -> None:
            for part in (vae or self.vae).decode_stream(z, window):
                del part

        return call

    def row(self, row: dict[str, Any], flop: float, memory: dict[str, float]) -> dict[str, Any]:
        row |= {"tflop_s": flop / row["median_s"] / 1e12} | memory
        if self.peaks is not None:
            row["gemm_peak_pct"] = 100 * row["tflop_s"] / self.peaks.bf16_tflop_s
        if memory:  # what the call itself holds: nothing else is on the device but weights, inputs and peers
            row["own_peak_gib"] = memory["peak_gib"] - memory["resident_gib"] + self.record["weights_gib"]
        return row


# --- stages ----------------------------------------------------------------------------------------


def stages(vae: VAE, part: str, size: tuple[int, int, int]) -> dict[str, tuple[list[nn.Module], float]]:
    """Stage -> its modules, and FLOP for a clip. A stage is what runs at one height; norms before heads are in none."""
    frames, height, width = size
    config, h, w = vae.config, height // vae.config.spatial, width // vae.config.spatial
    T = 1 + (frames - 1) // config.stride
    side: Any = vae.encoder if part == "encode" else vae.decoder
    numbered = side.downsamples if part == "encode" else side.upsamples
    blocks = encoder_blocks(config) if part == "encode" else decoder_blocks(config)
    count, pixels = (frames, height * width) if part == "encode" else (T, h * w)
    found: dict[str, tuple[list[nn.Module], float]] = {}

    def flop(convs: list[Conv]) -> float:
        return sum(2.0 * c.width * c.out * c.taps * c.after for c in convs)

    def add(name: str, module: nn.Module, work: float) -> None:
        modules, before = found.get(name, ([], 0.0))
        found[name] = ([*modules, module], before + work)

    def middle() -> None:
        both = flop(block_convs(Block("residual", config.top, config.top), T, 1, h * w)[0])
        for module in side.middle:
            attention = 8.0 * T * h * w * config.top**2 + 4.0 * T * (h * w) ** 2 * config.top
            add("middle", module, both if hasattr(module, "residual") else attention)

    first = (3, config.bottom) if part == "encode" else (config.latent_channels, config.top)
    add("first conv", side.conv1, 54.0 * first[0] * first[1] * count * pixels)
    if part == "decode":
        middle()
    for module, block in zip(numbered, blocks, strict=True):
        rows = round((pixels * height / width) ** 0.5)
        convs, count, pixels = block_convs(block, count, 1, pixels)
        add(f"{rows} rows" + ("" if block.kind == "residual" else f", {block.kind}"), module, flop(convs))
    if part == "encode":
        middle()
    last = (config.top, 2 * config.latent_channels) if part == "encode" else (config.bottom, 3)
    add("last conv", side.head["2"], 54.0 * last[0] * last[1] * count * pixels)
    return found


@contextmanager
def timed_stages(found: dict[str, tuple[list[nn.Module], float]]) -> Iterator[dict[str, list[Any]]]:
    """While it lasts, events at both ends of every stage's modules: stage -> [(start, end), ...]."""
    marks: dict[str, list[Any]] = {name: [] for name in found}
    hooks = []

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for name, (modules, _) in found.items():
        for module in modules:
            hooks.append(
                module.register_forward_pre_hook(lambda m, a, name=name: marks[name].append([mark()]))
            )
            hooks.append(
                module.register_forward_hook(lambda m, a, y, name=name: marks[name][-1].append(mark()))
            )
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
