"""Preflight: every fault of a batch is found before anything is loaded; costs match the counted figures."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from cosmos_fast import costs, planning
from cosmos_fast.clip_plan import BatchPlan, ClipPlan
from cosmos_fast.config import NetworkConfig
from cosmos_fast.formats import SpecError
from cosmos_fast.planning import DISTILLED, config_for, model_for, preflight
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.spec import Spec

RATES = {"encode": 100.0, "denoise": 500.0, "decode": 50.0, "source": "bench/results/x.json"}


def video(path: Path, frames: int, size: tuple[int, int] = (64, 36), fps: Fraction | int = 16) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), (i * 7) % 250, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    video(root / "input.mp4", 30)
    video(root / "same.mp4", 30)
    video(root / "big.mp4", 30, (128, 72))
    video(root / "short.mp4", 12)
    video(root / "long.mp4", 120)
    video(root / "square.mp4", 30, (48, 48))
    video(root / "fast.mp4", 30, fps=20)
    video(root / "ntsc.mp4", 30, fps=Fraction(16000, 1001))
    cv2.imwrite(str(root / "still.png"), np.full((37, 65, 3), 90, np.uint8))
    cv2.imwrite(str(root / "sliver.png"), np.full((40, 1, 3), 90, np.uint8))
    labels = np.zeros((30, 36, 64), np.uint8)
    labels[:, :9] = 2
    np.savez(root / "labels.npz", labels)
    (root / "broken.mp4").write_bytes((root / "input.mp4").read_bytes()[:600])
    (root / "text.mp4").write_text("not a video")
    return root


def spec(media: Path, name: str = "clip", **fields: Any) -> Spec:
    """Paths given as plain file names are taken from the media folder."""
    fields = {"video_path": "input.mp4", "prompt": "a robot"} | fields

    def place(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: place(k, v) for k, v in value.items()}
        return media / value if key.endswith(("_path", "generation_mask")) and value else value

    if not {"edge", "vis", "depth", "seg"} & set(fields):
        fields["edge"] = {}
    return Spec(name=name, **{k: place(k, v) for k, v in fields.items()})


def one(media: Path, model: str = "auto", fields: dict[str, Any] | None = None, **options: Any) -> ClipPlan:
    (clip,) = preflight([spec(media, **(fields or {}))], model, **options).clips
    return clip


def problems(
    media: Path, model: str = "auto", options: dict[str, Any] | None = None, **fields: Any
) -> list[str]:
    with pytest.raises(SpecError) as caught:
        preflight([spec(media, **fields)], model, **(options or {}))
    return caught.value.problems


# --------------------------------------------------------------------------------------------- costs

SIZES = {"720": (1280, 704), "480": (768, 432), "480p": (832, 480)}


@pytest.mark.parametrize(
    ("key", "length", "image", "plain", "two", "four"),
    [
        ("720", 84_480, 2232.2, 2203.7, 2482.4, 3039.8),
        ("480", 31_104, 386.9, 376.3, 424.5, 521.0),
        ("480p", 37_440, 527.8, 515.1, 580.9, 712.6),
    ],
)
def test_network_flop_match_the_published_totals(
    key: str, length: int, image: float, plain: float, two: float, four: float
) -> None:
    assert costs.tokens(93, *SIZES[key]) == length
    for config, active, expected in (
        (NetworkConfig.single(), 1, image),
        (NetworkConfig.distilled(), 1, plain),
        (NetworkConfig.multi(), 1, plain),
        (NetworkConfig.multi(), 2, two),
        (NetworkConfig.multi(), 4, four),
    ):
        assert costs.network_flop(length, config, active) / 1e12 == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize(
    ("frames", "width", "height", "encode", "decode"),
    [
        (93, 1280, 704, 428.06, 717.10), (93, 960, 960, 437.96, 733.57), (93, 960, 704, 319.67, 536.45),
        (93, 768, 432, 155.90, 262.32), (93, 832, 480, 187.90, 316.00), (29, 1280, 704, 134.66, 225.20),
        (1, 1280, 704, 6.30, 9.99),
    ],
)  # fmt: skip
def test_vae_flop_match_the_counted_table(
    frames: int, width: int, height: int, encode: float, decode: float
) -> None:
    assert costs.vae_encode_flop(frames, width, height) / 1e12 == pytest.approx(encode, rel=1e-3)
    assert costs.vae_decode_flop(frames, width, height) / 1e12 == pytest.approx(decode, rel=1e-3)


def test_parameters_match_the_published_counts() -> None:
    counts = [costs.parameters(config_for(model)) for model in ("edge", DISTILLED, "multi")]
    assert counts == [2_763_070_464, 2_358_047_744, 3_254_666_240]


def test_memory_follows_recipe_and_windows() -> None:
    def memory(plan: Plan | None = None, recipe: Recipe | None = None) -> dict[str, int]:
        return costs.memory_bytes(NetworkConfig(), recipe or Recipe(), plan or Plan(), 93, 1280, 704)

    gib = 2**30
    base = memory(Plan(vae_encode_window=16))
    assert base["weights"] == 2 * (2_763_070_464 + 126_892_531)
    assert (base["encode"] - base["weights"]) / gib == pytest.approx(10.41, rel=0.01)
    assert (base["decode"] - base["weights"]) / gib == pytest.approx(5.58, rel=0.01)
    assert (base["denoise"] - base["weights"]) == 15 * 84_480 * 2048 * 2 + 2 * 512 * 100_352 * 2
    small = memory(Plan(vae_encode_window=4))
    assert (small["encode"] - small["weights"]) / gib == pytest.approx(4.61, rel=0.01)
    wide = memory(Plan(vae_decode_window=4))
    assert (wide["decode"] - wide["weights"]) / gib == pytest.approx(8.48, rel=0.01)
    for stage, doubled in memory(Plan(vae_encode_window=16), Recipe.fp32()).items():
        assert doubled == pytest.approx(2 * base[stage], abs=2)
    for name in ("fp8", "fp8_linear"):
        # 32 blocks, in units of the width: 18 squares of values at a byte less each, 16 rows with 4 bytes more.
        saved = small["weights"] - memory(recipe=Recipe.preset(name))["weights"]
        assert saved == 32 * (18 * 2048**2 - 16 * 2048 * 4)


# ----------------------------------------------------------------------------------------- the plan


def test_plan_of_one_clip(media: Path) -> None:
    clip = one(media, fields={"resolution": "256", "edge": {"control_path": "same.mp4"}, "seed": 1})
    assert (clip.model, clip.steps, clip.network_calls) == ("edge", 35, 70)
    assert (clip.frames, clip.fps, clip.tokens) == (30, 16, 24 * 12 * 20)
    assert (clip.source.size, clip.model_size, clip.output_size) == ((64, 36), (320, 192), (64, 36))
    assert [(c.start, c.stop, c.keep) for c in clip.chunks] == [(0, 30, 30)] and clip.chunk_frames == 93
    assert clip.controls["edge"] is not None and clip.controls["edge"].frames == 30
    assert clip.tflop["denoise"] == 70 * costs.network_flop(5760, NetworkConfig()) / 1e12
    assert clip.tflop["encode"] == costs.vae_encode_flop(93, 320, 192) / 1e12
    assert clip.tflop["total"] == pytest.approx(sum(clip.tflop[s] for s in ("encode", "denoise", "decode")))
    assert clip.peak == ("denoise", clip.memory["denoise"])
    assert clip.seconds is None and clip.notes == ()


def test_chunks_guidance_masks_and_rates_are_counted(media: Path) -> None:
    fields = {
        "video_path": "long.mp4", "resolution": "256", "depth": {"control_path": "long.mp4"}, "guidance": 0,
        "num_steps": 3, "vis": {}, "guided_generation_mask": "long.mp4", "keep_input_resolution": False,
        "show_input": True, "show_control_condition": True,
    }  # fmt: skip
    clip = one(media, fields=fields, rates=RATES)
    assert clip.model == "multi" and list(clip.controls) == ["vis", "depth"] and clip.controls["vis"] is None
    assert [(c.start, c.stop) for c in clip.chunks] == [(0, 93), (92, 120)]
    assert clip.network_calls == 2 * 3 and clip.output_size == (320, 192) and clip.tiles == 3
    assert clip.guided == (120, 64, 36)
    encode = (6 * costs.vae_encode_flop(93, 320, 192) + costs.vae_encode_flop(1, 320, 192)) / 1e12
    assert clip.tflop["encode"] == pytest.approx(encode)
    assert clip.tflop["denoise"] == pytest.approx(
        6 * costs.network_flop(5760, NetworkConfig.multi(), 2) / 1e12
    )
    assert clip.seconds == pytest.approx(
        encode / 100 + clip.tflop["denoise"] / 500 + clip.tflop["decode"] / 50
    )
    assert any("weights sum to 2; they are added as they are" in note for note in clip.notes)


def test_image_clips(media: Path) -> None:
    image = {
        "video_path": "still.png",
        "num_video_frames_per_chunk": 1,
        "edge": {"control_path": "still.png"},
    }
    clip = one(media, fields=image)
    assert (clip.frames, len(clip.chunks), clip.output_size) == (1, 1, (64, 36))
    assert clip.tokens == 44 * 80
    video_chunk = one(media, fields=image | {"num_video_frames_per_chunk": 93})
    assert video_chunk.tokens == 84_480 and any("1 is far cheaper" in n for n in video_chunk.notes)
    first = one(media, fields={"num_video_frames_per_chunk": 1, "edge": {"control_path": "still.png"}})
    assert first.frames == 1 and any("one image of the first of 30 frames" in n for n in first.notes)


def test_short_files_suffice_when_the_input_is_cut(media: Path) -> None:
    control = {"edge": {"control_path": "short.mp4", "mask_path": "short.mp4"}}
    clip = one(media, fields={**control, "max_frames": 12})
    assert clip.frames == 12 and clip.masks["edge"].frames == 12
    assert any(
        "max_frames: 99 asked for, the input has 30" in n for n in one(media, fields={"max_frames": 99}).notes
    )


def test_longer_and_resized_files_are_notes(media: Path) -> None:
    notes = one(
        media, fields={"depth": {"control_path": "long.mp4"}, "seg": {"control_path": "big.mp4"}}
    ).notes
    assert "depth.control_path: only the first 30 of 120 frames are used." in notes
    assert "seg.control_path: 128x72 is resized to 1280x704 like the input." in notes


def test_other_network_sizes_and_chunk_lengths(media: Path) -> None:
    tiny = NetworkConfig.tiny()
    clip = one(
        media,
        fields={"num_video_frames_per_chunk": 5, "num_steps": 1},
        chunk_lengths=(5, 1),
        configs={"edge": tiny},
    )
    assert (
        len(clip.chunks) == 8 and clip.tflop["denoise"] == 16 * costs.network_flop(2 * 44 * 80, tiny) / 1e12
    )
    assert clip.memory["weights"] == 2 * (costs.parameters(tiny) + costs.VAE_PARAMETERS)


def test_distilled(media: Path) -> None:
    clip = one(media, DISTILLED)
    assert (clip.steps, clip.network_calls, clip.notes) == (4, 4, ())
    clip = one(media, DISTILLED, {"video_path": "long.mp4", "num_steps": 8, "guidance": 5})
    assert clip.steps == 8 and clip.network_calls == 16
    assert [note.split(":")[0] for note in clip.notes] == ["num_steps", "frames", "guidance"]


def test_a_default_guidance_is_the_guided_models_business(media: Path) -> None:
    """The model's own value is taken and told where no other is named; the few-step model reads none."""
    own = {"defaults": {"guidance": 2}}
    plain = one(media, **own)
    assert any(note.startswith("guidance: 2, which is this model's own") for note in plain.notes)
    assert not any("own" in note for note in one(media, fields={"guidance": 5}, **own).notes)
    assert not any("guidance" in note for note in one(media, DISTILLED, **own).notes)


