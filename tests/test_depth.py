"""Depth: the published layout, the backbone beside transformers, windows, stitching, one range per clip, its errors."""

from __future__ import annotations

import errno
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import torch

from cosmos_fast import depth, registry, video
from cosmos_fast.clip_maker import ClipTask, MakerOptions
from cosmos_fast.depth_network import Backbone, DepthConfig, DepthNetwork
from cosmos_fast.formats import CheckpointError, ClipError, EnvironmentProblem

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
TINY = DepthConfig(width=64, blocks=4, features=32, levels=(32, 32, 32, 32), grid=4)

# Names and shapes of video_depth_anything_vits.pth; a-b stands for every number from a to b.
LAYOUT = """
pretrained.cls_token 1 1 384
pretrained.pos_embed 1 1370 384
pretrained.mask_token 1 384
pretrained.patch_embed.proj.weight 384 3 14 14
pretrained.patch_embed.proj.bias 384
pretrained.blocks.{0-11}.norm{1-2}.weight 384
pretrained.blocks.{0-11}.norm{1-2}.bias 384
pretrained.blocks.{0-11}.attn.qkv.weight 1152 384
pretrained.blocks.{0-11}.attn.qkv.bias 1152
pretrained.blocks.{0-11}.attn.proj.weight 384 384
pretrained.blocks.{0-11}.attn.proj.bias 384
pretrained.blocks.{0-11}.ls{1-2}.gamma 384
pretrained.blocks.{0-11}.mlp.fc1.weight 1536 384
pretrained.blocks.{0-11}.mlp.fc1.bias 1536
pretrained.blocks.{0-11}.mlp.fc2.weight 384 1536
pretrained.blocks.{0-11}.mlp.fc2.bias 384
pretrained.norm.weight 384
pretrained.norm.bias 384
head.projects.0.weight 48 384 1 1
head.projects.0.bias 48
head.projects.1.weight 96 384 1 1
head.projects.1.bias 96
head.projects.2.weight 192 384 1 1
head.projects.2.bias 192
head.projects.3.weight 384 384 1 1
head.projects.3.bias 384
head.resize_layers.0.weight 48 48 4 4
head.resize_layers.0.bias 48
head.resize_layers.1.weight 96 96 2 2
head.resize_layers.1.bias 96
head.resize_layers.3.weight 384 384 3 3
head.resize_layers.3.bias 384
head.scratch.layer1_rn.weight 64 48 3 3
head.scratch.layer2_rn.weight 64 96 3 3
head.scratch.layer3_rn.weight 64 192 3 3
head.scratch.layer4_rn.weight 64 384 3 3
head.scratch.refinenet{1-4}.out_conv.weight 64 64 1 1
head.scratch.refinenet{1-4}.out_conv.bias 64
head.scratch.refinenet{1-4}.resConfUnit{1-2}.conv{1-2}.weight 64 64 3 3
head.scratch.refinenet{1-4}.resConfUnit{1-2}.conv{1-2}.bias 64
head.scratch.output_conv1.weight 32 64 3 3
head.scratch.output_conv1.bias 32
head.scratch.output_conv2.0.weight 32 32 3 3
head.scratch.output_conv2.0.bias 32
head.scratch.output_conv2.2.weight 1 32 1 1
head.scratch.output_conv2.2.bias 1
"""
TEMPORAL = """
norm.weight C
norm.bias C
proj_in.weight C C
proj_in.bias C
proj_out.weight C C
proj_out.bias C
transformer_blocks.0.attention_blocks.{0-1}.to_q.weight C C
transformer_blocks.0.attention_blocks.{0-1}.to_k.weight C C
transformer_blocks.0.attention_blocks.{0-1}.to_v.weight C C
transformer_blocks.0.attention_blocks.{0-1}.to_out.0.weight C C
transformer_blocks.0.attention_blocks.{0-1}.to_out.0.bias C
transformer_blocks.0.attention_blocks.{0-1}.pos_encoder.pe 1 32 C
transformer_blocks.0.norms.{0-1}.weight C
transformer_blocks.0.norms.{0-1}.bias C
transformer_blocks.0.ff.net.0.proj.weight 8C C
transformer_blocks.0.ff.net.0.proj.bias 8C
transformer_blocks.0.ff.net.2.weight C 4C
transformer_blocks.0.ff.net.2.bias C
transformer_blocks.0.ff_norm.weight C
transformer_blocks.0.ff_norm.bias C
"""


