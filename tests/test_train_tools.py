"""Training of the embedded model: the training forwards are the production ones, every stage learns and resumes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import system
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "train"))

import base_stage  # noqa: E402
import clips as train_clips  # noqa: E402
import control_stage  # noqa: E402
import distill_stage  # noqa: E402
import latents_stage  # noqa: E402
import train  # noqa: E402
from base_stage import build  # noqa: E402
from forward import Forward, Hint, branch_from_base, initialise, make_network  # noqa: E402
from optimise import Optimiser, orthogonalised  # noqa: E402
from recording import Run  # noqa: E402
from sizes import Sizes  # noqa: E402
from vae_forward import Passes, publish_, standardise_  # noqa: E402
from vae_stage import trained  # noqa: E402

from cosmos_fast import controls, sampler  # noqa: E402
from cosmos_fast.network import ControlBranch, Network, Pair, Single  # noqa: E402
from cosmos_fast.self_attention import exact  # noqa: E402
from cosmos_fast.tiny_style import TinyStyle  # noqa: E402
from cosmos_fast.vae import VAE  # noqa: E402
from cosmos_fast.vae_keys import VAEConfig  # noqa: E402

pytestmark = pytest.mark.slow
GRID = (2, 4, 6)
TOY = Sizes.toy()
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def moving_shapes(folder: Path, count: int, frames: int = 5, size: tuple[int, int] = (64, 48)) -> Path:
    """Clips of one coloured square that moves over a gradient, as tools/data writes them."""
    W, H = size
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rgb = np.empty((count, frames, H, W, 3), np.uint8)
    depth, labels = np.empty(rgb.shape[:-1], np.uint8), np.zeros(rgb.shape[:-1], np.uint8)
    lines = []
    for n in range(count):
        name = list(COLOURS)[rng.integers(len(COLOURS))]
        y, x, speed = rng.integers(4, H - 28), rng.integers(4, W - 36), rng.integers(-2, 3)
        rgb[n] = (np.linspace(40, 200, W)[None, :, None] * rng.uniform(0.4, 1, 3)).astype(np.uint8)
        depth[n] = np.linspace(0, 120, H).astype(np.uint8)[None, :, None]
        for f in range(frames):
            left = max(0, int(x + speed * f))
            for array, value in ((rgb, COLOURS[name]), (depth, 230), (labels, 1)):
                array[n, f, y : y + 20, left : left + 24] = value
        lines.append({"caption": f"A {name} square moves.", "background": [0]})
    np.savez(folder / "000.npz", rgb=rgb, depth=depth, labels=labels)
    (folder / "000.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


def randomised(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    return module


# ------------------------------------------------------------------------------- the same functions


@pytest.mark.parametrize("kind", ["single", "multi", "distilled"])
def test_training_forward_is_the_production_network(kind: str) -> None:
    network = make_network(TOY.network(kind), "cpu")
    randomised(initialise(network, torch.Generator().manual_seed(1)))
    network.requires_grad_(False)
    config, generator = network.config, torch.Generator().manual_seed(2)
    z = torch.randn(2, 16, *GRID, generator=generator)
    text = torch.randn(2, config.text_tokens, config.text_width, generator=generator)
    images = torch.randn(2, config.image_tokens, config.image_width or 1, generator=generator)
    has_image = kind == "single"
    control = torch.randn(config.branches, 2, 16, *GRID, generator=generator)
    weights = [0.25, 1.0, 0.5, 0.75][: config.branches]
    mask = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    if kind == "distilled":
        schedule = sampler.distilled_schedule(4)
        times = torch.cat([sampler.distilled_times(schedule, 2, n)[2:3] for n in (0, 1)])
    else:
        times = torch.tensor([[937], [12]])
    hints = [
        Hint(branch, slice(0, 2), control[j], torch.full((2,), weights[j]))
        for j, branch in enumerate(network.control)
    ]
    got = Forward(network)(z, times, text, mask, images if has_image else None, hints)
    for b in range(2):
        prompt = network.read_prompt(text[b], images[b] if has_image else None)
        held = network.read_controls(list(control[:, b]), weights, GRID, mask[b])
        (ctx,) = network.prepare([prompt], held, network.tabulate(times[b : b + 1]), GRID, mask[b])
        torch.testing.assert_close(got[b], network(z[b], 0, ctx), atol=2e-4, rtol=1e-4)
    assert float(got.std()) > 0.1


def test_without_a_style_image_the_image_path_adds_nothing() -> None:
    network = make_network(TOY.network("single"), "cpu")
    randomised(initialise(network, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        network.image_proj.bias.zero_()
    z, text = torch.randn(1, 16, *GRID), torch.randn(1, 8, 16)
    times, mask = torch.tensor([[500]]), torch.zeros(1, 2)
    zeros = torch.zeros(1, TOY.image_tokens, TOY.image_width)
    forward = Forward(network)
    torch.testing.assert_close(forward(z, times, text, mask, zeros), forward(z, times, text, mask))


def test_fresh_branches_add_nothing_and_learn() -> None:
    network, text = build_toy()
    branch = ControlBranch(network.config, exact)
    branch_from_base(branch, network)
    z, times, mask = torch.randn(1, 16, *GRID), torch.tensor([[500]]), torch.zeros(1, 2)
    hint = Hint(branch, slice(0, 1), torch.randn(1, 16, *GRID), torch.ones(1))
    forward = Forward(network)
    embedded = torch.randn(1, 8, 16)
    v = forward(z, times, embedded, mask, None, [hint])
    torch.testing.assert_close(v, forward(z, times, embedded, mask))
    v.square().sum().backward()
    assert float(branch.after_proj[0].weight.grad.abs().sum()) > 0


def build_toy() -> tuple[Network, torch.nn.Module]:
    run = Run(Path("unused"), Path("unused"), TOY, device="cpu", is_compiled=False)
    network, text = build(run)
    return randomised(network), text  # type: ignore[return-value]


@pytest.mark.parametrize("frames", [1, 9])
def test_training_pass_of_the_vae_is_the_production_one(frames: int) -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base=4))
    x = torch.rand(2, 3, frames, 32, 24) * 2 - 1
    mean, log_variance = Passes(vae).encode(x)
    y = Passes(vae).decode(mean)
    assert log_variance.shape == mean.shape
    publish_(vae)
    z = vae.encode(x, window=4)
    torch.testing.assert_close(z, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(z, window=1), y, atol=1e-4, rtol=1e-3)


def test_latents_are_standardised_and_the_picture_stays() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base=4))
    passes, x = Passes(vae), torch.rand(2, 3, 5, 32, 24) * 2 - 1
    raw = passes.encode(x)[0]
    y = passes.decode(raw)
    flat = raw.transpose(0, 1).flatten(1)
    standardise_(vae, flat.mean(1), flat.std(1))
    z = passes.encode(x)[0]
    flat = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(passes.decode(z), y, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("preset", ["medium", "low"])
def test_blur_on_the_device_is_the_control(preset: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 80, 96, 3), dtype=np.uint8)
    frames[:, 20:60, 30:70] = (200, 40, 90)
    own = train_clips.blurred(torch.from_numpy(frames), preset).numpy().astype(int)
    reference = controls.vis(frames, preset).astype(int)
    assert np.abs(own - reference).max() <= 2
    assert np.ptp(reference) > 20


def test_style_features_are_those_of_the_embedded_model() -> None:
    image = np.random.default_rng(0).integers(0, 256, (192, 320, 3), dtype=np.uint8)
    own = train_clips.style_features(torch.from_numpy(image), TinyStyle.tokens)
    torch.testing.assert_close(own, TinyStyle().encode(image), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------- the optimiser


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    g = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT):
        values = torch.linalg.svdvals(orthogonalised(x))
        assert 0.6 < float(values.min()) and float(values.max()) < 1.3


def test_a_gradient_that_is_not_finite_leaves_the_weights_finite() -> None:
    weight, bias = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.zeros(4))
    optimiser = Optimiser([("a.weight", weight), ("a.bias", bias)], 0.01, 0.01)
    weight.grad, bias.grad = torch.full((4, 4), float("nan")), torch.ones(4)
    optimiser.step(1.0)
    assert bool(weight.isfinite().all()) and bool(bias.isfinite().all())


# ----------------------------------------------------------------------------- velocity, signs and times


def constant_latents(frames: int = 2) -> latents_stage.Latents:
    """Clips that all show one constant latent, with controls of noise."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 5, 16, frames, 4, 4, generator=generator)
    z[:, 0] = torch.randn(16, generator=generator)[:, None, None, None]
    style = torch.zeros(4, 2, TOY.image_tokens, TOY.image_width).bfloat16()
    black = torch.zeros(4, 5, dtype=torch.bool)
    return latents_stage.Latents(z.bfloat16(), style, black, ["a red square"] * 4, 3)


