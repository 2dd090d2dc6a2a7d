"""Boxes, colours, painting and packed masks, on numbers small enough to work out by hand."""

from __future__ import annotations

import colorsys
import errno
import random

import numpy as np
import pytest

from cosmos_fast import segments
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.segments import (
    MaskStore,
    Patch,
    box_of,
    colours,
    detector_size,
    new_boxes,
    overlap,
    paint,
    painting_order,
    pick_boxes,
    union,
)

SIZE = (8, 6)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((SIZE[1], SIZE[0]), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def stored(*masks: dict[int, np.ndarray]) -> MaskStore:
    store = MaskStore()
    for frame in masks:
        store.append(frame)
    return store


# --- boxes ---


def test_boxes_become_corners_in_pixels_best_first_and_stay_unclipped():
    scores = np.array([0.2, 0.9, 0.15, 0.5, 0.5], np.float32)
    boxes = np.array(
        [[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1], [0, 0, 1, 1], [0, 0.5, 0.2, 1], [1, 1, 1, 1]], np.float32
    )
    found = pick_boxes(scores, boxes, (200, 100))
    # 0.15 does not exceed the threshold of 0.15; equal scores keep their order.
    np.testing.assert_allclose(
        found, [[0, 0, 100, 100], [-20, 0, 20, 100], [100, 50, 300, 150], [0, 0, 200, 100]], atol=1e-4
    )
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("scores", "kept"), [([0.16, 0.12], 1), ([0.15, 0.12], 2), ([0.12, 0.10], 1), ([0.10, 0.05], 0)]
)
def test_the_lower_threshold_counts_only_when_no_box_exceeds_the_first(scores, kept):
    boxes = np.full((2, 4), 0.5, np.float32)
    assert len(pick_boxes(np.array(scores, np.float64), boxes, SIZE)) == kept


def test_without_the_lower_threshold_there_is_no_second_try():
    assert len(pick_boxes(np.array([0.12]), np.full((1, 4), 0.5), SIZE, (0.15,))) == 0


def test_doubles_of_the_first_frame_all_stay():
    assert len(pick_boxes(np.array([0.9, 0.8]), np.full((2, 4), 0.5), SIZE)) == 2


def test_the_box_around_a_mask():
    assert box_of(rectangle(2, 1, 5, 4)) == (2, 1, 5, 4)
    assert box_of(rectangle(0, 0, 8, 6)) == (0, 0, 8, 6)
    assert box_of(rectangle(7, 5, 8, 6)) == (7, 5, 8, 6)
    assert box_of(np.zeros((6, 8), bool)) is None


def test_overlap_by_hand():
    others = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [4, 0, 8, 4], [1, 1, 3, 3], [2, 2, 2, 2]])
    np.testing.assert_allclose(overlap((0, 0, 4, 4), others), [1, 8 / 24, 0, 4 / 16, 0])
    assert overlap((2, 2, 2, 2), np.array([[2, 2, 2, 2]])) == [0]


def test_a_later_box_is_new_only_if_it_is_nobodys_and_no_double():
    boxes = np.array([[0, 0, 4, 4], [10, 0, 14, 4], [10, 0, 14, 5], [20, 0, 24, 4]], np.float32)
    np.testing.assert_array_equal(new_boxes(boxes, [(0, 0, 4, 5)]), boxes[[1, 3]])
    np.testing.assert_array_equal(new_boxes(boxes, []), boxes[[0, 1, 3]])
    assert new_boxes(boxes[:0], [(0, 0, 1, 1)]).shape == (0, 4)
    half = np.array([[0, 0, 4, 4]], np.float32)
    assert len(new_boxes(half, [(0, 0, 4, 8)])) == 0  # exactly one half is the same object
    assert len(new_boxes(half, [(0, 0, 4, 8.1)])) == 1


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((1280, 720), (750, 1333)),  # the long side is the limit
        ((720, 1280), (1333, 750)),
        ((640, 480), (800, 1066)),
        ((480, 640), (1066, 800)),
        ((1000, 800), (800, 1000)),
        ((500, 500), (800, 800)),
        ((7680, 240), (42, 1333)),
    ],
)
def test_size_the_detector_sees(size, seen):
    assert detector_size(size, 800, 1333) == seen


# --- colours ---


def test_colours_follow_the_documented_draw_from_a_fixed_seed():
    draw = random.Random(0)
    for row in colours(3):
        hue, saturation, value = draw.random(), 0.1 + 0.9 * draw.random(), 0.2 + 0.8 * draw.random()
        expected = [int(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value)]
        np.testing.assert_array_equal(row, expected)
    # Written out: another Python, NumPy or machine must give the same control.
    assert colours(2).tolist() == [[136, 29, 129], [92, 133, 58]]


