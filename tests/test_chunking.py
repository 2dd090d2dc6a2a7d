"""Chunk plan, padding, seeds, pixels, weights and guided masks against pinned values and first principles."""

from __future__ import annotations

import json
import random
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from cosmos_fast import chunking as c
from cosmos_fast.formats import CONTROLS, MediaError, SpecError

GOLDEN = Path(__file__).parent / "golden"
CHUNKING = json.loads((GOLDEN / "chunking.json").read_text())
ALIGNMENT = json.loads((GOLDEN / "control_weight_alignment_full.json").read_text())


# plan


@pytest.mark.parametrize("key", CHUNKING["chunk_plan"])
def test_plan_equals_the_published_one(key):
    total, overlap, size = (int("".join(filter(str.isdigit, part))) for part in key.split("_"))
    pinned = CHUNKING["chunk_plan"][key]
    plan = c.chunk_plan(total, size, overlap)
    assert len(plan) == pinned["num_chunks"]
    # The published slices count the clip after its first padding; ours name real source frames only.
    assert [[x.start, x.stop] for x in plan] == [[a, min(b, total)] for a, b in pinned["slices"]]
    assert [x.index for x in plan] == list(range(len(plan)))
    assert {x.length for x in plan} == {size}


@pytest.mark.parametrize(
    ("frames", "overlap", "chunks"),
    [
        *[(93, 1, 1), (94, 1, 2), (185, 1, 2), (186, 1, 3), (277, 1, 3), (278, 1, 4), (400, 1, 5)],
        *[(184, 2, 2), (185, 2, 3), (186, 0, 2)],
    ],
)
def test_number_of_chunks(frames, overlap, chunks):
    assert len(c.chunk_plan(frames, 93, overlap)) == chunks


@given(st.integers(1, 3000), st.sampled_from([5, 9, 17, 93]), st.integers(0, 4))
def test_chunks_show_every_frame_exactly_once(frames, size, overlap):
    plan = c.chunk_plan(frames, size, overlap)
    assert sum(x.keep for x in plan) == frames
    shown = []
    for x in plan:
        source = [x.start + i for i in c.mirror_index(x.stop - x.start, x.length)]
        assert len(source) == x.length == size
        assert len(source[x.kept]) == x.keep >= 1
        shown += source[x.kept]
    assert shown == list(range(frames))
    assert [x.drop for x in plan] == [0] + [overlap] * (len(plan) - 1)


@given(st.integers(1, 500), st.integers(0, 2))
def test_image_mode_makes_one_frame_of_any_clip(frames, overlap):
    assert c.chunk_plan(frames, 1, overlap) == [c.Chunk(0, 0, 1, 0, 1, 1)]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 93, 1), MediaError, "at least one frame, got 0"),
        ((10, 92, 1), SpecError, "4k\\+1, got 92"),
        ((10, 0, 1), SpecError, "got 0"),
        ((10, 5, 5), SpecError, "below the chunk's 5, got 5"),
        ((10, 5, -1), SpecError, "negative, got -1"),
    ],
)
def test_impossible_plans_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        c.chunk_plan(*arguments)


def test_conditional_latents():
    assert [c.conditional_latents(0, n) for n in (0, 1, 2)] == [0, 0, 0]
    assert [c.conditional_latents(3, n) for n in (0, 1, 2, 4, 5)] == [0, 1, 1, 1, 2]


# padding


@pytest.mark.parametrize("n", [n for n in CHUNKING["pad_index_map_to_93"] if n != "to5"])
def test_mirror_to_93_equals_the_published_map(n):
    assert c.mirror_index(int(n), 93) == CHUNKING["pad_index_map_to_93"][n]


@pytest.mark.parametrize("n", CHUNKING["pad_index_map_to_93"]["to5"])
def test_mirror_to_5_equals_the_published_map(n):
    assert c.mirror_index(int(n), 5) == CHUNKING["pad_index_map_to_93"]["to5"][n]