def toy_run(out: Path, steps: int, **changes: Any) -> Run:
    defaults: dict[str, Any] = {"batch": 4, "device": "cpu", "is_compiled": False, "warmup": 5}
    return Run(out, out / "clips", TOY, steps=steps, **(defaults | changes))


def test_what_is_learnt_comes_back_through_the_production_samplers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong sign, time scale or parametrisation anywhere between training and sampling fails here."""
    latents, grid = constant_latents(), (2, 4, 4)
    for stage in (base_stage, control_stage, distill_stage):
        monkeypatch.setattr(stage, "measure", lambda *a: None)
    base_stage.train(toy_run(tmp_path, 130), latents)
    network, text = base_stage.load(toy_run(tmp_path, 130))
    prompt, mask = text.encode(["a red square"])[0], torch.zeros(2)
    noise, x0 = sampler.noise(3, (1, 16, *grid)), latents.signal("rgb", torch.tensor([0])).float()
    schedule = sampler.base_schedule(12)
    held = network.read_controls([None], [0.0], grid, mask)
    tables = network.tabulate(sampler.base_times(schedule))
    contexts = network.prepare([network.read_prompt(prompt)] * 2, held, tables, grid, mask)
    x = sampler.sample(Pair(network, *contexts), noise, schedule, guidance=3.0, dtype=torch.float32)
    assert float((x - x0).std() / x0.std()) < 0.3

    control_stage.train(toy_run(tmp_path, 4), latents)
    distill_stage.train(toy_run(tmp_path, 40, batch=8), latents)
    student = distill_stage.load(toy_run(tmp_path, 40))
    few = sampler.distilled_schedule(4)
    edge = latents.signal("edge", torch.tensor([0]))[0].float()
    held = student.read_controls([edge], [1.0], grid, mask)
    tables = student.tabulate(sampler.distilled_times(few, 2, 0))
    (ctx,) = student.prepare([student.read_prompt(prompt)], held, tables, grid, mask)
    y = sampler.sample_distilled(Single(student, ctx), noise, few, dtype=torch.float32)
    assert float((y - x0).std() / x0.std()) < 0.4


def test_branches_that_are_not_named_keep_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (base_stage, control_stage):
        monkeypatch.setattr(stage, "measure", lambda *a: None)
    latents = constant_latents()
    base_stage.train(toy_run(tmp_path, 1), latents)
    control_stage.train(toy_run(tmp_path, 2), latents)
    before = torch.load(tmp_path / "keep/control.pt", weights_only=True)["weights"]
    (tmp_path / "work/control.pt").unlink()
    control_stage.train(toy_run(tmp_path, 5, controls=("vis", "seg")), latents)
    after = torch.load(tmp_path / "keep/control.pt", weights_only=True)["weights"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vis", "seg"}


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_stage, "measure", lambda *a: None)
    latents = constant_latents()
    base_stage.train(toy_run(tmp_path / "whole", 8, log_every=1), latents)
    base_stage.train(toy_run(tmp_path / "killed", 8, log_every=1, stop=3), latents)
    base_stage.train(toy_run(tmp_path / "killed", 8, log_every=1), latents)
    whole, killed = (lines(tmp_path / name / "keep/logs/base.jsonl") for name in ("whole", "killed"))
    assert [row["step"] for row in killed] == list(range(1, 9))
    assert [row["loss"] for row in killed] == pytest.approx([row["loss"] for row in whole], rel=1e-4)


def test_a_run_goes_on_from_its_averaged_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_stage, "measure", lambda *a: None)
    latents = constant_latents()
    base_stage.train(toy_run(tmp_path / "here", 40, log_every=40), latents)
    shutil.copytree(tmp_path / "here" / "keep", tmp_path / "there" / "keep")
    base_stage.train(toy_run(tmp_path / "there", 42, log_every=1), latents)
    first, *later = lines(tmp_path / "there/keep/logs/base.jsonl")
    assert [row["step"] for row in later] == [41, 42]
    assert later[-1]["loss"] < first["loss"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------ the whole chain


@pytest.fixture(scope="module")
def trained_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train")
    moving_shapes(out / "clips", 12)
    run = Run(
        out, out / "clips", TOY, steps=6, batch=8, device="cpu", is_compiled=False, warmup=2, log_every=2
    )
    train.run_stages(run, list(train.STAGES), {})
    return out


def test_every_stage_learns_and_leaves_logs_and_pictures(trained_out: Path) -> None:
    for stage in ("vae", "base", "control", "distill"):
        rows = lines(trained_out / "keep" / "logs" / f"{stage}.jsonl")
        assert rows[-1]["step"] == 6
        assert stage in ("control", "distill") or rows[-1]["loss"] < rows[0]["loss"]
        assert (trained_out / "keep" / "samples" / f"{stage}.png").stat().st_size > 1000
    assert not list(trained_out.rglob("*.part"))


def test_latents_are_those_of_the_production_vae(trained_out: Path) -> None:
    run = Run(trained_out, trained_out / "clips", TOY, device="cpu")
    latents, clips = latents_stage.read(run), train_clips.load(trained_out / "clips", "cpu")
    assert latents.captions == clips.captions
    for name in ("rgb", "seg"):
        x = train_clips.pixels(clips.frames(name, torch.tensor([1])), torch.float32)
        z = trained(run).encode(x)
        torch.testing.assert_close(latents.signal(name, torch.tensor([1])).float(), z, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("model", ["edge", "multi", "edge/distilled"])
def test_the_exported_model_makes_a_clip(trained_out: Path, tmp_path: Path, model: str) -> None:
    video = system.clip_of(tmp_path / "clip.mp4", 5, (64, 64))
    engine = system.open_engine(trained_out / "model", model)
    others = {"vis": {}, "edge": {}} if model == "multi" else {}
    result = engine.generate(system.request(video, num_steps=1, **others))
    assert result.frames.shape[0] == 5 and result.frames.dtype == np.uint8
    assert engine.notes == () or model == "multi"
    assert not any("differ" in note for note in engine.notes)  # the four files share one base


def test_options_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train.main(["--stage", "vae", "--data", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        train.main(["--stage", "vea", "--minutes", "1", "--data", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="make_dataset"):
        train.main(["--stage", "vae", "--minutes", "1", "--data", str(tmp_path), "--out", str(tmp_path)])


def test_training_leaves_the_settings_of_the_process_alone(trained_out: Path) -> None:
    """The last test of the file: after stages and commands."""
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.tensor([5e-324], dtype=torch.float64).mul(1.0).item() > 0  # denormals are not flushed
