"""Edges and blur against step-by-step OpenCV, makers, masks and pictures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from cosmos_fast import controls as c
from cosmos_fast.formats import CONTROLS, EnvironmentProblem, MediaError, SpecError

GOLDEN = Path(__file__).parent / "golden"

EDGE = {
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
BLUR = {"very_low": (1, 4), "low": (4, 4), "medium": (2, 10), "high": (1, 16), "very_high": (4, 16)}


def clip(frames=6, height=50, width=70, seed=0):
    """Coloured blobs, sharp boxes and a little noise, moving."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    base = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    base[height // 4 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    base = np.clip(base + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8)
    return np.stack([np.roll(base, 3 * i, axis=1) for i in range(frames)])


# edge


@pytest.mark.parametrize("preset", EDGE)
@pytest.mark.parametrize("size", [(48, 64), (51, 37)])
def test_edge_is_canny_on_the_rgb_frame(preset, size):
    frames = clip(5, *size)
    low, high = EDGE[preset]
    out = c.edge(frames, preset)
    assert out.shape == frames.shape and out.dtype == np.uint8 and out.flags.c_contiguous
    for got, frame in zip(out, frames, strict=True):
        want = cv2.Canny(np.ascontiguousarray(frame), low, high, apertureSize=3, L2gradient=False)
        for channel in range(3):
            assert np.array_equal(got[..., channel], want)
    assert set(np.unique(out)) == {0, 255}


