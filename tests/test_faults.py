"""Bad inputs, wrong weights, full disks: each ends in one sentence, the right exit code and no half file."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import media
import numpy as np
import pytest
import torch
from system import Run, clip_of, generate, leftovers, write_spec
from torch import Tensor

from cosmos_fast import outputs, planning, video_write
from cosmos_fast.engine import Engine
from cosmos_fast.spec import NEGATIVE_PROMPT
from cosmos_fast.text import TinyText, write_embeddings
from cosmos_fast.video_write import Writer

IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 5)


@pytest.fixture(scope="module")
def embeddings(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prompts.safetensors"
    prompts = ["A busy street.", NEGATIVE_PROMPT]
    encoded = TinyText.load(models / "text.safetensors").encode(prompts)
    write_embeddings(path, {p: e.detach() for p, e in zip(prompts, encoded, strict=True)})
    return path


def results(out: Path) -> set[str]:
    """Media under final names."""
    return {path.name for path in out.iterdir() if path.suffix in (".mp4", ".jpg")}


def manifest(out: Path) -> list[tuple[str, str]]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return [(line["name"], line["status"]) for line in map(json.loads, lines)]


# --- inputs that are refused before anything starts ---


def _vfr(path: Path) -> Path:
    return media.write(path, 6, pts=[0, 1, 4, 5, 8, 9], time_base=Fraction(1, 25))


def _half(path: Path) -> Path:
    whole = media.write(path.with_name("whole.mp4"), 30, container_options={"movflags": "faststart"})
    return media.cut(whole, path, 0.5)


def _written(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


BAD_VIDEOS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_half, "of 30"),
    "no index": (lambda p: media.cut(media.write(p.with_name("w.mp4"), 9), p, 0.5), "bad.mp4"),
    "empty": (_written(b""), "got an empty file"),
    "text": (_written(b"hello, this is no video\n" * 9), "got a text file"),
    "json": (_written(b'{"prompt": "x"}'), "got a JSON file"),
    "lfs pointer": (_written(media.LFS_POINTER.encode()), "git lfs pull"),
    "audio only": (media.write_audio, "video"),
    "variable rate": (_vfr, "variable frame rate"),
    "png named mp4": (lambda p: media.write_png(p, media.corners()), "content must fit the name"),
    "folder": (Path.mkdir, "folder"),
    "absent": (lambda p: p, "exist"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_bad_video_is_refused_before_the_start(models: Path, tmp_path: Path, kind: str) -> None:
    make, fragment = BAD_VIDEOS[kind]
    make(tmp_path / "bad.mp4")
    run = generate(models, tmp_path / "out", write_spec(tmp_path, "clip", tmp_path / "bad.mp4"))
    assert run.code == 2 and not run.out, run
    assert "video_path" in run.err and fragment in run.err and "Traceback" not in run.err
    assert not (tmp_path / "out").exists()


def test_damaged_video_is_used_where_that_is_asked_for(models: Path, tmp_path: Path) -> None:
    cut = _half(tmp_path / "bad.mp4")
    out = tmp_path / "out"
    run = generate(models, out, write_spec(tmp_path, "clip", cut, max_frames=2), "--on-corrupt", "warn")
    assert run.code == 0, run.err
    notes = json.loads((out / "clip.json").read_text())["notes"]
    assert any("damaged or missing frames are tolerated" in note for note in notes)


def test_bad_controls_are_refused_with_both_figures(models: Path, clip: Path, tmp_path: Path) -> None:
    short = media.write(tmp_path / "short.mp4", 3, size=(64, 64))
    wide = media.write(tmp_path / "wide.mp4", 5, size=(128, 64))
    slow = media.write(tmp_path / "slow.mp4", 5, size=(64, 64), fps=10)
    pickled = tmp_path / "control.pkl"
    pickled.write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    table: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"depth": {"control_path": str(tmp_path / "no.mp4")}}, ("depth.control_path", "exist")),
        (
            {"depth": {"control_path": str(short)}},
            ("depth.control_path", "got 3 frames for 5", "max_frames to 3"),
        ),
        ({"depth": {"control_path": str(wide)}}, ("aspect of the input", "128x64", "64x64")),
        ({"depth": {"control_path": str(slow)}}, ("frame rate of the input", "got 10 fps for 25")),
        # Of a long path the message keeps the start alone, so the suffix may be missing.
        ({"depth": {"control_path": str(pickled)}}, ("depth.control_path", "other types are never opened")),
        ({"edge": {"mask_path": str(short)}}, ("edge.mask_path", "got 3 frames for 5")),
        ({"guided_generation_mask": str(short)}, ("guided_generation_mask", "got 3 frames for 5")),
        ({"num_video_frames_per_chunk": 9}, ("(5, 1)", "got 9")),
    ]
    for index, (changes, fragments) in enumerate(table):
        spec = write_spec(tmp_path, f"clip{index}", clip, **changes)
        run = generate(models, tmp_path / "out", spec)
        assert run.code == 2 and all(part in run.err for part in fragments), (changes, run)
    every = generate(models, tmp_path / "out", *sorted(tmp_path.glob("clip*.json")))
    assert every.code == 2 and len(every.err.splitlines()) >= len(table)
    assert not (tmp_path / "out").exists()


# --- inputs that are odd and work ---


def test_odd_videos_work_and_are_noted(models: Path, tmp_path: Path) -> None:
    upright = np.repeat(media.corners((48, 64))[None], 3, axis=0)
    clear = np.dstack([media.corners((64, 64)), np.zeros((64, 64), np.uint8)])
    clips = {
        "odd": media.write(tmp_path / "odd.mp4", 3, size=(63, 47), pix_fmt="yuv444p"),
        "deep": media.write(tmp_path / "deep.mp4", 3, codec="libx265", pix_fmt="yuv420p10le",
                            options={"x265-params": "log-level=none"}),
        "turned": media.write(tmp_path / "turned.mp4", upright, rotation=90),
        "single": media.write(tmp_path / "single.mp4", 1),
        "clear": media.write_png(tmp_path / "clear.png", clear),
    }  # fmt: skip
    specs = [
        write_spec(tmp_path, name, path, show_input=True, **(IMAGE if name == "clear" else {}))
        for name, path in clips.items()
    ]
    out = tmp_path / "out"
    run = generate(models, out, *specs)
    assert run.code == 0, run.err
    shapes = {path.stem: media.read(path).shape for path in run.paths}
    assert shapes == {
        "odd": (3, 46, 124, 3), "deep": (3, 48, 128, 3), "turned": (3, 48, 128, 3), "single": (1, 48, 128, 3),
        "clear": (1, 64, 128, 3),
    }  # fmt: skip
    notes = {name: " ".join(json.loads((out / f"{name}.json").read_text())["notes"]) for name in clips}
    assert "odd size 63x47: results are written at 62x46" in notes["odd"]
    assert "10-bit pixels are reduced to 8 bits" in notes["deep"]
    assert "display matrix applied" in notes["turned"]
    assert "one frame is repeated to 5" in notes["single"]
    assert "transparency is laid over white" in notes["clear"]
    shown = media.read(out / "turned.mp4")[0, :, :64]
    assert media.psnr(shown, media.read(clips["turned"])[0]) > 25
    assert media.psnr(shown, np.rot90(upright[0])) > 20
    assert media.read(out / "clear.jpg")[0, :, :64].min() > 245


# --- weights ---


def single(models: Path, out: Path, spec: Path, text: Path, *more: str | Path) -> Run:
    return generate(models, out, spec, "--model", "edge", "--text-embeddings", text, *more)


def test_wrong_weights_are_an_environment_error(
    models: Path, clip: Path, embeddings: Path, tmp_path: Path
) -> None:
    network, vae = next((models / "general" / "edge").iterdir()), models / "tokenizer.pth"
    text, pointer, cut = (tmp_path / name for name in ("text.pt", "pointer.safetensors", "cut.safetensors"))
    text.write_text("not weights at all, but long enough to be looked at\n" * 9)
    pointer.write_text(media.LFS_POINTER)
    media.cut(embeddings, cut, 0.5)
    spec, out = write_spec(tmp_path, "still", clip, **IMAGE), tmp_path / "out"
    table: list[tuple[Path, Path, tuple[str, ...]]] = [
        (vae, vae, ("tokenizer.pth",)),
        (network, network, ("ema_bf16.pt",)),
        (text, vae, ("text.pt",)),
        (pointer, vae, ("git lfs pull",)),
        (cut, vae, ("cut.safetensors",)),
        (embeddings, vae, ("prompts.safetensors",)),
        (network, pointer, ("git lfs pull",)),
        (tmp_path / "no.pt", vae, ("must be an existing path", "no.pt")),
    ]
    for checkpoint, tokenizer, fragments in table:
        run = single(checkpoint, out, spec, embeddings, "--vae", tokenizer)
        assert run.code == 3 and not run.out and all(part in run.err for part in fragments), (checkpoint, run)
        assert not results(out) and leftovers(out) == []
    assert single(network, out, spec, embeddings, "--vae", vae).code == 0


def test_one_nan_in_the_weights_is_an_error(
    models: Path, clip: Path, embeddings: Path, tmp_path: Path
) -> None:
    state = torch.load(next((models / "general" / "edge").iterdir()))
    state["net.blocks.2.mlp.layer1.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    spec, out = write_spec(tmp_path, "still", clip, **IMAGE), tmp_path / "out"
    run = single(tmp_path / "nan.pt", out, spec, embeddings, "--vae", models / "tokenizer.pth")
    assert run.code == 3 and "'blocks.2.mlp.layer1.weight' must be finite, got 1 NaN" in run.err
    assert not run.out and not results(out)


def test_offline_without_weights_says_what_to_do(
    clip: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    out = tmp_path / "out"
    run = generate("edge", out, spec, "--text-embeddings", embeddings)  # type: ignore[arg-type]
    assert run.code == 3 and "Cosmos-Guardrail1" in run.err and "--no-guardrails" in run.err
    assert not out.exists()
    unscreened = ("--text-embeddings", embeddings, "--no-guardrails")
    run = generate("edge", out, spec, *unscreened)  # type: ignore[arg-type]
    assert run.code == 3 and "give the path of a local copy" in run.err and "Cosmos-Transfer2.5" in run.err
    assert not results(out) and leftovers(out) == []


def test_prompts_without_embeddings_are_found_before_the_start(
    models: Path, clip: Path, embeddings: Path, tmp_path: Path
) -> None:
    known = write_spec(tmp_path, "known", clip, **IMAGE)
    other = write_spec(tmp_path, "other", clip, **IMAGE, prompt="Snow.", negative_prompt="Rain.")
    alone = write_spec(tmp_path, "alone", clip, **IMAGE, guidance=0, negative_prompt="Rain.")
    out = tmp_path / "out"
    run = generate(models, out, known, other, alone, "--text-embeddings", embeddings)
    assert run.code == 2 and not out.exists()
    assert "other: prompt: must be in" in run.err and "other: negative_prompt" in run.err
    assert "known:" not in run.err and "alone:" not in run.err
    loose = generate(models, out, known, other, alone, "--text-embeddings", embeddings, "--skip-invalid")
    assert loose.code == 1 and results(out) >= {"known.jpg", "alone.jpg"} and "other.jpg" not in results(out)
    none = generate(next((models / "general" / "edge").iterdir()), out, known, "--text-embeddings", tmp_path)
    assert none.code == 3 and "must be a safetensors file" in none.err


# --- output folder and disk ---


def test_output_folder_that_cannot_be_written(models: Path, clip: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "still", clip, **IMAGE)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/results")):
        run = generate(models, folder, spec)
        assert run.code == 3 and "output folder: must be a folder that can be written" in run.err, run


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_while_encoding_costs_one_clip(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Writer._encodable

    def encodable(self: Writer, frame: np.ndarray) -> Any:
        if self.path.name == "a.mp4" and self.frames == 2:
            full()
        return encode(self, frame)

    monkeypatch.setattr(Writer, "_encodable", encodable)
    specs = [write_spec(tmp_path, name, clip) for name in ("a", "b")]
    out = tmp_path / "out"
    run = generate(models, out, *specs)
    assert run.code == 1 and run.paths == [out / "b.mp4"]
    assert "a: failed" in run.err and "No space left on device" in run.err
    assert results(out) == {"b.mp4", "b_control_edge.mp4"} and leftovers(out) == []
    assert manifest(out) == [("a", "failed"), ("b", "done")]


def test_batch_stops_after_three_disk_failures(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [write_spec(tmp_path, name, clip, **IMAGE) for name in "abcde"]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(video_write, "_publish", full)
        run = generate(models, out, *specs)
    assert run.code == 1 and not run.out and not results(out) and leftovers(out) == []
    assert [line[0] for line in manifest(out)] == ["a", "b", "c"] and "stopping: 3 clips" in run.err


def test_result_never_appears_without_its_controls(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = video_write._publish

    def publish_but_controls(part: Path, path: Path) -> None:
        full() if "control" in path.name else publish(part, path)

    monkeypatch.setattr(video_write, "_publish", publish_but_controls)
    specs = [write_spec(tmp_path, "a", clip, **IMAGE), write_spec(tmp_path, "b", clip)]
    out = tmp_path / "out"
    assert generate(models, out, *specs).code == 1
    assert not results(out) and leftovers(out) == []


def test_disk_full_at_the_record_is_repaired_by_resume(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = outputs._write
    spec, out = write_spec(tmp_path, "a", clip, **IMAGE), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            outputs, "_write", lambda path, data: full() if path.name == "a.json" else write(path, data)
        )
        run = generate(models, out, spec)
    assert run.code == 1 and "its record must be written" in run.err and not (out / "a.json").exists()
    again = generate(models, out, spec, "--resume")
    assert again.code == 0 and again.paths == [out / "a.jpg"]
    assert manifest(out) == [("a", "failed"), ("a", "done")]


# --- one bad clip costs one clip ---


def test_input_that_changes_after_the_check_costs_one_clip(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim.mp4"
    victim.write_bytes(clip.read_bytes())
    gone = tmp_path / "gone.mp4"
    gone.write_bytes(clip.read_bytes())
    preflight = planning.preflight

    def then_cut(*args: Any, **options: Any) -> Any:
        batch = preflight(*args, **options)
        victim.write_bytes(clip.read_bytes()[:2000])
        gone.unlink()
        return batch

    monkeypatch.setattr(planning, "preflight", then_cut)
    specs = [write_spec(tmp_path, name, path) for name, path in (("a", victim), ("b", clip), ("c", gone))]
    out = tmp_path / "out"
    run = generate(models, out, *specs)
    assert run.code == 1 and run.paths == [out / "b.mp4"], run.err
    assert "a: failed" in run.err and "must not change after its probe" in run.err
    assert "c: failed" in run.err and "must exist, got no such file" in run.err
    assert results(out) == {"b.mp4", "b_control_edge.mp4"} and leftovers(out) == []
    assert manifest(out) == [("a", "failed"), ("b", "done"), ("c", "failed")]


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel image"), KeyError("x"), torch.OutOfMemoryError("9 GiB")]
)
def test_exception_in_one_clip_leaves_the_others_as_they_are(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sample = Engine._sample

    def failing(self: Engine, plan: Any, *args: Any) -> Tensor:
        if plan.name == "b":
            raise error
        return sample(self, plan, *args)

    monkeypatch.setattr(Engine, "_sample", failing)
    specs = [write_spec(tmp_path, name, clip, **IMAGE) for name in "abc"]
    out = tmp_path / "out"
    run = generate(models, out, *specs)
    assert run.code == 1 and run.paths == [out / "a.jpg", out / "c.jpg"]
    assert "b: failed: " in run.err and ("GPU memory" in run.err or type(error).__name__ in run.err)
    assert [status for _, status in manifest(out)] == ["done", "failed", "done"]
    # What was made after the failure is what an engine that never failed makes.
    monkeypatch.undo()
    assert generate(models, tmp_path / "plain", specs[2]).code == 0
    assert (tmp_path / "plain" / "c.jpg").read_bytes() == (out / "c.jpg").read_bytes()


@pytest.mark.parametrize("value, what", [(float("nan"), "must be finite"), (-1.0, "got black")])
def test_dead_picture_is_a_failed_clip(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, what: str
) -> None:
    from cosmos_fast.vae import VAE

    decode = VAE.decode_stream
    monkeypatch.setattr(
        VAE,
        "decode_stream",
        lambda self, z, window=1: (torch.full_like(p, value) for p in decode(self, z, window)),
    )
    out = tmp_path / "out"
    run = generate(models, out, write_spec(tmp_path, "dead", clip))
    assert run.code == 1 and what in run.err and not run.out
    assert not results(out) and leftovers(out) == [] and manifest(out) == [("dead", "failed")]


def test_clip_of_another_process_is_left_to_it(models: Path, clip: Path, tmp_path: Path) -> None:
    from cosmos_fast.guards import Claim
    from cosmos_fast.outputs import OutputFolder

    spec, out = write_spec(tmp_path, "a", clip, **IMAGE), tmp_path / "out"
    folder = OutputFolder(out)
    claim = Claim.take(folder.clip("a").claim_path, folder.locked)
    assert claim is not None
    with claim:
        run = generate(models, out, spec)
    assert "another process is making it" in run.err and not run.out and not results(out)
    assert generate(models, out, spec).code == 0