@given(st.integers(1, 200), st.integers(1, 200))
def test_mirror_stays_in_range_moves_by_one_and_never_returns_to_frame_0(n, length):
    index = c.mirror_index(n, length)
    assert len(index) == max(n, length)
    assert index[:n] == list(range(n))
    assert all(abs(b - a) <= 1 for a, b in pairwise(index))
    assert max(index) == n - 1
    if n > 1:
        assert min(index[1:]) >= 1


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_pad_moves_whole_frames(kind):
    clip = kind(np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3))
    out = c.pad(clip, 9)
    assert type(out) is type(clip) and out.dtype == clip.dtype
    assert out.shape == (9, 2, 2, 3)
    for got, want in zip(out, (0, 1, 2, 2, 1, 1, 2, 2, 1), strict=True):
        assert (got == clip[want]).all()
    assert c.pad(clip, 3) is clip
    with pytest.raises(MediaError, match="got 0"):
        c.pad(clip[:0], 9)


# seeds


@pytest.mark.parametrize("seed", CHUNKING["seed_chain_per_chunk"])
def test_seed_chain_equals_the_published_one(seed):
    assert c.seed_chain(int(seed), 6) == CHUNKING["seed_chain_per_chunk"][seed]


def test_seed_chain_of_the_specification_table():
    assert c.seed_chain(1234, 6) == [815965, 480968, 596503, 898338, 608448, 477153]


def test_both_ends_of_the_seed_range_are_drawn():
    assert c.seed_chain(581867, 1) == [0]
    assert c.seed_chain(3192120, 1) == [1_000_000]


@given(st.integers(-(2**40), 2**40), st.integers(0, 4))
def test_seed_chain_is_a_chain_and_leaves_global_randomness_alone(seed, n):
    before = random.getstate()
    seeds = c.seed_chain(seed, n + 1)
    assert random.getstate() == before
    assert c.seed_chain(seeds[0], n) == seeds[1:]
    assert c.seed_chain(-seed, n + 1) == seeds
    assert all(0 <= s <= 1_000_000 for s in seeds)


# pixels


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_black_is_every_pixel_of_the_chunk(kind):
    clip = np.zeros((5, 4, 4, 3), np.uint8)
    assert c.is_black(kind(clip))
    clip[4, 3, 3, 2] = 1
    assert not c.is_black(kind(clip))


def test_black_in_model_range():
    model = torch.full((1, 3, 5, 4, 4), -1.0, dtype=torch.bfloat16)
    assert c.is_black(model)
    assert not c.is_black(torch.zeros_like(model)), "0 is grey in model range"


# weights


@pytest.mark.parametrize("row", range(len(ALIGNMENT)))
def test_weights_follow_their_control_in_every_mixed_batch(row):
    case = ALIGNMENT[row]
    names = CONTROLS if len(case["union"]) > 1 else tuple(case["union"])
    assert c.weight_vector(names, case["sample"]) == case["intended"]
    shuffled = dict(reversed(case["sample"].items()))
    assert c.weight_vector(names, shuffled) == case["intended"]


def test_alignment_table_is_whole():
    assert len(ALIGNMENT) == 65


def test_scalar_weights_are_not_capped():
    assert c.weight_vector(CONTROLS, dict.fromkeys(CONTROLS, 1.0)) == [1.0] * 4


def test_weight_without_branch_is_refused():
    with pytest.raises(SpecError, match="branches edge, got depth"):
        c.weight_vector(("edge",), {"depth": 1.0})


def _golden_masks():
    pinned = np.load(GOLDEN / "weightmaps.npz")
    masks = [mask[0, 0] > 0.5 for mask in pinned["masks"]]
    # The stored `weights` are in the order of the generator's arguments; the maps carry 0.8 then 0.7.
    weights = [float(scaled.max()) for scaled in pinned["scaled"]]
    return (
        pinned,
        dict(zip(("edge", "vis"), masks, strict=True)),
        dict(zip(("edge", "vis"), weights, strict=True)),
    )