def test_colours_do_not_depend_on_their_number_and_are_never_black():
    palette = colours(100)
    np.testing.assert_array_equal(palette[:7], colours(7))
    assert palette.max(axis=1).min() >= 51
    assert len(np.unique(palette, axis=0)) == 100
    assert (colours(5, seed=1) != colours(5)).any()
    assert colours(0).shape == (0, 3)


# --- painting ---


def test_largest_over_the_whole_clip_is_painted_first_and_ties_go_by_rank():
    assert painting_order({0: 5, 1: 9, 2: 5, 3: 10}) == [3, 1, 0, 2]


def test_the_order_comes_from_the_clip_not_from_the_frame():
    """Object 0 is the smaller one in frame 0 but the larger one in all: it lies below in both."""
    store = stored(
        {0: rectangle(0, 0, 2, 2), 1: rectangle(1, 0, 5, 4)},
        {0: rectangle(0, 0, 8, 6), 1: rectangle(1, 1, 2, 2)},
    )
    assert store.areas == {0: 4 + 48, 1: 16 + 1}
    order, palette = painting_order(store.areas), colours(2)
    first, second = (paint(store.read(i), order, palette, SIZE) for i in range(2))
    assert first.shape == (6, 8, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first[0, 1], palette[1])  # where both are
    np.testing.assert_array_equal(first[1, 0], palette[0])
    np.testing.assert_array_equal(first[5, 7], 0)
    np.testing.assert_array_equal(second[1, 1], palette[1])
    np.testing.assert_array_equal(second[1, 2], palette[0])


def test_union_is_white_where_any_object_is():
    store = stored({3: rectangle(0, 0, 2, 2), 99: rectangle(1, 1, 4, 3)}, {})
    frame = union(store.read(0), SIZE)
    expected = (rectangle(0, 0, 2, 2) | rectangle(1, 1, 4, 3)) * np.uint8(255)
    np.testing.assert_array_equal(frame, np.repeat(expected[..., None], 3, 2))
    assert not union(store.read(1), SIZE).any()


# --- masks on disk ---


@pytest.mark.parametrize("seed", range(4))
def test_masks_come_back_as_they_went_in(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, 2))
    frames = [
        {
            int(name): rng.random(shape) < rng.random() ** 3
            for name in rng.permutation(5)[: rng.integers(0, 6)]
        }
        for _ in range(6)
    ]
    with stored(*frames) as store:
        assert len(store) == 6
        for index in (5, 0, 3, 1, 2, 4):  # in any order
            found = {}
            for patch in store.read(index):
                assert isinstance(patch, Patch)
                x0, y0, x1, y1 = patch.box
                full = np.zeros(shape, bool)
                full[y0:y1, x0:x1] = patch.mask
                found[patch.name] = full
            expected = {name: mask for name, mask in frames[index].items() if mask.any()}
            assert list(found) == list(expected)
            for name, mask in expected.items():
                np.testing.assert_array_equal(found[name], mask)
        totals: dict[int, int] = {}
        for frame in frames:
            for name, mask in frame.items():
                totals[name] = totals.get(name, 0) + int(mask.sum())
        assert store.areas == totals


def test_an_object_that_is_never_there_has_no_area_and_no_patch():
    store = stored({0: np.zeros((6, 8), bool)})
    assert store.areas == {0: 0} and store.read(0) == []


def test_large_masks_take_little_room():
    """20 objects in one frame of 1080p are 41 MB as bytes; packed, under 100 kB."""
    y, x = np.mgrid[:1080, :1920]
    masks = {i: (x - 90 * i - 60) ** 2 + (y - 500) ** 2 < 300**2 for i in range(20)}
    with stored(masks) as store:
        assert store._ends[-1] < 100_000


def test_a_full_disk_is_a_problem_of_the_machine_and_says_what_to_do():
    class Full:
        def seek(self, at):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    store = MaskStore()
    store._file.close()
    store._file = Full()
    with pytest.raises(EnvironmentProblem, match=r"temporary folder .* must take \d+ bytes.*point TMPDIR"):
        store.append({0: rectangle(0, 0, 2, 2)})


def test_published_numbers():
    assert segments.BOX_THRESHOLDS == (0.15, 0.10)
    assert segments.MAX_OBJECTS == 100