def test_labels_are_read_as_a_guided_mask(media: Path) -> None:
    clip = one(
        media, fields={"guided_generation_mask": "labels.npz", "guided_generation_foreground_labels": [2]}
    )
    assert clip.guided == (30, 64, 36)


def test_each_file_is_probed_once(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = planning.probe

    def count(path: Path, on_corrupt: str) -> Any:
        opened.append(path.name)
        return real(path, on_corrupt)  # type: ignore[arg-type]

    monkeypatch.setattr(planning, "probe", count)
    depth = {"depth": {"control_path": "same.mp4"}}
    assert len(preflight([spec(media, f"c{i}", **depth) for i in range(5)]).clips) == 5
    assert sorted(opened) == ["input.mp4", "same.mp4"]


def test_table_and_json(media: Path) -> None:
    batch = preflight(
        [
            spec(media, "first"),
            spec(media, "second", video_path="long.mp4", depth={"control_path": "long.mp4"}),
        ],
        rates=RATES,
    )
    table, data = batch.as_table(), json.loads(batch.as_json())
    rows = table.splitlines()
    assert rows[1].startswith("first") and "64x36 > 1280x704 > 64x36" in rows[1] and "1 x 93" in rows[1]
    assert rows[2].startswith("second") and "2 x 93" in rows[2] and "GiB" in rows[2]
    assert "2 clips, 150 frames, 210 network calls" in rows[3] and "by bench/results/x.json" in rows[3]
    assert "estimate, not a measurement" in table
    assert data["total"]["seconds_estimate"] == pytest.approx(sum(c.seconds or 0 for c in batch.clips))
    assert data["clips"][1]["chunks"] == [[0, 93], [92, 120]] and data["clips"][0]["fps"] == "16"
    assert "no rates for this machine" in preflight([spec(media)]).as_table()
    assert preflight([]).as_table()


# --------------------------------------------------------------------------------------- the faults


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"edge": {"control_path": "square.mp4"}},
         ["edge.control_path: must have the aspect", "48x48 (works at 960x960)", "64x36 (works at 1280x704)", "crop"]),
        ({"edge": {"mask_path": "square.mp4"}}, ["edge.mask_path: must have the aspect"]),
        ({"guided_generation_mask": "square.mp4"}, ["guided_generation_mask: must have the aspect"]),
        ({"edge": {"control_path": "short.mp4"}},
         ["edge.control_path: must be at least as long", "got 12 frames for 30", "max_frames to 12"]),
        ({"edge": {"mask_path": "short.mp4"}}, ["edge.mask_path: must be at least as long"]),
        ({"video_path": "long.mp4", "guided_generation_mask": "labels.npz"},
         ["guided_generation_mask: must be at least as long", "got 30 frames for 120"]),
        ({"edge": {"control_path": "still.png"}}, ["edge.control_path", "got 1 frames for 30"]),
        ({"edge": {"control_path": "fast.mp4"}},
         ["edge.control_path: must have the frame rate", "got 20 fps for 16", "20.000 and 16.000"]),
        ({"num_video_frames_per_chunk": 49}, ["num_video_frames_per_chunk", "(93, 1), got 49"]),
        ({"video_path": "broken.mp4"}, ["video_path: ", "broken.mp4"]),
        ({"edge": {"control_path": "text.mp4"}}, ["edge.control_path: ", "text.mp4"]),
        ({"context_frame_index": 30}, ["context_frame_index: must be below the input's 30 frames, got 30"]),
        ({"image_context_path": "text.mp4"}, ["image_context_path: ", "text.mp4"]),
        ({"guided_generation_mask": "labels.npz", "guided_generation_foreground_labels": [7]},
         ["guided_generation_mask: ", "labels [7]"]),
        ({"video_path": "sliver.png"}, ["video_path: must be at least 2x2 pixels, got 1x40"]),
    ],
)  # fmt: skip
def test_each_fault_is_named_with_what_was_found(
    media: Path, fields: dict[str, Any], expected: list[str]
) -> None:
    found = problems(media, **fields)
    assert len(found) == 1, found
    for text in expected:
        assert text in found[0]