def _direct(masks, weights, names, dtype):
    """The published order of operations, over whole frames, in `dtype` throughout."""
    shape = next(iter(masks.values())).shape
    stack = []
    for name in names:
        mask = torch.as_tensor(masks.get(name, np.ones(shape, bool))).to(dtype)
        stack.append(mask * weights.get(name, 0.0))
    maps = torch.stack(stack)[:, None]
    frames, height, width = shape
    grid = (height // 16, width // 16)
    kind = {"mode": "trilinear", "align_corners": False}
    parts = [interpolate(maps[:, :, :1], size=(1, *grid), **kind)]
    if frames > 1:
        parts.append(interpolate(maps[:, :, 1:], size=((frames - 1) // 4, *grid), **kind))
    maps = torch.cat(parts, 2)[:, 0]
    return maps * (1 / maps.sum(0, keepdim=True).clamp(min=1))


def test_weight_maps_equal_the_published_ones():
    pinned, masks, weights = _golden_masks()
    out = c.weight_maps(masks, weights, ("edge", "vis"), torch.float32)
    assert out.shape == (2, 2, 2, 3)
    assert np.array_equal(out.numpy(), pinned["out"][:, 0, ..., 0])
    assert (out.sum(0) <= 1 + 1e-6).all() and (out.sum(0) > 0.999).any(), "the case must exercise the cap"


def test_weight_maps_in_bf16_round_at_every_step():
    pinned, masks, weights = _golden_masks()
    out = c.weight_maps(masks, weights, ("edge", "vis"))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, _direct(masks, weights, ("edge", "vis"), torch.bfloat16))
    # Three roundings at most, each 2**-9 of a value below 1.
    assert np.abs(out.float().numpy() - pinned["out"][:, 0, ..., 0]).max() <= 3 * 2**-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_weight_maps_equal_whole_frame_interpolation(frames, dtype):
    rng = np.random.default_rng(frames)
    for weights in ({"edge": 1.0, "depth": 0.3, "seg": 0.55}, {"edge": 0.1, "depth": 0.2}, {"depth": 0.37}):
        masks = {"depth": rng.random((frames, 48, 32)) < 0.6}
        out = c.weight_maps(masks, weights, CONTROLS, dtype)
        assert out.shape == (4, 1 + (frames - 1) // 4, 3, 2)
        assert torch.equal(out, _direct(masks, weights, CONTROLS, dtype))
        assert not out[1].any(), "a branch without a control has no weight"


def test_trivial_masks_give_no_maps():
    whole = np.ones((5, 32, 32), bool)
    assert c.weight_maps({}, {"edge": 1.0}, CONTROLS) is None
    assert c.weight_maps({"edge": None}, {"edge": 1.0}, CONTROLS) is None
    assert c.weight_maps({"edge": whole}, {"edge": 1.0, "vis": 1.0}, CONTROLS) is None


def test_one_real_mask_caps_the_unmasked_controls_too():
    almost = np.ones((5, 32, 32), bool)
    almost[0, 0, 0] = False  # far from any block centre: the map itself is all ones
    out = c.weight_maps({"edge": almost}, dict.fromkeys(CONTROLS, 1.0), CONTROLS)
    assert torch.equal(out, torch.full_like(out, 0.25))


def test_weight_map_reads_the_middle_of_each_block_and_group():
    mask = np.zeros((5, 32, 32), bool)
    mask[2:4, 7:9, 23:25] = True  # second and third frame of the group, middle 2x2 of block (0, 1)
    out = c.weight_maps({"vis": mask}, {"vis": 0.5}, ("vis",), torch.float32)
    want = torch.zeros(1, 2, 2, 2)
    want[0, 1, 0, 1] = 0.5
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("masks", "weights", "words"),
    [
        ({"edge": np.zeros((5, 32, 32), bool)}, {"vis": 1.0}, "needs its control, got a mask for 'edge'"),
        ({"vis": np.zeros((5, 32, 32), np.uint8)}, {"vis": 1.0}, "must be bool"),
        ({"vis": np.zeros((5, 40, 32), bool)}, {"vis": 1.0}, "multiples of 16, got 40x32"),
        ({"vis": np.zeros((4, 32, 32), bool)}, {"vis": 1.0}, "4k\\+1, got 4"),
        (
            {"vis": np.zeros((5, 32, 32), bool), "edge": np.zeros((9, 32, 32), bool)},
            {"vis": 1.0, "edge": 1.0},
            "one shape",
        ),
    ],
)
def test_unusable_masks_are_refused(masks, weights, words):
    with pytest.raises(ValueError, match=words):
        c.weight_maps(masks, weights, CONTROLS)


# guided generation


def test_guided_map_equals_the_published_one():
    pinned = np.load(GOLDEN / "weightmaps.npz")
    out = c.guided_map(pinned["guided_mask"][0, 0])
    assert out.dtype == torch.float32 and out.shape == (3, 4, 6)
    assert np.array_equal(np.broadcast_to(out.numpy(), (16, 3, 4, 6)), pinned["guided_latent"][0])


def test_guided_map_of_one_frame_and_of_a_constant():
    one = torch.rand(1, 16, 24)
    middle = (
        one[:, 3::8][:, :, 3::8]
        + one[:, 4::8][:, :, 3::8]
        + one[:, 3::8][:, :, 4::8]
        + one[:, 4::8][:, :, 4::8]
    )
    assert torch.allclose(c.guided_map(one), middle / 4, atol=1e-7)
    assert torch.equal(c.guided_map(torch.ones(9, 16, 16)), torch.ones(3, 2, 2))


def test_guided_map_refuses_raw_bytes():
    with pytest.raises(ValueError, match=r"float \(F, H, W\), got torch\.uint8"):
        c.guided_map(np.full((5, 16, 16), 255, np.uint8))


def test_label_mask_keeps_the_named_labels(tmp_path):
    path = tmp_path / "labels.npz"
    labels = np.array([[[0, 1, 2], [-3, 300, 0]]])
    np.savez(path, labels)
    every, some = c.read_label_mask(path), c.read_label_mask(path, [2, 300])
    assert every.dtype == some.dtype == np.uint8
    assert every.tolist() == [[[0, 255, 255], [255, 255, 0]]]
    assert some.tolist() == [[[0, 0, 255], [0, 255, 0]]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_label_mask_of_any_number_type_reaches_255(tmp_path, dtype):
    path = tmp_path / "mask.npz"
    array = np.zeros((2, 3, 4), dtype)
    array[1, 2, 3] = 1
    np.savez_compressed(path, array)
    out = c.read_label_mask(str(path))
    assert out[1, 2, 3] == 255 and out.sum() == 255


def test_label_zero_stays_background(tmp_path):
    path = tmp_path / "mask.npz"
    np.savez(path, np.array([[[0, 1]]]))
    assert c.read_label_mask(path, [0, 1]).tolist() == [[[0, 255]]]


def _write(tmp_path, what):
    path = tmp_path / "mask.npz"
    if isinstance(what, np.ndarray):
        np.savez(path, what)
    elif what == "text":
        path.write_text("not an archive")
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "cut":
        np.savez(path, np.ones((4, 8, 8)))
        path.write_bytes(path.read_bytes()[:100])
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", b"junk")
    elif what == "bare":
        with path.open("wb") as file:
            np.save(file, np.ones((4, 8, 8)))
    elif what == "pickle":
        np.savez(path, np.array([[[{}]]], dtype=object))
    elif what == "named":
        np.savez(path, masks=np.ones((4, 8, 8)))
    else:
        assert what == "missing"
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "No such file"),
        ("text", "plain numbers"),
        ("empty", "plain numbers"),
        ("cut", "plain numbers"),
        ("zip", "got 4 bytes of other data"),
        ("bare", "named arr_0, got none"),
        ("pickle", "plain numbers"),
        ("named", "named arr_0, got masks"),
        (np.ones((4, 8)), "got shape \\(4, 8\\)"),
        (np.ones((4, 0, 8)), "got shape"),
        (np.full((1, 2, 2), np.nan), "finite"),
        (np.full((1, 2, 2), "a"), "boolean or finite numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.dtype}{x.shape}",
)
def test_bad_label_masks_are_named(tmp_path, what, words):
    path = _write(tmp_path, what)
    with pytest.raises(MediaError, match=words) as caught:
        c.read_label_mask(path)
    assert str(path) in str(caught.value)


def test_labels_that_select_nothing_are_refused(tmp_path):
    path = tmp_path / "mask.npz"
    np.savez(path, np.array([[[0, 4, 7]]]))
    with pytest.raises(MediaError, match=r"labels \[5\], got only 0, 4, 7"):
        c.read_label_mask(path, [5])
    with pytest.raises(SpecError, match="got \\[\\]"):
        c.read_label_mask(path, [])
