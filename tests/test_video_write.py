"""Writing: exact rates, sizes and colours; complete under the final name or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
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
from media import COLOURS, patches, planes, read, squares

from cosmos_fast import video_write
from cosmos_fast.formats import EnvironmentProblem, MediaError
from cosmos_fast.video import Limits, Writer, bit_rate, even_size, probe, write_image

ROOT = Path(__file__).resolve().parents[1]


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


def test_data_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (order.append(name), real(*args))[1]
        )
    with Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(3))
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, its folder


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


def test_a_finished_file_has_its_name_only_when_it_is_closed(tmp_path: Path) -> None:
    with Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(5))
        writer.finish()
        writer.finish()
        assert os.listdir(tmp_path) == ["c.part.mp4"]
        with pytest.raises(MediaError, match="frames must come before close"):
            writer.write(media.pattern(1))
    assert os.listdir(tmp_path) == ["c.mp4"] and probe(tmp_path / "c.mp4").frames == 5
    with pytest.raises(RuntimeError), Writer(tmp_path / "d.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(5))
        writer.finish()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["c.mp4"]


def test_threads_of_the_encoder_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    with Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        codec = writer._stream.codec_context
        assert (str(codec.thread_type), codec.thread_count) == ("ThreadType.FRAME", 8)
        # A buffer model (VBV) in libx264 makes bytes depend on the order in which threads come along.
        assert "bufsize" not in codec.options
        writer.write(media.pattern(2))


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    """Noise at more than the bit rate: the rate control has to work, and every thread with it."""
    frames = np.random.default_rng(0).integers(0, 256, (24, 192, 256, 3), dtype=np.uint8)
    digests = set()
    for turn in range(3):
        path = tmp_path / f"{turn}.mp4"
        with Writer(path, (256, 192), 60) as writer:
            writer.write(frames)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1 and path.stat().st_size < frames.nbytes / 3


# --- a finished file is the stream that decoded ---


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("index", [0, 17, 29])
def test_one_wrong_bit_in_the_file_is_noticed(
    tmp_path: Path, suffix: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Writer._verify

    def damaged(writer: Writer) -> None:
        with av.open(str(writer._part)) as container:
            packet = [p for p in container.demux(video=0) if p.size][index]
            at = packet.pos + packet.size - 3
        with open(writer._part, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0] ^ 1  # most such streams decode all the same
            file.seek(at)
            file.write(bytes([byte]))
        verify(writer)

    monkeypatch.setattr(Writer, "_verify", damaged)
    writer = Writer(tmp_path / f"c.{suffix}", (64, 48), 25)
    writer.write(media.pattern(30))
    with pytest.raises(EnvironmentProblem, match="hold the 30 packets that were encoded, got 30, 29 of"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_a_stream_that_does_not_decode_is_noticed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "c.mp4", (64, 48), 25)
    stream = writer._stream

    class Broken:
        """An encoder that writes nonsense from some frame on, with everything around it in order."""

        def encode(self, frame: av.VideoFrame | None) -> list[av.Packet]:
            return [self.changed(packet) if packet.pts >= 12 else packet for packet in stream.encode(frame)]

        def changed(self, packet: av.Packet) -> av.Packet:
            new = av.Packet(bytes(packet)[:5] + b"\xff" * (packet.size - 5))
            for name in ("pts", "dts", "time_base", "stream", "is_keyframe"):
                setattr(new, name, getattr(packet, name))
            return new

    writer._stream = Broken()
    with pytest.raises(EnvironmentProblem, match="what is written must decode"):
        writer.write(media.pattern(60))
        writer.finish()
    assert os.listdir(tmp_path) == []


def test_packets_with_start_codes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tuple(option for option in video_write.CODECS["libx264"].options if option[0] != "x264-params")
    plain = dataclasses.replace(video_write.CODECS["libx264"], options=old)
    monkeypatch.setitem(video_write.CODECS, "libx264", plain)
    with pytest.raises(EnvironmentProblem, match="libx264 must make packets with lengths.*PyAV 14"):
        Writer(tmp_path / "c.mp4", (64, 48), 25)
    assert os.listdir(tmp_path) == []


def test_few_frames_wait_for_the_end(tmp_path: Path) -> None:
    """What a clip waits for when its last frame is there: look-ahead, B-frames and threads."""
    with Writer(tmp_path / "c.mp4", (64, 48), 25) as writer:
        writer.write(media.pattern(60))
        waiting = 60 - len(writer._decoded._packets)  # type: ignore[union-attr]
        assert waiting == 10 + 3 + 8 + 1
        decoded = writer._decoded.frames  # type: ignore[union-attr]
        assert decoded >= 60 - waiting - 10  # of those that are out nearly all are decoded too