@pytest.mark.parametrize("preset", EDGE)
def test_edge_thresholds_in_units_of_a_step(preset):
    # A step of height a has Sobel magnitude 4a, so the upper threshold lies between two heights.
    def edges(height):
        frame = np.zeros((1, 32, 32, 3), np.uint8)
        frame[:, :, 16:, 1] = height  # in one channel only: a grey conversion would halve it
        return c.edge(frame, preset).any()

    _, high = EDGE[preset]
    assert not edges(high // 4)
    assert edges(high // 4 + 1)


def test_edge_lower_threshold_extends_strong_edges():
    # The upper half of the step is strong, the lower half lies between the two thresholds and hangs on to it.
    frame = np.zeros((1, 32, 32, 3), np.uint8)
    frame[:, :16, 16:] = 60
    frame[:, 16:, 16:] = 35
    rows = c.edge(frame, "medium")[0, :, :, 0].any(axis=1)
    assert rows[20:28].all()
    frame[:, 16:, 16:] = 24  # 4 * 24 is below the lower threshold
    assert not c.edge(frame, "medium")[0, 20:28, 14:18].any()


def test_edge_takes_neither_bgr_nor_grey():
    frames = clip(4, 96, 96, seed=3)
    grey = np.stack([cv2.cvtColor(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for f in frames])
    edges = c.edge(frames, "very_low")
    assert (edges != c.edge(grey, "very_low")).mean() > 0.01
    # On equal magnitudes the first channel gives the direction, so the channel order matters a little.
    assert 0 < (edges != c.edge(frames[..., ::-1], "very_low")).mean() < 0.05


def test_fewer_edges_with_a_higher_preset():
    counts = [np.count_nonzero(c.edge(clip(3, 96, 96), preset)) for preset in c.PRESETS]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1] > 0


def test_default_presets_are_medium():
    frames = clip(2)
    assert np.array_equal(c.edge(frames), c.edge(frames, "medium"))
    assert np.array_equal(c.vis(frames), c.vis(frames, "medium"))


# vis


def blur_step_by_step(frames, before, after):
    height, width = frames.shape[1:3]
    stage = []
    for frame in frames:
        small = cv2.resize(frame, (width // before, height // before), interpolation=cv2.INTER_AREA)
        small = cv2.bilateralFilter(small, 30, 150, 100)
        stage.append(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR))
    x = torch.from_numpy(np.stack(stage).transpose(0, 3, 1, 2).copy())
    for size in ((int(height / after), int(width / after)), (height, width)):
        y = interpolate(x.to(torch.float32), size, mode="bicubic", align_corners=False, antialias=True)
        x = torch.round(torch.clamp(y, 0, 255)).to(torch.uint8)
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("preset", BLUR)
@pytest.mark.parametrize("size", [(48, 64), (51, 37)])
def test_vis_is_the_published_recipe(preset, size):
    frames = clip(6, *size)
    out = c.vis(frames, preset)
    assert out.shape == frames.shape and out.dtype == np.uint8 and out.flags.c_contiguous
    assert np.array_equal(out, blur_step_by_step(frames, *BLUR[preset]))


def test_vis_leaves_a_flat_clip_flat():
    frames = np.full((2, 33, 47, 3), (10, 128, 250), np.uint8)
    for preset in c.PRESETS:
        assert np.array_equal(c.vis(frames, preset), frames)


def test_bicubic_overshoot_is_cut_not_wrapped():
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 255
    out = c.vis(frames, "very_low")
    assert np.array_equal(out, blur_step_by_step(frames, *BLUR["very_low"]))
    assert (np.diff(out[0, 32, :, 0].astype(int)) >= -8).all(), (
        "a rising step must not fall from white to black"
    )


def detail(frames):
    return sum(np.abs(np.diff(frames.astype(int), axis=axis)).sum() for axis in (1, 2))


@pytest.mark.parametrize(("weak", "strong"), [("very_low", "high"), ("low", "very_high")])
def test_blur_grows_with_the_bicubic_factor(weak, strong):
    frames = clip(3, 96, 128)
    assert detail(frames) > detail(c.vis(frames, weak)) > 1.3 * detail(c.vis(frames, strong))


def test_blur_grows_with_the_first_shrink():
    frames = clip(3, 96, 128)
    assert detail(c.vis(frames, "very_low")) > detail(c.vis(frames, "low"))
    assert detail(c.vis(frames, "high")) > detail(c.vis(frames, "very_high"))


def test_vis_refuses_a_picture_smaller_than_its_shrink():
    with pytest.raises(MediaError, match="very_high needs at least 16 pixels, got 20x15"):
        c.vis(np.zeros((1, 15, 20, 3), np.uint8), "very_high")


# both


@pytest.mark.parametrize("make", [c.edge, c.vis])
def test_result_depends_on_neither_threads_nor_calls(make):
    frames = clip(11, 40, 56)
    one = make(frames, "low", threads=1)
    assert np.array_equal(one, make(frames, "low", threads=5))
    assert np.array_equal(one, np.concatenate([make(frames[i : i + 1], "low") for i in range(11)]))
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        assert np.array_equal(one, make(frames, "low"))
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("make", [c.edge, c.vis])
def test_input_stays_as_it_was_and_need_not_be_contiguous(make):
    wide = clip(2, 40, 112)
    frames = wide[:, :, ::2]
    copy = frames.copy()
    assert np.array_equal(make(frames), make(np.ascontiguousarray(frames)))
    assert np.array_equal(frames, copy)


@pytest.mark.parametrize(
    ("make", "field"), [(c.edge, "preset_edge_threshold"), (c.vis, "preset_blur_strength")]
)
def test_unknown_preset_is_refused(make, field):
    with pytest.raises(SpecError, match=f"{field}: must be one of very_low, low, .*, got 'strong'"):
        make(clip(1), "strong")


@pytest.mark.parametrize("make", [c.edge, c.vis])
@pytest.mark.parametrize(
    "frames", [np.zeros((1, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)]
)
def test_what_is_no_clip_is_refused(make, frames):
    with pytest.raises(MediaError, match=r"uint8 \(F, H, W, 3\), got"):
        make(frames)


def test_a_failure_in_a_worker_reaches_the_caller(monkeypatch):
    def fail(*_):
        raise cv2.error("broken")

    monkeypatch.setattr(c.cv2, "Canny", fail)
    with pytest.raises(cv2.error, match="broken"):
        c.edge(clip(9))


# makers


def test_opencv_starts_no_threads_of_its_own_and_gets_its_number_back(monkeypatch):
    before, seen = cv2.getNumThreads(), []
    canny = cv2.Canny
    monkeypatch.setattr(cv2, "Canny", lambda *given: seen.append(cv2.getNumThreads()) or canny(*given))
    cv2.setNumThreads(3)
    try:
        with c._one_thread_a_call():  # another caller, who is not done when the next one is
            c.edge(clip(2))
            assert cv2.getNumThreads() == 1
        assert cv2.getNumThreads() == 3 and seen == [1, 1]
    finally:
        cv2.setNumThreads(before)


def test_built_in_makers_use_the_preset_of_the_request():
    frames = clip(2)
    control = SimpleNamespace(preset_edge_threshold="low", preset_blur_strength="high")
    made = {
        name: c.find_maker(name).make(frames, control, source=None, start=0, stop=2)
        for name in ("edge", "vis")
    }
    assert np.array_equal(made["edge"], c.edge(frames, "low"))
    assert np.array_equal(made["vis"], c.vis(frames, "high"))
    assert all(maker.name == name for name, maker in c.MAKERS.items())


@pytest.mark.parametrize(("name", "words"), [("depth", "a depth video"), ("seg", "a segmentation video")])
def test_missing_maker_names_the_file_to_give(name, words):
    with pytest.raises(
        EnvironmentProblem, match=rf"{name}: .*got none for {name}\. Give {name}\.control_path {words}"
    ):
        c.find_maker(name)


def test_own_maker_is_found():
    maker = SimpleNamespace(name="depth")
    assert c.find_maker("depth", {**c.MAKERS, "depth": maker}) is maker
    assert "depth" not in c.MAKERS
    with pytest.raises(SpecError, match="got 'blur'"):
        c.find_maker("blur")


def test_mask_prompt_names_the_file_to_give():
    problem = c.mask_prompt_problem("vis", "the red car")
    assert isinstance(problem, EnvironmentProblem)
    assert "vis.mask_prompt" in str(problem) and "'the red car'" in str(problem)
    assert "Give vis.mask_path a mask video" in str(problem)


def test_filters_cover_every_control():
    assert dict(c.CONTROL_FILTER) == {"edge": "linear", "vis": "area", "depth": "linear", "seg": "nearest"}
    assert tuple(c.CONTROL_FILTER) == CONTROLS
    assert c.MASK_FILTER == "linear" and dict(c.GUIDED_FILTER) == {".mp4": "area", ".npz": "linear"}


# masks and pictures


def test_binary_mask_is_the_first_channel_above_the_middle():
    frames = np.zeros((1, 1, 4, 3), np.uint8)
    frames[0, 0, :, 0] = (0, 127, 128, 255)
    frames[0, 0, 0, 1:] = 255
    mask = c.binary_mask(frames)
    assert mask.dtype == np.bool_ and mask.tolist() == [[[False, False, True, True]]]


def test_masked_preview_blackens_the_outside():
    control, mask = clip(2), np.zeros((2, 50, 70), bool)
    mask[1, 10:20] = True
    out = c.masked_preview(control, mask)
    assert out.dtype == np.uint8
    assert np.array_equal(out[mask], control[mask]) and not out[~mask].any()
    with pytest.raises(ValueError, match="must be bool"):
        c.masked_preview(control, mask.astype(np.uint8))


def test_side_by_side_keeps_the_order_given():
    left, right = clip(2, 8, 12), clip(2, 8, 20, seed=1)
    out = c.side_by_side([left, right])
    assert out.shape == (2, 8, 32, 3)
    assert np.array_equal(out[:, :, :12], left) and np.array_equal(out[:, :, 12:], right)
    with pytest.raises(ValueError, match="share frames and height"):
        c.side_by_side([left, right[:1]])


def test_palette_equals_the_published_one():
    assert np.array_equal(c.PALETTE, np.load(GOLDEN / "segcolor.npz")["predefined"])


def test_masks_are_painted_largest_first_as_published():
    pinned = np.load(GOLDEN / "segcolor.npz")
    masks, want = pinned["masks"], pinned["colored_seed0"].transpose(1, 2, 3, 0)
    # One pixel that each object alone shows.
    colors = np.stack([want[0, 0, 0], want[0, 0, 5], want[0, 7, 7]])
    assert np.array_equal(c.color_masks(masks, colors), want)
    order = [1, 2, 0]
    assert np.array_equal(c.color_masks(masks[order], colors[order]), want)


def test_more_objects_than_colours_start_over():
    masks = np.eye(24, dtype=bool)[:, None, None]
    out = c.color_masks(masks)
    assert np.array_equal(out[0, 0, 23], out[0, 0, 0]) and np.array_equal(out[0, 0, 22], [255, 255, 255])
