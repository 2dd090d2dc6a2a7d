"""Damaged, mislabelled and hostile inputs: one clear MediaError each, never a wrong clip."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import media
import numpy as np
import pytest

from cosmos_fast import video_decode
from cosmos_fast.formats import MediaError
from cosmos_fast.video import Limits, Source, probe

ROOT = Path(__file__).resolve().parents[1]
GOP = {"g": "12"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 60 frames in every container, once."""
    folder = tmp_path_factory.mktemp("clips")
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    return {
        "mp4": media.write(folder / "c.mp4", 60, options=GOP),
        "fast": media.write(folder / "f.mp4", 60, options=GOP, container_options={"movflags": "faststart"}),
        "fragments": media.write(folder / "g.mp4", 60, options=GOP, container_options=fragments),
        "mkv": media.write(folder / "c.mkv", 60, options=GOP),
        "mkv with sound": media.write(folder / "s.mkv", 60, options=GOP, audio=True),
        "avi": media.write(folder / "c.avi", 60, codec="mpeg4"),
        "ts": media.write(folder / "c.ts", 60, options=GOP),
    }


def refused(path: Path, words: str, seconds: float = 5.0, **options: object) -> str:
    """The one-line message of the MediaError that probing must raise, in time."""
    begin = time.monotonic()
    with pytest.raises(MediaError, match=words) as caught:
        probe(path, **options)
    assert time.monotonic() - begin < seconds
    return str(caught.value)


# --- not media at all ----------------------------------------------------------------------------------

TEXTS = {
    "LFS pointer": (media.LFS_POINTER, "git lfs pull"),
    "text": ("just words\n", "a text file"),
    "JSON": ('{"prompt": "x"}', "a JSON file"),
    "m3u8": ("#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "playlist"),
    "concat script": ("ffconcat version 1.0\nfile /etc/passwd\n", "concat script"),
    "SDP": ("v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n", "SDP"),
    "XML": ('<?xml version="1.0"?><MPD/>', "XML"),
    "zeros": ("\0" * 5000, "only zero bytes"),
    "noise": ("\x01\x02" * 3000, "unknown kind"),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".png", ""])
def test_foreign_content_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    content, words = TEXTS[name]
    path = tmp_path / f"clip{suffix}"
    path.write_text(content, newline="")
    message = refused(path, words)
    assert message.startswith(f"{path}: must be a video")


def test_empty_file_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "got an empty file")
    refused(tmp_path / "none.mp4", "no such file")
    (tmp_path / "dangling.mp4").symlink_to("none.mp4")
    refused(tmp_path / "dangling.mp4", "link to none.mp4, which does not")
    refused(Path("nul\0byte.mp4"), "must be readable")
    refused(tmp_path / ("x" * 300 + ".mp4"), "File name too long")
    refused(Path("/" + "d/" * 3000 + "x.mp4"), "File name too long")


def test_folders_pipes_devices_and_sockets_are_not_opened(tmp_path: Path) -> None:
    refused(tmp_path, "must be a regular file, got a directory", 1)
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "got a named pipe", 1)
    refused(Path("/dev/zero"), "got a device", 1)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", "got a socket", 1)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.write(tmp_path / "c.mp4", 2)

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)  # file modes do not stop a test that runs as root
    with pytest.raises(MediaError, match="must be readable, got: Permission denied"):
        probe(path)


def test_content_must_fit_the_name(tmp_path: Path, clips: dict[str, Path]) -> None:
    refused(media.write_png(tmp_path / "i.mp4", media.corners()), "got PNG content named .mp4")
    (tmp_path / "c.png").write_bytes(clips["mp4"].read_bytes())
    refused(tmp_path / "c.png", "got MP4/MOV content named .png")
    (tmp_path / "c.mkv").write_bytes(clips["mp4"].read_bytes())
    assert probe(tmp_path / "c.mkv").frames == 60  # one video container under another's name is harmless


@pytest.mark.parametrize(
    "name", ["concat:a.mp4|b.mp4", "http://127.0.0.1:9/a.mp4", "subfile,,start,0,end,9,,:a.mp4"]
)
def test_protocols_are_only_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    media.write(tmp_path / "a.mp4", 3)
    refused(Path(name), "no such file", 1)