def test_nearly_equal_frame_rates_pass(media: Path) -> None:
    assert one(media, fields={"edge": {"control_path": "ntsc.mp4"}}).fps == 16


@pytest.mark.parametrize(
    ("model", "fields", "text"),
    [
        (
            "multi",
            {"image_context_path": "still.png"},
            "image_context_path: must not be set for the multi model",
        ),
        (
            DISTILLED,
            {"context_frame_index": 2},
            "context_frame_index: must not be set for the edge/distilled",
        ),
        (DISTILLED, {"guided_generation_mask": "same.mp4"}, "guided_generation_mask: must not be set for"),
        (DISTILLED, {"vis": {}}, "model: edge/distilled takes the edge control alone, got vis"),
        (DISTILLED, {"edge": {}, "vis": {}}, "takes the edge control alone, got edge, vis"),
        ("depth", {"edge": {}}, "model: depth takes the depth control alone, got edge"),
    ],
)
def test_what_a_model_cannot_do_is_an_error(
    media: Path, model: str, fields: dict[str, Any], text: str
) -> None:
    (found,) = problems(media, model, **fields)
    assert found.startswith("clip: ") and text in found


def test_missing_makers_can_be_supplied_and_styles_withheld(media: Path) -> None:
    fields = {"depth": {"mask_prompt": "a cup"}}
    assert one(media, fields=fields).controls == {"depth": None}
    assert one(media, fields=fields, makers=("depth", "mask")).controls == {"depth": None}
    first, second = problems(media, **fields, options={"makers": ("edge", "vis")})
    assert "depth: control_path is required, got none. Nothing here computes depth" in first
    assert "depth.mask_prompt: mask_path is required" in second and "segments" in second
    assert "seg: control_path is required" in problems(media, seg={}, options={"makers": ("depth",)})[0]
    (found,) = problems(media, image_context_path="still.png", options={"makers": ("edge",)})
    assert "No encoder for style images" in found
    style = one(media, fields={"image_context_path": "still.png"}).style
    assert style is not None and not isinstance(style, int) and style.size == (65, 37)
    assert one(media, fields={"context_frame_index": 0}).style == 0