def spelled(name: str) -> Iterator[str]:
    """Every name that a pattern stands for."""
    if (found := re.search(r"\{(\d+)-(\d+)\}", name)) is None:
        yield name
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from spelled(f"{name[: found.start()]}{number}{name[found.end() :]}")


def published_layout() -> dict[str, tuple[int, ...]]:
    rows = LAYOUT.split("\n")
    for index, width in enumerate((192, 384, 64, 64)):
        sizes = {"C": str(width), "4C": str(4 * width), "8C": str(8 * width)}
        for row in filter(None, TEMPORAL.split("\n")):
            name, *shape = row.split()
            shape = [sizes.get(size, size) for size in shape]
            rows.append(" ".join([f"head.motion_modules.{index}.temporal_transformer.{name}", *shape]))
    split = (row.split() for row in rows if row)
    return {name: tuple(map(int, shape)) for pattern, *shape in split for name in spelled(pattern)}


def weights_of(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random weights at which activations neither vanish nor explode; the same wherever numpy is the same."""
    random, out = np.random.default_rng(seed), {}
    shapes = {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.endswith(".pe")}
    for name, shape in sorted(shapes.items()):
        value = random.standard_normal(shape, dtype=np.float32)
        is_norm = re.search(r"(norm\d?|norms\.\d)\.weight$|gamma$", name) and "ff_norm.weight" not in name
        if is_norm or name.endswith("ff_norm.weight"):
            value = 1 + 0.1 * value
        elif len(shape) == 1:
            value = 0.1 * value
        else:
            value = value / np.float32(np.sqrt(int(np.prod(shape[1:])) or 1))
        out[name] = torch.from_numpy(np.asarray(value, np.float32))
    return out


def tiny_network(seed: int = 0) -> DepthNetwork:
    network = DepthNetwork(TINY).eval().requires_grad_(False)
    network.load_state_dict(weights_of(network, seed), strict=False)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("depth") / "tiny.pth"
    torch.save(tiny_network().state_dict(), path)
    return path


def clip(path: Path, frames: int, size: tuple[int, int] = (32, 28)) -> video.Probe:
    with video.Writer(path, size, 25, codec="ffv1") as writer:
        writer.write(media.pattern(frames, size))
    return video.probe(path)


@pytest.fixture
def small_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network sees 28 pixels, not 518: a window takes a tenth of a second."""
    monkeypatch.setattr(depth, "_SIDE", 28)


# --- the network ---


def test_state_dict_is_the_published_one() -> None:
    with torch.device("meta"):
        state = DepthNetwork().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == published_layout()
    assert sum(tensor.numel() for tensor in state.values()) == 29_080_193
    assert DepthConfig.of(shapes) == DepthConfig()


def test_large_model_is_recognised() -> None:
    config = DepthConfig(1024, 24, 256, (256, 512, 1024, 1024))
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in DepthNetwork(config).state_dict().items()}
    assert DepthConfig.of(shapes) == config
    assert config.taps == (4, 11, 17, 23) and DepthConfig().taps == (2, 5, 8, 11)


def test_network_against_the_published_code() -> None:
    """tests/golden/depth_network.npz: what the published code makes of these weights and this input."""
    network = DepthNetwork().eval()
    missing = network.load_state_dict(weights_of(network, 7), strict=False).missing_keys
    assert all(name.endswith(".pe") for name in missing)  # position codes come from the formula
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((6, 3, 56, 84), dtype=np.float32))
    with torch.inference_mode():
        made = network(x)[:, ::5, ::7].numpy()
    expected = np.load(GOLDEN / "depth_network.npz")["depth"]
    assert expected.std() > 0.4
    np.testing.assert_allclose(made, expected, atol=1e-4 * expected.std())


