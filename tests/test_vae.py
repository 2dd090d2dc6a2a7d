"""The video VAE against diffusers' implementation of the same model, and the exactness of streaming."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import pytest
import torch
from conv_flop import MAPPING
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cosmos_fast.convolution import rms_silu, upsample2x
from cosmos_fast.vae import (
    VAE,
    Attention,
    Down,
    Residual,
    Stream,
    Up,
    VAEConfig,
    channels_last_,
    flops,
    frames_like,
    latent_statistics,
    memory_estimate,
    windows,
)
from cosmos_fast.vae_keys import diffusers_vae_keys, vae_history, vae_layout

TINY = VAEConfig.tiny()
HEIGHT, WIDTH = 24, 32  # not square, and an odd number of latent rows
BOUND = 2e-5
FRAMES = (1, 5, 9, 17, 21, 33)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle():
    """diffusers' class with weights that give latents and pixels of natural size."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKLWan(base_dim=TINY.base).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("gamma"):
            weight.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.1 * noise)
        else:
            weight.copy_(noise * 1.3 * weight[0].numel() ** -0.5)
    model.decoder.conv_out.weight.mul_(0.25)
    return model


@pytest.fixture(scope="module")
def vae(oracle) -> VAE:
    ours = VAE(TINY)
    names = diffusers_vae_keys(TINY)
    ours.load_state_dict({names[key]: value for key, value in oracle.state_dict().items()})
    return ours


def clip(frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, frames, HEIGHT, WIDTH, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def expected(oracle) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Per frame count: clip, normalised latents, and pixels decoded from those latents, by diffusers."""
    mean = torch.tensor(TINY.mean).bfloat16()
    gain = (1 / torch.tensor(TINY.std).bfloat16()).float().view(-1, 1, 1, 1)
    mean = mean.float().view(-1, 1, 1, 1)
    table = {}
    with torch.no_grad():
        for frames in FRAMES:
            x = clip(frames)
            mu = oracle.encode(x).latent_dist.mode()
            table[frames] = x, (mu - mean) * gain, oracle.decode(mu).sample
    return table


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("frames", FRAMES)
def test_encode_equals_diffusers_in_every_window(vae, expected, frames):
    x, z, _ = expected[frames]
    assert z.std() > 0.3, "the oracle's latents must carry signal for the bound to mean anything"
    for window in {17: (4, None), 21: (8, 16), 33: (16, None)}.get(frames, (4, 8, 16, None)):
        assert error(vae.encode(x, window), z) <= BOUND, window
    assert z.shape == (1, 16, 1 + (frames - 1) // 4, HEIGHT // 8, WIDTH // 8)


@pytest.mark.parametrize("frames", FRAMES)
def test_decode_equals_diffusers_in_every_window(vae, expected, frames):
    _, z, pixels = expected[frames]
    assert pixels.std() > 0.05 and pixels.abs().max() < 1, "nothing may touch diffusers' clamp here"
    for window in {17: (2, None), 21: (1, 3), 33: (1,)}.get(frames, (1, 2, 3, None)):
        assert error(vae.decode(z, window), pixels) <= BOUND, window


def test_decode_does_not_clamp(vae, oracle, expected):
    _, z, _ = expected[5]
    mean, gain = latent_statistics(TINY, z)
    head = oracle.decoder.conv_out.weight
    before = head.clone()
    loud = VAE(TINY)
    loud.load_state_dict(vae.state_dict())
    try:
        head.mul_(20)
        loud.decoder.head["2"].weight.mul_(20)
        clamped = oracle.decode(z / gain + mean).sample
    finally:
        head.copy_(before)
    ours = loud.decode(z)
    assert ours.abs().max() > 1.5
    assert error(ours.clamp(-1, 1), clamped) <= 20 * BOUND


def visible_first_frame(self, x, stream):
    """Temporal up with frame 0 in the conv's history, its own output replaced afterwards."""
    return faulty_up(self, x, stream, drop=None)


def dropped_first_frame(self, x, stream):
    """Temporal up on every frame, the first of all outputs dropped."""
    return faulty_up(self, x, stream, drop=1)


def faulty_up(self, x, stream, drop):
    if self.time_conv is not None:
        y = self.time_conv(stream.extend(self.time_conv, x))
        y = y.unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3).flatten(2, 3)
        if stream.first:
            y = y[:, :, 1:] if drop else torch.cat((x[:, :, :1], y[:, :, 2:]), 2)
        x = y
    big = upsample2x(x, frames_like(x, (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])))
    flat = big.transpose(1, 2).flatten(0, 1)
    return self.resample["1"](flat).unflatten(0, (1, -1)).transpose(1, 2)