def test_model_choice(media: Path) -> None:
    depth = {"depth": {"control_path": "same.mp4"}}
    assert model_for(spec(media, **depth)) == "depth"
    assert model_for(spec(media, edge={}, **depth)) == "multi"
    assert model_for(spec(media), "multi") == "multi"
    with pytest.raises(
        SpecError, match="auto or one of edge, vis, depth, seg, multi, edge/distilled, got 'big'"
    ):
        preflight([spec(media)], "big")


def test_every_problem_of_every_clip_is_collected(media: Path) -> None:
    batch = [
        spec(media, "good"),
        spec(media, "a", edge={"control_path": "short.mp4", "mask_path": "square.mp4"}, seg={}),
        spec(media, "b", video_path="broken.mp4", depth={}, num_video_frames_per_chunk=5),
        spec(media, "GOOD"),
    ]
    with pytest.raises(SpecError) as caught:
        preflight(batch, makers=("edge", "vis"))
    heads = [problem.split(":")[:2] for problem in caught.value.problems]
    assert heads[0] == ["name", " must be unique, capitals aside, got 'good' and 'GOOD'."]
    assert [h[0] + h[1] for h in heads[1:]] == [
        "a edge.control_path", "a edge.mask_path", "a seg", "b video_path",
        "b num_video_frames_per_chunk", "b depth",
    ]  # fmt: skip
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    batch_plan = preflight(batch, makers=("edge", "vis"), strict=False)
    assert isinstance(batch_plan, BatchPlan) and [c.name for c in batch_plan.clips] == ["good", "GOOD"]
    assert list(batch_plan.problems) == caught.value.problems
    assert batch_plan.as_table().count("problem: ") == 7