def test_demuxer_may_open_nothing_but_files_of_its_own_format(clips: dict[str, Path]) -> None:
    with video_decode.Decoder(clips["mp4"], "mov") as decoder:
        options = decoder.container.options
    assert options["protocol_whitelist"] == "file" and options["format_whitelist"] == "mov"
    with pytest.raises(MediaError, match="0 readable frames"):
        video_decode.Decoder(clips["mp4"], "matroska")


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [406, 3000, 0.5, 0.9])
@pytest.mark.parametrize("name", ["mp4", "fast", "fragments", "mkv", "mkv with sound", "avi"])
def test_cut_file_is_refused(tmp_path: Path, clips: dict[str, Path], name: str, size: int | float) -> None:
    message = refused(media.cut(clips[name], tmp_path / clips[name].name, size), "readable|codec")
    if name == "fast" and size != 406:  # its header is whole, so it tells how many frames there should be
        assert " of 60 frames readable" in message


def test_cut_file_keeps_what_it_has_and_pads_nothing(tmp_path: Path, clips: dict[str, Path]) -> None:
    path = media.cut(clips["fast"], tmp_path / "c.mp4", 0.6)
    found = probe(path, on_corrupt="warn")
    assert 0 < found.frames < 60 and found.corrupt == 60 - found.frames
    assert any(f"{found.frames} of 60 frames readable" in note for note in found.notes)
    with Source(probe(clips["fast"])) as whole, Source(found) as part:
        # The last frames before the cut may lean on lost ones; all others are the true ones, in place.
        sound = found.frames - 4
        assert np.array_equal(part.read(0, found.frames)[:sound], whole.read(0, sound))


def test_cut_transport_stream(tmp_path: Path, clips: dict[str, Path]) -> None:
    assert any("missing end cannot be noticed" in note for note in probe(clips["ts"]).notes)
    size = clips["ts"].stat().st_size // 376 * 188 + 50
    refused(media.cut(clips["ts"], tmp_path / "c.ts", size), "cleanly|spaced")