def strided_first_frame(self, x, stream):
    """Temporal down as a plain causal strided conv, frame 0 included."""
    flat = torch.nn.functional.pad(x.transpose(1, 2).flatten(0, 1), (0, 1, 0, 1))
    x = self.resample["1"](flat).unflatten(0, (1, -1)).transpose(1, 2)
    return x if self.time_conv is None else self.time_conv(stream.extend(self.time_conv, x))


def space_only(self, x, stream):
    """No temporal resampling at all."""
    plain = copy(self)
    plain._modules = dict(self._modules, time_conv=None)
    return ORIGINAL[type(self)](plain, x, stream)


ORIGINAL = {Up: Up.forward, Down: Down.forward}


@pytest.mark.parametrize("fault", [visible_first_frame, dropped_first_frame])
def test_a_plausible_mistake_in_temporal_up_is_far_outside_the_bound(vae, expected, monkeypatch, fault):
    _, z, pixels = expected[17]
    monkeypatch.setattr(Up, "forward", fault)
    wrong = vae.decode(z, None)
    assert error(wrong[:, :, :1], pixels[:, :, :1]) > BOUND or fault is visible_first_frame
    assert error(wrong[:, :, 1:], pixels[:, :, 1:]) > 1000 * BOUND


def test_a_plausible_mistake_in_temporal_down_is_far_outside_the_bound(vae, expected, monkeypatch):
    x, z, _ = expected[17]
    monkeypatch.setattr(Down, "forward", strided_first_frame)
    assert error(vae.encode(x, None), z) > 1000 * BOUND


def test_leaving_out_temporal_resampling_changes_the_frame_count(vae, expected, monkeypatch):
    x, z, pixels = expected[17]
    monkeypatch.setattr(Down, "forward", space_only)
    monkeypatch.setattr(Up, "forward", space_only)
    assert vae.encode(x, None).shape[2] == 17 != z.shape[2]
    assert sum(part.shape[2] for part in vae.decode_stream(z, None)) == 5 != pixels.shape[2]


def test_streams_equal_the_whole_and_yield_as_they_go(vae, expected):
    x, z, pixels = expected[21]
    parts = list(vae.decode_stream(z, 2))
    assert [part.shape[2] for part in parts] == [1, 8, 8, 4]
    assert error(torch.cat(parts, 2), pixels) <= BOUND
    given: list[int] = []

    def source():
        for start, stop in ((0, 5), (5, 9), (9, 21)):
            given.append(start)
            yield x[:, :, start:stop]

    latents = vae.encode_stream(source())
    assert given == []
    assert next(latents).shape[2] == 2 and given == [0]
    rest = list(latents)
    assert [part.shape[2] for part in rest] == [1, 3]
    assert error(torch.cat(rest, 2), z[:, :, 2:]) <= BOUND


def test_two_passes_at_once_do_not_touch_each_other(vae, expected):
    _, z, pixels = expected[9]
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
    attributes = {name: set(vars(module)) for name, module in vae.named_modules()}
    alone = list(vae.decode_stream(other))
    together = list(zip(vae.decode_stream(z), vae.decode_stream(other), strict=True))
    assert error(torch.cat([a for a, _ in together], 2), pixels) <= BOUND
    assert all(torch.equal(b, c) for (_, b), c in zip(together, alone, strict=True))
    assert attributes == {name: set(vars(module)) for name, module in vae.named_modules()}


def test_a_batch_is_its_clips(vae, expected):
    x, z, pixels = expected[9]
    pair = torch.cat((clip(9, seed=3), x))
    assert error(vae.encode(pair, 4)[1:], z) <= BOUND
    assert error(vae.decode(torch.cat((-z, z)))[1:], pixels) <= BOUND


@pytest.mark.parametrize("changed", [1, 9, 16])
def test_latents_depend_on_no_later_frame(vae, changed):
    x = clip(17)
    z = vae.encode(x, 4)
    x[:, :, changed] = clip(1, seed=9)[:, :, 0]
    touched = (vae.encode(x, 4) - z).abs().amax(dim=(0, 1, 3, 4)) > 0
    first = 1 + (changed - 1) // 4
    assert touched.tolist() == [False] * first + [True] * (5 - first)


def test_latent_0_is_frame_0_alone(vae, expected):
    x, z, _ = expected[33]
    assert error(vae.encode(x[:, :, :1]), z[:, :, :1]) <= BOUND


