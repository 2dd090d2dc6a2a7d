"""The VAE in 8 bits: the bound that makes its steps, what changes and what does not, the proof, and a clip end to end."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import system  # noqa: E402
from published import relative_l2  # noqa: E402

from cosmos_fast import ops_vae, reference, testing, vae_fp8, vae_strips  # noqa: E402
from cosmos_fast.dispatch import TABLE, use  # noqa: E402
from cosmos_fast.formats import EnvironmentProblem  # noqa: E402
from cosmos_fast.vae import VAE, CausalConv, Stream, VAEConfig, channels_last_  # noqa: E402
from cosmos_fast.vae_fp8 import Fp8Conv, in_8_bits  # noqa: E402
from cosmos_fast.vae_keys import vae_history  # noqa: E402

testing.kernels_from_checkout()
CPU = torch.device("cpu")
HALF_STEP = 2.0**-4
"""Largest relative rounding error of a normal e4m3 code."""
HEIGHT, WIDTH = 32, 48


def built(codes: bool, base: int = 8, dtype: torch.dtype = torch.bfloat16) -> VAE:
    torch.manual_seed(0)
    vae = channels_last_(VAE(VAEConfig(base=base)).to(dtype))
    return in_8_bits(vae) if codes else vae


def clip(frames: int = 9) -> Tensor:
    noise = torch.rand(1, 3, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return noise.bfloat16()


def latents(frames: int = 3) -> Tensor:
    shape = (1, 16, frames, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("C", [1, 5, 96, 384])
def test_no_value_behind_a_norm_exceeds_448_steps_and_one_reaches_them(C: int) -> None:
    gamma = torch.rand(C, 1, 1, 1, generator=torch.Generator().manual_seed(3)) * 6 + 6
    layer = Fp8Conv(CausalConv(C, 4), gamma)
    x = torch.zeros(1, C, 2, 1, 2)
    x[:, gamma.flatten().argmax()] = 3e4  # all of a pixel's norm in one channel, of the largest gain
    values = reference.norm_silu(x, gamma, None, None) / layer.step
    assert 440 < values.max() <= 448 * (1 + 1e-6)
    codes = layer.normed(x, gamma, Stream())
    assert codes.dtype == torch.float8_e4m3fn and codes.float().max() == 448


def test_a_conv_errs_by_its_codes() -> None:
    torch.manual_seed(0)
    conv, gamma = CausalConv(48, 32), torch.rand(48, 1, 1, 1) + 0.5
    layer = Fp8Conv(conv, gamma)
    x = torch.randn(1, 48, 3, 6, 7)
    exact = conv(conv.normed(x, gamma, Stream()))
    found = layer(layer.normed(x, gamma, Stream()))
    # Two roundings, each uniform in its interval: 0.026 on average, as codes are spread over a factor of two.
    assert 0.01 < relative_l2(found, exact) < HALF_STEP


def test_convs_of_residual_blocks_are_in_8_bits_and_no_others() -> None:
    vae = built(True)
    found = {name for name, module in vae.named_modules() if isinstance(module, Fp8Conv)}
    wide = {name for name, module in built(False).named_modules() if type(module) is CausalConv}
    assert wide - found == {"encoder.head.2", "decoder.head.2"} and found < wide
    assert len(found) == 2 * (8 + 2 + 12 + 2)


REFERENCES = dict.fromkeys(
    ("conv3d", "conv_half", "conv_double", "norm_silu", "conv3d_fp8", "norm_silu_fp8"), "reference"
)
"""Their sums have one order in windows and strips of any size. Elsewhere a last bit that differs moves some codes by a whole
step, and behind a few convs of random weights two passes differ as much as each does from 16 bits."""


def test_what_is_decoded_and_encoded_is_near_and_no_window_changes_it() -> None:
    """The convs of random weights keep nothing in scale, so an error of 4 % a conv grows; the published ones do less."""
    x, z, exact, codes = clip(), latents(), built(False), built(True)
    with use(**REFERENCES):
        decoded, encoded = codes.decode(z, 1), codes.encode(x, 4)
        assert torch.equal(codes.decode(z, 2), decoded) and torch.equal(codes.decode(z, None), decoded)
        assert torch.equal(codes.encode(x, 8), encoded)
    assert 0.003 < relative_l2(decoded, exact.decode(z, 1)) < 0.3
    assert 0.003 < relative_l2(encoded, exact.encode(x, 4)) < 0.3


def test_strips_take_it() -> None:
    vae, z = built(True), latents()
    found = torch.full((1, 3, 9, HEIGHT, WIDTH), torch.nan).bfloat16()
    with use(**REFERENCES):
        whole = vae.decode(z, 1)
        for frame, row, tile in vae_strips.decode(vae, z, 1, 2):
            found[:, :, frame : frame + tile.shape[2], row : row + tile.shape[3]] = tile
    assert torch.equal(found, whole)


def test_histories_are_codes() -> None:
    exact, codes = Stream(), Stream()
    for vae, stream in ((built(False), exact), (built(True), codes)):
        for _ in range(2):
            vae.decoder(latents(1), stream)
            stream.first = False
    assert exact.nbytes == 2 * vae_history(HEIGHT, WIDTH, VAEConfig(base=8))[1]
    assert codes.nbytes < 0.6 * exact.nbytes


def test_the_proof_passes_here_and_refuses_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    vae_fp8.prove(CPU)

    def wrong(x: Tensor, w: Tensor, steps: Tensor, *rest: object) -> Tensor:
        return reference.conv3d_fp8(x, w, steps.flip(0), *rest)  # type: ignore[arg-type]

    op = TABLE["conv3d_fp8"]
    monkeypatch.setattr(op, "candidates", tuple(replace(c, load=lambda: wrong) for c in op.candidates[-1:]))
    with use(), pytest.raises(EnvironmentProblem, match=r"conv3d_fp8: reference must agree.*vae bf16"):
        vae_fp8.prove(CPU)


def test_a_gpu_without_such_a_conv_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with (
        use(),
        pytest.raises(EnvironmentProblem, match=r"conv3d_fp8: needs a GPU of compute capability 9\.0"),
    ):
        vae_fp8.prove(torch.device("cuda"))


def test_operands_that_do_not_fit_are_named() -> None:
    codes = torch.zeros(1, 4, 3, 3, 3).to(torch.float8_e4m3fn)
    steps, bias = torch.ones(1), torch.zeros(1)
    with pytest.raises(RuntimeError, match="x must be .* of float8_e4m3fn"):
        ops_vae.conv3d_fp8(codes.float(), codes, steps, bias)
    with pytest.raises(RuntimeError, match="as many frames, rows and columns"):
        ops_vae.conv3d_fp8(codes[..., :2], codes, steps, bias)
    with pytest.raises(RuntimeError, match=r"steps must be \(1,\) float32"):
        ops_vae.conv3d_fp8(codes, codes, steps.double(), bias)
    with pytest.raises(RuntimeError, match="residual must be"):
        ops_vae.conv3d_fp8(codes, codes, steps, bias, torch.zeros(1, 1, 1, 1, 2))
    x, gamma = torch.zeros(1, 4, 1, 2, 2), torch.ones(4)
    with pytest.raises(RuntimeError, match="step must be positive"):
        ops_vae.norm_silu_fp8(x, gamma, 0.0)
    with pytest.raises(RuntimeError, match="past and keep must be"):
        ops_vae.norm_silu_fp8(x, gamma, 1.0, torch.zeros(1, 4, 2, 2, 2))


def test_a_clip_from_the_command_line(tmp_path: Path) -> None:
    models, source = system.make_models(tmp_path / "models"), system.clip_of(tmp_path / "in.mp4", 5)
    request, out = system.write_spec(tmp_path, "street", source), tmp_path / "out"
    run = system.call("generate", request, "-o", out, "--checkpoint", models, "--recipe", "fp8_vae", "--device", "cpu")  # fmt: skip
    assert run.code == 0, run.err
    record = (out / "street.json").read_text()
    assert '"vae": "fp8"' in record and "conv3d_fp8" in record and (out / "street.mp4").stat().st_size > 0


@pytest.mark.interpret
@pytest.mark.parametrize("cut", [(32, 64, 0, 32, True), (16, 32, 16, 64, True), (32, 16, 0, 32, False)])
def test_every_cut_of_codes_gives_the_same(cut: tuple[int, int, int, int, bool]) -> None:
    from cosmos_fast.kernels import convolution

    from cosmos_fast.cases import MAKERS
    from cosmos_fast.drawn import Random

    m, low, high, k, fold = cut
    tiles = convolution.Tiles(m, low, high, k, 4, 2, parts=2, fold=fold)
    draw = Random(CPU, torch.float16, torch.Generator().manual_seed(0))
    args = MAKERS["conv3d_fp8"](draw, C=48, O=40, F=2, H=3, W=7, added=1, last=1)
    assert testing.faults("conv3d_fp8", convolution.conv3d_fp8(*args, tiles=tiles), args) == []


@pytest.mark.gpu
@pytest.mark.parametrize("base", [32, 96])
def test_the_vae_on_the_device(device: torch.device, base: int) -> None:
    """With the kernels of the device: as near to 16 bits as the references come. (To each other they need not be near.)"""
    vae_fp8.prove(device)
    vae, z, x = built(True, base).to(device), latents().to(device), clip().to(device)
    ours = vae.decode(z, 1), vae.encode(x, 4)
    with use(conv3d_fp8="reference", norm_silu_fp8="reference"):
        plain = vae.decode(z, 1), vae.encode(x, 4)
    exact = built(False, base).to(device)
    for mine, its, true in zip(ours, plain, (exact.decode(z, 1), exact.encode(x, 4)), strict=True):
        assert relative_l2(mine, true) < 1.3 * relative_l2(its, true)