def test_backbone_beside_transformers() -> None:
    import transformers

    ours = Backbone(TINY).eval()
    theirs = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=1, image_size=56, patch_size=14, mlp_ratio=4
        )
    ).eval()  # fmt: skip
    state = weights_of(ours, 1)
    ours.load_state_dict(state)
    renamed = (
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"), (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.", ""), (r"^layernorm\.", "norm."), (r"^encoder\.layer\.", "blocks."),
        (r"attention\.o_proj", "attn.proj"), (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    )  # fmt: skip
    mapped = {}
    for name, tensor in theirs.state_dict().items():
        ours_name = name
        for pattern, replacement in renamed:
            ours_name = re.sub(pattern, replacement, ours_name)
        if found := re.fullmatch(r"(.*)attention\.([qkv])_proj\.(weight|bias)", ours_name):
            packed = state[f"{found[1]}attn.qkv.{found[3]}"]
            mapped[name] = packed.chunk(3)["qkv".index(found[2])]
        else:
            mapped[name] = state[ours_name].reshape(tensor.shape)
    theirs.load_state_dict(mapped)
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        last = ours(x)[-1]
        expected = theirs(x).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(last, expected, atol=2e-5, rtol=1e-5)


def test_positions_are_sampled_for_a_grid_a_tenth_larger() -> None:
    grid, rows, columns = 37, 41, 66
    backbone = Backbone(DepthConfig(width=64, blocks=4, features=32, levels=(32, 32, 32, 32), grid=grid))
    ramp = torch.arange(grid, dtype=torch.float32)
    table = torch.zeros(grid, grid, 64)
    table[..., 0], table[..., 1] = ramp[:, None], ramp
    with torch.no_grad():
        backbone.pos_embed[0, 1:] = table.flatten(0, 1)
        made = backbone.positions(rows, columns)[0, 1:].unflatten(0, (rows, columns))
        assert backbone.positions(grid, grid) is backbone.pos_embed
    for line, count in ((made[:, columns // 2, 0], rows), (made[rows // 2, :, 1], columns)):
        at = (np.arange(count) + 0.5) * grid / (count + 0.1) - 0.5
        np.testing.assert_allclose(line[4:-4], cubic(ramp.numpy(), at[4:-4]), atol=1e-4)
        plain = (np.arange(count) + 0.5) * grid / count - 0.5
        assert np.abs(line[4:-4].numpy() - cubic(ramp.numpy(), plain[4:-4])).max() > 0.04


def cubic(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values between samples by the cubic kernel with a = -3/4, away from the ends."""
    t = np.abs(at[:, None] - np.arange(len(values)))
    near, far = 1.25 * t**3 - 2.25 * t**2 + 1, -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0)) @ values


# --- windows ---


def test_network_sizes() -> None:
    sizes = {(1280, 720): (924, 518), (1280, 704): (910, 504), (704, 1280): (504, 910), (640, 640): (518, 518),
             (640, 480): (686, 518), (2560, 1080): (924, 392)}  # fmt: skip
    assert {size: depth.network_size(*size) for size in sizes} == sizes


class Numbers:
    """A source whose frame n holds n; counts how often each was read."""

    def __init__(self, frames: int) -> None:
        self.frames, self.size = frames, (2, 2)
        self.read_frames: list[int] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        self.read_frames += range(start, stop)
        return np.arange(start, stop)[:, None, None, None] * np.ones((1, 2, 2, 3), np.int64)


def plain_windows(frames: int) -> list[list[int]]:
    """Frames of every window by the rule as it is written down: pad the list, slice it, replace the first ten."""
    numbers = [min(n, frames - 1) for n in range(frames + 2 * 32)]
    windows: list[list[int]] = []
    for start in range(0, frames, 22):
        window = numbers[start : start + 32]
        if windows:
            window[:10] = [windows[-1][k] for k in (0, 12, 24, 25, 26, 27, 28, 29, 30, 31)]
        windows.append(window)
    return windows


@pytest.mark.parametrize("frames", [1, 2, 22, 23, 31, 32, 33, 44, 45, 54, 55, 66, 67, 100])
def test_windows_read_each_frame_once(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "prepared", lambda frames: torch.from_numpy(frames[:, 0, 0, :1, None, None]))
    source = Numbers(frames)
    made = [window.flatten().tolist() for window in depth.input_windows(source)]  # type: ignore[arg-type]
    assert made == plain_windows(frames)
    assert source.read_frames == list(range(frames))


def drifting(frames: int, random: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """A clip of depth, and its windows, each at a scale and shift of its own, as a network would give them."""
    base, slope = random.uniform(1, 5, (2, 6, 8))
    truth = np.stack([base + 0.01 * n * slope for n in range(frames)]).astype(np.float32)
    scales = [(1.0, 0.0)] + [
        (random.uniform(0.5, 2), random.uniform(-0.3, 0.3)) for _ in range(frames // 22 + 1)
    ]
    windows = [truth[window] * a + b for window, (a, b) in zip(plain_windows(frames), scales)]
    return truth, [window.astype(np.float32) for window in windows]


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 54, 55, 100])
def test_drifting_windows_are_stitched_back(frames: int) -> None:
    truth, windows = drifting(frames, np.random.default_rng(frames))
    made = np.stack(list(depth.stitched(windows, frames)))
    assert made.shape == truth.shape
    np.testing.assert_allclose(made, truth, atol=2e-4)
    if frames > 32:  # without alignment there is a jump
        assert np.abs(windows[1][-1] - truth[plain_windows(frames)[1][-1]]).max() > 0.1


def test_windows_cross_fade_over_eight_frames_and_never_go_below_zero() -> None:
    first, second = np.ones((32, 2, 2), np.float32), np.ones((32, 2, 2), np.float32)
    first[:, 0, 0], second[:, 0, 0] = 3, 3  # something to align by
    second[2:] += 7
    second[20, 1, 1] = -5
    made = np.stack(list(depth.stitched([first, second], 54)))
    np.testing.assert_allclose(made[:24, 1, 0], 1, atol=1e-6)
    np.testing.assert_allclose(made[24:32, 1, 0], 1 + 7 * np.arange(8) / 7, atol=1e-5)
    np.testing.assert_allclose(made[32:, 1, 0], 8, atol=1e-5)
    assert made[42, 1, 1] == 0


def test_scale_and_shift_is_least_squares_and_leaves_flat_depth_alone() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 40, 5))
    a, b = depth.scale_and_shift(x, y)
    (want_a, want_b), *_ = np.linalg.lstsq(np.stack([x.ravel(), np.ones(x.size)], 1), y.ravel(), rcond=None)
    np.testing.assert_allclose((a, b), (want_a, want_b))
    assert depth.scale_and_shift(np.full((9, 9), 0.1, np.float32), y) == (1.0, 0.0)
    assert depth.scale_and_shift(np.zeros((9, 9), np.float32), y) == (1.0, 0.0)


def test_memory_does_not_grow_with_the_clip() -> None:
    def peak(frames: int) -> int:
        shape = (32, 24, 32)
        windows = (np.full(shape, k, np.float32) for k in range(-(-frames // 22)))
        tracemalloc.start()
        parts = depth.as_control(depth.stitched(windows, frames), frames, (32, 24), lambda done, total: None)
        assert sum(len(part) for part in parts) == frames
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(40)
    assert peak(880) < 1.2 * peak(88)


# --- one range for the whole clip ---


def test_range_of_the_clip_becomes_0_to_255_near_is_white() -> None:
    ramp = np.linspace(2, 4, 25, dtype=np.float32)[:, None, None] * np.ones((1, 4, 6), np.float32)
    seen: list[tuple[int, int]] = []
    made = np.concatenate(
        list(depth.as_control(iter(ramp), 25, (6, 4), lambda done, total: seen.append((done, total))))
    )
    assert made.dtype == np.uint8 and made.shape == (25, 4, 6, 3)
    assert (made == made[:, :1, :1, :1]).all()
    assert (made[:, 0, 0, 0] == np.floor((ramp[:, 0, 0] - 2) / np.float32(2 + 1e-8) * 255)).all()  # truncated
    assert made[0].max() == 0 and made[-1].min() >= 254
    assert seen == [(n, 25) for n in range(1, 26)]
    flat = list(depth.as_control([np.ones((4, 6), np.float32)], 1, (6, 4), lambda done, total: None))
    assert flat[0].max() == 0


def test_depth_is_resized_before_it_is_rounded() -> None:
    frame = np.array([[0, 1], [0, 1]], np.float32).repeat(8, 0)
    made = next(depth.as_control([frame], 1, (16, 16), lambda done, total: None))
    assert len(np.unique(made)) > 8


def test_depth_that_is_not_finite_fails_the_clip() -> None:
    bad = [np.ones((4, 6), np.float32), np.full((4, 6), np.nan, np.float32)]
    with pytest.raises(ClipError, match="depth: must be finite, got NaN or infinity in frame 1"):
        list(depth.as_control(bad, 2, (6, 4), lambda done, total: None))


def test_full_scratch_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(depth.tempfile, "TemporaryFile", refuse)
    with pytest.raises(EnvironmentProblem, match="scratch space in .*No space left.*TMPDIR"):
        next(depth.as_control([np.ones((4, 6), np.float32)], 1, (6, 4), lambda done, total: None))


# --- makers ---


@pytest.mark.parametrize("frames", [1, 33, 55])
def test_video_depth_is_the_plain_computation(
    frames: int, weights: Path, small_side: None, tmp_path: Path
) -> None:
    """Beside the whole clip in memory, window after window."""
    source = clip(tmp_path / "a.mkv", frames)
    maker = depth.VideoDepth(CPU, weights)
    made = np.concatenate(list(maker.make(ClipTask(source, (48, 32)), lambda done, total: None)))
    assert made.shape == (frames, 32, 48, 3)
    network, x = tiny_network(), depth.prepared(media.pattern(frames, (32, 28)))
    with torch.inference_mode():
        outputs = [network(x[window]) for window in plain_windows(frames)]
    sized = [
        torch.nn.functional.interpolate(o[:, None], (28, 32), mode="bilinear", align_corners=True)[
            :, 0
        ].numpy()
        for o in outputs
    ]
    whole = np.stack(list(depth.stitched(sized, frames)))
    grey = (whole - whole.min()) / (whole.max() - whole.min() + 1e-8) * 255
    expected = np.stack([depth.cv2.resize(frame, (48, 32)) for frame in grey])
    assert np.abs(made[..., 0] - expected).max() <= 1.01 and np.ptp(made) >= 200
    again = np.concatenate(list(maker.make(ClipTask(source, (48, 32)), lambda done, total: None)))
    assert (again == made).all()


def test_identity_is_the_content_of_the_weights(weights: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.pth", tmp_path / "other.pth"
    copy.write_bytes(weights.read_bytes())
    torch.save(tiny_network(1).state_dict(), other)
    name = depth.VideoDepth(CPU, weights).identity
    assert depth.VideoDepth(CPU, copy).identity == name != depth.VideoDepth(CPU, other).identity
    assert depth.VideoDepth(torch.device("cuda"), copy).identity != name  # half precision


def test_published_identity_needs_no_file_and_its_file_is_checked(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(registry, "resolve", lambda name: asked.append(name) or weights)
    maker = depth.open_depth(CPU, MakerOptions())
    assert depth.PUBLISHED_SHA256 in maker.identity and not asked
    with pytest.raises(CheckpointError, match="must have the SHA-256 1337.*--depth-model FILE"):
        maker.locate()
    assert asked == [depth.PUBLISHED]


def test_other_weights_are_refused(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="must be the weights of Video Depth Anything, got 1 tensors"):
        depth.load_network(path)
    state = torch.load(weights)
    state.pop("head.scratch.output_conv1.bias")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="1 tensors missing: head.scratch.output_conv1.bias"):
        depth.load_network(path)
    state = torch.load(weights)
    state["pretrained.norm.bias"][3] = float("nan")
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="'pretrained.norm.bias' must be finite"):
        depth.load_network(path)
    with pytest.raises(CheckpointError, match="must be an existing path"):
        depth.VideoDepth(CPU, tmp_path / "nowhere.pth").locate()


def test_frame_by_frame_model_of_transformers(tmp_path: Path, small_side: None) -> None:
    import transformers

    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, mlp_ratio=2,
            out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
            apply_layernorm=True,
        ),
        patch_size=14, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path / "model")
    maker = depth.open_depth(CPU, MakerOptions(depth_model=tmp_path / "model"))
    assert isinstance(maker, depth.FrameDepth)
    source = clip(tmp_path / "a.mkv", 10)
    made = np.concatenate(list(maker.make(ClipTask(source, (48, 32)), lambda done, total: None)))
    assert made.shape == (10, 32, 48, 3) and made.min() == 0 and made.max() >= 150
    assert maker.identity.startswith("depth-anything ")
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must hold a Depth Anything model"):
        list(depth.FrameDepth(CPU, tmp_path / "model").make(ClipTask(source, (48, 32)), lambda a, b: None))


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(depth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="needs the package transformers.*pip install transformers"):
        depth.open_depth(CPU, MakerOptions(depth_model=tmp_path))