def test_channels_last_gives_the_same_numbers_and_stays_channels_last(vae, expected):
    x, z, pixels = expected[9]
    fast = channels_last_(VAE(TINY))
    fast.load_state_dict(vae.state_dict())
    layout = torch.channels_last_3d
    assert fast.encoder.conv1.weight.is_contiguous(memory_format=layout)
    assert error(fast.encode(x.contiguous(memory_format=layout), 4), z) <= BOUND
    assert error(vae.encode(x.contiguous(memory_format=layout), 4), z) <= BOUND
    assert error(fast.decode(z), pixels) <= BOUND
    seen = []
    for side in (fast.encoder, fast.decoder):
        for module in side.modules():
            if isinstance(module, (Residual, Attention, Up, Down, torch.nn.Conv3d)):
                module.register_forward_hook(lambda module, args, y: seen.append(y.stride(1)))
    # In bf16, because torch's own fp32 conv for one CPU thread returns rows whatever it is given.
    fast.bfloat16()
    fast.decode(fast.encode(x, None), 2)
    assert len(seen) > 100 and set(seen) == {1}


def test_bf16_stays_within_the_error_of_bf16_arithmetic(vae, expected):
    x, z, pixels = expected[17]
    low = VAE(TINY).bfloat16()
    low.load_state_dict(vae.state_dict())
    latents = low.encode(x)
    decoded = low.decode(z)
    assert latents.dtype == decoded.dtype == torch.bfloat16
    assert relative(latents, z) < 0.02
    assert relative(decoded, pixels) < 0.05
    again = low.decode(z, 2)
    assert relative(again, pixels) < 0.05


def test_latent_statistics_are_the_rounded_ones():
    mean, gain = latent_statistics(VAEConfig(), torch.empty(0, dtype=torch.float32))
    # fmt: off
    rounded_mean = [-0.757812, -0.707031, -0.910156, 0.107422, -0.174805, 0.964844, -0.151367, 1.554688,
                    0.414062, -0.071289, 0.550781, -0.363281, -0.192383, -0.949219, 0.25, -0.292969]
    rounded_gain = [0.3554688, 0.6875, 0.4296875, 0.3769531, 0.8203125, 0.5625, 0.3828125, 0.4804688,
                    0.3066406, 0.4628906, 0.3496094, 0.6445312, 0.609375, 0.890625, 0.3535156, 0.5234375]
    # fmt: on
    assert mean.flatten().tolist() == pytest.approx(rounded_mean, abs=1e-6)
    assert gain.flatten().tolist() == pytest.approx(rounded_gain, abs=1e-7)
    low_mean, low_gain = latent_statistics(VAEConfig(), torch.empty(0, dtype=torch.bfloat16))
    assert torch.equal(low_mean.float(), mean) and torch.equal(low_gain.float(), gain)


def published() -> list[tuple[str, tuple[int, ...], str]]:
    lines = (Path(__file__).parent / "golden" / "vae_tensors.txt").read_text().splitlines()
    rows = (line.split() for line in lines if not line.startswith("#"))
    return [(key, tuple(map(int, shape.split("x"))), theirs) for key, shape, theirs in rows]


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        full = VAE()
    shapes = {key: tuple(value.shape) for key, value in full.state_dict().items()}
    rows = published()
    assert len(shapes) == len(rows) == 194
    assert shapes == {key: shape for key, shape, _ in rows} == vae_layout()
    assert diffusers_vae_keys() == {theirs: key for key, _, theirs in rows}
    assert sum(value.numel() for value in full.parameters()) == 126_892_531
    assert not any(value.requires_grad for value in full.parameters())


def test_layout_of_the_tiny_model_matches_its_modules(vae):
    assert vae_layout(TINY) == {key: tuple(value.shape) for key, value in vae.state_dict().items()}


@pytest.mark.parametrize(
    ("frames", "height", "width", "encode", "decode"),
    [
        (93, 704, 1280, 428.06, 717.10),
        (93, 960, 960, 437.96, 733.57),
        (93, 704, 960, 319.67, 536.45),
        (93, 432, 768, 155.90, 262.32),
        (93, 480, 832, 187.90, 316.00),
        (29, 704, 1280, 134.66, 225.20),
        (1, 704, 1280, 6.30, 9.99),
    ],
)
def test_flops_of_the_published_model(frames, height, width, encode, decode):
    counted = flops(VAEConfig(), frames, height, width)
    assert [value / 1e12 for value in counted] == pytest.approx([encode, decode], abs=0.006)