@pytest.mark.parametrize("name", ["fast", "mkv", "avi", "ts"])
def test_flipped_bytes_are_refused_or_counted(tmp_path: Path, clips: dict[str, Path], name: str) -> None:
    clip = clips[name]
    start, stop = media.packet_span(clip, 12)  # a key frame; only its second half, past every header
    path = media.flip(clip, tmp_path / clip.name, 15, seed=1, start=(start + stop) // 2, stop=stop)
    refused(path, "frames readable, .* damaged")
    found = probe(path, on_corrupt="warn")
    assert found.corrupt > 0 and any(note.startswith("damaged:") for note in found.notes)
    with Source(found) as source:
        assert source._decoder is not None and source._decoder.stream.codec_context.thread_count == 1
        first = source.read(0, found.frames)
    with Source(found) as source:  # damage decodes the same way each time
        assert np.array_equal(source.read(0, found.frames), first)


def test_400_flipped_bytes_in_a_long_clip(tmp_path: Path) -> None:
    clip = media.write(
        tmp_path / "a.mp4", media.pattern(75, (160, 96)), container_options={"movflags": "faststart"}
    )
    refused(media.flip(clip, tmp_path / "b.mp4", 400, start=4000), "damaged")


def test_broken_first_key_frame(tmp_path: Path, clips: dict[str, Path]) -> None:
    start, stop = media.packet_span(clips["fast"], 0)
    path = media.flip(clips["fast"], tmp_path / "c.mp4", 30, start=stop - (stop - start) // 6, stop=stop)
    refused(path, "damaged")
    assert probe(path, on_corrupt="warn").corrupt > 0


def test_header_that_promises_too_much(tmp_path: Path, clips: dict[str, Path]) -> None:
    data = bytearray(clips["avi"].read_bytes())
    place = data.index(b"strh") + 8 + 32
    assert int.from_bytes(data[place : place + 4], "little") == 60
    data[place : place + 4] = (444).to_bytes(4, "little")
    (tmp_path / "c.avi").write_bytes(data)
    refused(tmp_path / "c.avi", "60 of 444 frames readable")
    found = probe(tmp_path / "c.avi", on_corrupt="warn")
    assert (found.frames, found.corrupt, found.fps) == (60, 384, 25)


@pytest.mark.parametrize("size", [20, 406, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_cut_image(tmp_path: Path, suffix: str, size: int | float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    whole = {".png": media.write_png, ".jpg": media.write_jpeg}[suffix](tmp_path / f"w{suffix}", noise)
    refused(media.cut(whole, tmp_path / f"c{suffix}", size), "readable|open")


def test_on_corrupt_takes_two_words(clips: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'fail' or 'warn'"):
        probe(clips["mp4"], on_corrupt="ignore")


# --- streams and timing --------------------------------------------------------------------------------


def test_audio_only(tmp_path: Path) -> None:
    refused(media.write_audio(tmp_path / "a.mp4"), "must have a video stream, got audio only")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_names_the_gaps(tmp_path: Path, suffix: str) -> None:
    path = media.write(tmp_path / f"c{suffix}", 6, pts=[0, 1, 2, 5, 6, 7])
    refused(path, r"gaps of 0.04 to 0.12 s \(variable frame rate\)")


def test_one_missing_frame_time_is_variable_rate(tmp_path: Path) -> None:
    refused(media.write(tmp_path / "c.mp4", 40, pts=[*range(20), *range(21, 41)]), "variable frame rate")


def test_backward_timestamps_are_noted_and_every_frame_kept(tmp_path: Path) -> None:
    clip = media.write(tmp_path / "a.mkv", 10, codec="ffv1", pix_fmt="bgr0")
    path = media.patch(clip, tmp_path / "b.mkv", b"\x81\x00\xa0\x00", b"\x81\x00\x46\x00")  # 160 ms -> 70 ms
    found = probe(path)
    assert (found.frames, found.fps) == (10, 25)
    assert any("run backwards" in note for note in found.notes)


def test_no_frame_rate(tmp_path: Path) -> None:
    data = media.write(tmp_path / "a.mkv", 1, codec="ffv1", pix_fmt="bgr0").read_bytes()
    place = data.index(bytes.fromhex("23e38384"))  # DefaultDuration, replaced by filler
    (tmp_path / "b.mkv").write_bytes(data[:place] + b"\xec\x86" + bytes(6) + data[place + 8 :])
    refused(tmp_path / "b.mkv", "must state a frame rate, got 0")


def test_size_change_mid_stream(tmp_path: Path) -> None:
    small, large = media.write(tmp_path / "a.ts", 10), media.write(tmp_path / "b.ts", 10, size=(96, 64))
    (tmp_path / "c.ts").write_bytes(small.read_bytes() + large.read_bytes())
    refused(tmp_path / "c.ts", "one size, got 64x48 and 96x64 from frame 10")


def test_tag_that_is_not_utf8_is_no_obstacle(tmp_path: Path) -> None:
    clip = media.write(tmp_path / "a.mkv", 5, metadata={"title": "abcdefgh"})
    assert probe(media.patch(clip, tmp_path / "b.mkv", b"abcdefgh", b"abc\xff\xfefgh")).frames == 5


# --- limits --------------------------------------------------------------------------------------------


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*args: object) -> None:
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(video_decode.Decoder, "_decode", fail)
    yield


@pytest.mark.parametrize("name", ["mp4", "mkv", "avi"])
def test_bombs_are_refused_from_the_header(clips: dict[str, Path], no_decoding: None, name: str) -> None:
    refused(clips[name], "at most 32 pixels, got 64x48", limits=Limits(side=32))
    refused(clips[name], "at most 50 frames, got (59|60)", limits=Limits(frames=50))
    refused(clips[name], "at most 0.0005 GB", limits=Limits(total_bytes=500_000))


@pytest.mark.parametrize("name", ["fragments", "ts"])
def test_bombs_without_a_count_are_refused_on_the_way(clips: dict[str, Path], name: str) -> None:
    refused(clips[name], "at most 50 frames, got 51", limits=Limits(frames=50))
    refused(clips[name], "at most 0.0005 GB", limits=Limits(total_bytes=500_000))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_image_bombs_are_refused_before_they_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"i{suffix}"
    if suffix == ".png":
        media.write_png(path, media.corners())
    elif suffix == ".jpg":
        media.write_jpeg(path, media.corners())
    else:
        media.write_gif(path)
    order = "little" if suffix == ".gif" else "big"
    place = {".png": 18, ".gif": 6}.get(suffix) or path.read_bytes().index(b"\xff\xc0") + 7
    data = bytearray(path.read_bytes())
    assert int.from_bytes(data[place : place + 2], order) == 64
    data[place : place + 2] = (60_000).to_bytes(2, order)
    path.write_bytes(data)
    monkeypatch.setattr(video_decode.av, "open", lambda *args, **options: pytest.fail("the image was opened"))
    refused(path, "at most 8192 pixels, got 60000x48", 1)


def test_default_limits() -> None:
    limits = Limits()
    limits.check(Path("x"), 1920, 1080, 5000)
    limits.check(Path("x"), 8192, 8192, 1)
    for width, height, frames in [(8192, 8192, 300), (64, 64, 100_000), (8193, 16, 1), (16, 8193, 1)]:
        with pytest.raises(MediaError, match="at most"):
            limits.check(Path("x"), width, height, frames)


def test_long_clip_is_refused_early(tmp_path: Path, no_decoding: None) -> None:
    frames = np.zeros((1, 16, 16, 3), np.uint8).repeat(5001, axis=0)
    path = media.write(tmp_path / "c.mp4", frames, codec="mpeg4", fps=Fraction(1000))
    refused(path, "at most 5000 frames, got 5001")


def test_pixel_aspect_cannot_pass_the_side_limit(tmp_path: Path) -> None:
    path = media.write(tmp_path / "c.mp4", 2, size=(2100, 16), sar=Fraction(4))
    refused(path, "at most 8192 pixels, got 8400x16")


def test_probe_memory_does_not_grow_with_length(tmp_path: Path) -> None:
    frames = np.broadcast_to(np.uint8(90), (120, 720, 1280, 3))  # 330 MB if held
    path = media.write(tmp_path / "c.mp4", frames, options={"preset": "ultrafast"})
    code = (
        "import sys; from cosmos_fast.video import probe; assert probe(sys.argv[1]).frames == 120; "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert int(done.stdout) < 250_000  # kB, of which the imports are about 100,000


# --- anything at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mp4", "fast", "fragments", "mkv", "avi", "ts", "png", "jpg", "gif"])
def test_random_damage_never_escapes(tmp_path: Path, clips: dict[str, Path], name: str) -> None:
    """Header and body damage ends in MediaError or in a readable clip, in either mode."""
    source = clips.get(name) or {"png": media.write_png, "jpg": media.write_jpeg}.get(
        name, lambda path, _: media.write_gif(path)
    )(tmp_path / f"w.{name}", media.corners())
    path = tmp_path / f"x{source.suffix}"
    outcomes = set()
    for seed in range(40):
        stop = None if seed % 2 else 1200
        media.flip(source, path, 1 + seed % 20, seed=seed, stop=min(stop or 10**9, source.stat().st_size))
        try:
            found = probe(path, "warn" if seed % 3 else "fail")
            with Source(found, size=(32, 32)) as opened:
                assert opened.read(0, found.frames).shape == (found.frames, 32, 32, 3)
            outcomes.add("read")
        except MediaError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert "refused" in outcomes


def test_stream_that_appears_late_is_damage(
    tmp_path: Path, clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyAV answers a stream first seen in mid-file with an IndexError."""

    class Demuxer:
        def __init__(self, container: object) -> None:
            self._container = container

        def __getattr__(self, name: str) -> object:
            return getattr(self._container, name)

        def demux(self, stream: object) -> Iterator[object]:
            packets = self._container.demux(stream)
            yield from (next(packets) for _ in range(9))
            raise IndexError("list index out of range")

    real = video_decode.av.open
    monkeypatch.setattr(video_decode.av, "open", lambda *args, **options: Demuxer(real(*args, **options)))
    refused(clips["mp4"], "of 60 frames readable, 1 damaged")


CLOSE_EARLY = """
import faulthandler, sys
faulthandler.dump_traceback_later(20, exit=True)
import av
from cosmos_fast.video_decode import Decoder
av.logging.set_level(av.logging.ERROR)  # as torchvision.io does, for the whole process
for frames in range(1, 25):
    with Decoder(sys.argv[1], "mov") as decoder:
        decoder.stream.codec_context.thread_count = 8
        for _ in zip(range(frames), decoder):
            pass
    del decoder
print("closed")
"""


def test_a_damaged_file_may_be_closed_while_its_threads_complain(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 240, 320, 3), np.uint8)
    options = {"g": "12", "x264-params": "slices=8"}
    clip = media.write(
        tmp_path / "a.mp4", noise, options=options, container_options={"movflags": "faststart"}
    )
    path = media.flip(clip, tmp_path / "b.mp4", 3000, seed=1, start=4000, stop=clip.stat().st_size)
    command = [sys.executable, "-c", CLOSE_EARLY, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "closed\n", done.stderr[-500:]