def test_flops_are_those_that_run(vae, expected):
    x, z, _ = expected[17]
    counts = []
    for run in (lambda: vae.encode(x, 4), lambda: vae.decode(z, 2)):
        with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
            run()
        counts.append(counter.get_total_flops())
    # The counter knows nothing of the attention kernel on CPU: 5 frames, 2 products of L x L x width.
    attention = 5 * 2 * 2 * (HEIGHT // 8 * WIDTH // 8) ** 2 * TINY.top
    assert [count + attention for count in counts] == list(flops(TINY, 17, HEIGHT, WIDTH))


def test_histories_are_of_the_known_size_and_stay_where_they_are(vae):
    known = vae_history(HEIGHT, WIDTH, TINY)
    for module, x, size in (
        (vae.encoder, clip(1), known[0]),
        (vae.decoder, torch.randn(1, 16, 1, HEIGHT // 8, WIDTH // 8), known[1]),
    ):
        stream = Stream()
        module(x, stream)
        stream.first = False
        x = x.repeat(1, 1, 4 if module is vae.encoder else 1, 1, 1)
        module(x, stream)
        places = [past.data_ptr() for past in stream._past.values()]
        assert stream.nbytes == 4 * size
        module(x, stream)
        assert places == [past.data_ptr() for past in stream._past.values()]
    forgetful = Stream(keep=False)
    vae.encoder(clip(5), forgetful)
    assert forgetful.nbytes == 0


def test_memory_estimate_of_720p():
    gib = [value / 2**30 for value in memory_estimate(VAEConfig(), 704, 1280, 16, 1, torch.bfloat16)]
    # Below what separate norm, pad and concat steps take at the same windows (14.1 and 8.0), above histories.
    assert 2.36 < gib[0] < 14.1 and 3.97 < gib[1] < 8.0
    wider = memory_estimate(VAEConfig(), 704, 1280, 32, 2, torch.bfloat16)
    assert wider[0] > gib[0] * 2**30 and wider[1] > gib[1] * 2**30


def test_windows_start_with_element_0_alone():
    assert windows(93, 16) == [(0, 1), (1, 17), (17, 33), (33, 49), (49, 65), (65, 81), (81, 93)]
    assert windows(3, 1) == [(0, 1), (1, 2), (2, 3)]
    assert windows(1, 16) == [(0, 1)]
    assert windows(9, None) == [(0, 9)]


def test_rms_silu_of_zero_is_zero_and_of_huge_is_finite():
    x = torch.zeros(1, 8, 1, 2, 2, dtype=torch.bfloat16)
    x[..., 0, 0] = 3e38
    y = rms_silu(x, torch.ones(8, 1, 1, 1, dtype=torch.bfloat16), torch.empty_like(x))
    assert torch.isfinite(y).all() and (y[..., 1, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_copies_bits_in_both_layouts(dtype):
    x = torch.randn(2, 4, 3, 5, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    doubled = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        given = x.contiguous(memory_format=layout)
        out = upsample2x(given, frames_like(given, doubled.shape))
        assert torch.equal(out, doubled) and out.is_contiguous(memory_format=layout)


def test_runs_in_inference_mode(vae, expected):
    x, z, _ = expected[5]
    with torch.inference_mode():
        assert error(vae.encode(x), z) <= BOUND
        assert vae.decode(z).shape == x.shape
    assert not vae.encode(x).requires_grad


@pytest.mark.parametrize("frames", [2, 3, 4, 7, 92])
def test_a_clip_of_another_length_is_refused(vae, frames):
    with pytest.raises(ValueError, match=rf"frames must be 4k\+1, got {frames}\. "):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 20, 16), "multiples of 8, got 20x16"),
        ((1, 3, 5, 16, 12), "multiples of 8, got 16x12"),
        ((3, 5, 16, 16), r"got \(3, 5, 16, 16\)"),
        ((1, 4, 5, 16, 16), r"\(B, 3, frames"),
        ((1, 3, 0, 16, 16), "not empty"),
    ],
)
def test_pixels_of_another_shape_are_refused(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_other_faults_are_refused(vae):
    x = torch.zeros(1, 3, 5, 16, 16)
    with pytest.raises(ValueError, match="floating point"):
        vae.encode(x.to(torch.uint8))
    for window in (0, 1, 6, -4):
        with pytest.raises(ValueError, match=f"multiple of 4 frames, got {window}"):
            vae.encode(x, window)
    with pytest.raises(ValueError, match="at least 1 latent frame, got 0"):
        vae.decode_stream(torch.zeros(1, 16, 2, 2, 2), 0)
    with pytest.raises(ValueError, match=r"\(B, 16, frames"):
        vae.decode(torch.zeros(1, 4, 2, 2, 2))
    with pytest.raises(ValueError, match="parts after the first must have 4k frames, got 5"):
        list(vae.encode_stream([x, x]))
    with pytest.raises(ValueError, match="must share batch, height and width"):
        list(vae.encode_stream([x, torch.zeros(1, 3, 4, 16, 24)]))
    with pytest.raises(ValueError, match="mean and std must have 8 numbers, got 16 and 16"):
        VAEConfig(latent_channels=8)
    with pytest.raises(ValueError, match="temporal must have 3 flags, got 2"):
        VAEConfig(temporal=(True, True))
