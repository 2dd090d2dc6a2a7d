"""Segmentation with tiny random networks of the real classes, and with a tracker that knows the answer."""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
from pathlib import Path

import media
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cosmos_fast import registry, segment_networks, segmentation
from cosmos_fast.clip_maker import ClipTask, MakerOptions, NothingFound
from cosmos_fast.formats import CheckpointError, ClipError, EnvironmentProblem, SpecError
from cosmos_fast.segment_networks import Detector, Tracks, load_tracker
from cosmos_fast.segments import colours, pick_boxes
from cosmos_fast.video import Writer, probe

CPU = torch.device("cpu")
SIDE = 128
SIZE = (64, 48)
BOXES = np.array([[4, 5, 30, 30], [10, 10, 60, 40]], np.float32)
WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"} | {
    1030 + i: word for i, word in enumerate("a red car cat dog and the".split())
}


# --- tiny networks ---


def tiny_tracker(memories: int = 7, pointers: int = 16):
    """A Sam2VideoModel of 1 M random weights whose objects are always visible."""
    from transformers import Sam2VideoConfig, Sam2VideoMaskDecoderConfig, Sam2VideoModel

    backbone = dict(
        model_type="sam2_hiera_det_model", hidden_size=8, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 14, 7], global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    decoder = Sam2VideoMaskDecoderConfig(
        hidden_size=128, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
    )
    config = Sam2VideoConfig(
        vision_config=dict(
            model_type="sam2_vision_model", backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
            backbone_feature_sizes=[[SIDE // k] * 2 for k in (4, 8, 16)], fpn_hidden_size=128,
        ),
        prompt_encoder_config=dict(hidden_size=128, image_size=SIDE, patch_size=16, mask_input_channels=4),
        mask_decoder_config=decoder,
        image_size=SIDE, num_maskmem=memories, max_object_pointers_in_encoder=pointers,
        memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[SIDE // 16] * 2,
        memory_encoder_hidden_size=128, memory_encoder_output_channels=64, mask_downsampler_embed_dim=128,
        memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32, memory_fuser_num_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Sam2VideoModel(config).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # zeros and tiny values of a fresh network hide what is forgotten
            if parameter.ndim == 1 or parameter.abs().max() < 0.01:
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(10)
    return model


def tiny_detector():
    """A GroundingDinoForObjectDetection of 0.2 M random weights."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    config = GroundingDinoConfig(
        backbone_config=dict(
            model_type="swin", image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=4, out_indices=[2, 3, 4],
        ),
        text_config=dict(
            model_type="bert", vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=64,
        ),
        num_queries=20, encoder_layers=1, decoder_layers=2, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return GroundingDinoForObjectDetection(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Detector and tracker as save_pretrained writes them, the detector with a tokenizer and its sizes."""
    from tokenizers import BertWordPieceTokenizer

    root = tmp_path_factory.mktemp("models")
    detector, tracker = root / "detector", root / "tracker"
    tiny_detector().save_pretrained(detector)
    tiny_tracker().save_pretrained(tracker)
    vocabulary = {WORDS.get(i, f"[unused{i}]"): i for i in range(1100)}
    BertWordPieceTokenizer(vocabulary, lowercase=True).save(str(detector / "tokenizer.json"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **special}
    (detector / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 96}}
    (detector / "preprocessor_config.json").write_text(json.dumps(sizes))
    return detector, tracker


def options(folders, **other) -> MakerOptions:
    return MakerOptions(detector_model=folders[0], tracker_model=folders[1], **other)


def clip_of(tmp_path: Path, frames: np.ndarray) -> Path:
    """A lossless clip: what a maker reads is what the test drew."""
    path = tmp_path / "clip.mkv"
    with Writer(path, (frames.shape[2], frames.shape[1]), 10, codec="ffv1") as writer:
        writer.write(frames)
    return path


def task_of(path: Path, text: str = "a red car.") -> ClipTask:
    return ClipTask(probe(path), (1280, 704), text)


# --- the detector ---


def test_scores_and_boxes_are_those_of_the_network_and_of_transformers_own_rule(folders):
    from transformers.models.grounding_dino.processing_grounding_dino import GroundingDinoProcessor

    frame = media.pattern(1, SIZE)[0]
    scores, boxes = Detector(folders[0], CPU)(frame, "A red CAR. a dog")
    model = tiny_detector()
    ids = torch.tensor([[101, 1030, 1031, 1032, 1012, 1030, 1034, 102]])  # lower case; nothing added or split
    pixels = segment_networks._pixels(frame, (64, 85), CPU)
    with torch.inference_mode():
        found = model(pixel_values=pixels, input_ids=ids)
    np.testing.assert_allclose(scores, found.logits[0].sigmoid().amax(-1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(boxes, found.pred_boxes[0].numpy(), atol=1e-6)

    theirs = GroundingDinoProcessor.__new__(GroundingDinoProcessor)
    theirs.batch_decode = lambda ids: ids
    rule = theirs.post_process_grounded_object_detection(
        found, ids, threshold=0.15, text_threshold=0.25, target_sizes=[(48, 64)]
    )[0]
    order = rule["scores"].argsort(descending=True, stable=True)
    np.testing.assert_allclose(pick_boxes(scores, boxes, SIZE), rule["boxes"][order].numpy(), atol=1e-3)
    assert 0 < len(order) <= 20


def test_words_beyond_the_networks_limit_are_not_read(folders):
    detector, frame = Detector(folders[0], CPU), media.pattern(1, SIZE)[0]
    # 16 tokens: the start token and 15 words.
    held = detector(frame, "car " * 15 + "dog")
    same = detector(frame, "car " * 15 + "the red dog " * 50)
    np.testing.assert_array_equal(held[0], same[0])
    assert (detector(frame, "car " * 14 + "dog")[0] != held[0]).any()


def test_pixels_are_those_of_the_published_preprocessing():
    """Within one step of 255 of PIL's antialiased bilinear resize, ImageNet's mean and deviation."""
    from PIL import Image

    frame = media.pattern(1, (200, 120))[0]
    theirs = np.asarray(Image.fromarray(frame).resize((96, 58), Image.Resampling.BILINEAR), np.float64)
    theirs = (theirs / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    ours = segment_networks._pixels(frame, (58, 96), CPU)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 1.01 / 255 / 0.224


# --- the tracker ---


class Recorder:
    """Passes calls on to a network and keeps the logits of each."""

    def __init__(self, network) -> None:
        self.network, self.config, self.logits = network, network.config, []

    def __call__(self, session, **given):
        found = self.network(session, **given)
        self.logits.append((given["frame_idx"], found.pred_masks.clone()))
        return found


def whole_clip(model, frames: np.ndarray, boxes: np.ndarray) -> list[torch.Tensor]:
    """Logits per frame of transformers' own way: all frames in the session, boxes through its processor."""
    from transformers import Sam2VideoProcessor
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    video = torch.cat([segment_networks._pixels(frame, (SIDE, SIDE), CPU) for frame in frames])
    session = Sam2VideoInferenceSession(
        video=video, video_height=SIZE[1], video_width=SIZE[0], dtype=torch.float32
    )
    processor = Sam2VideoProcessor.__new__(Sam2VideoProcessor)
    processor.target_size, processor.point_pad_value = SIDE, -10
    processor.add_inputs_to_inference_session(
        session, frame_idx=0, obj_ids=list(range(len(boxes))), input_boxes=[boxes.tolist()]
    )
    model(session, frame_idx=0)
    return [found.pred_masks for found in model.propagate_in_video_iterator(session)]


@pytest.mark.parametrize(("memories", "pointers", "count"), [(3, 5, 12), (5, 3, 9), (7, 16, 4)])
def test_frame_by_frame_equals_the_whole_clip(memories, pointers, count):
    """Also on clips longer than all that is remembered, and shorter, where positions are scaled by the length."""
    model, frames = tiny_tracker(memories, pointers), media.pattern(count, SIZE)
    expected = whole_clip(model, frames, BOXES)
    recorder = Recorder(model)
    tracks = Tracks(recorder, SIZE, count, CPU)
    for index, frame in enumerate(frames):
        masks = tracks.advance(frame)
        if index == 0:
            masks |= tracks.add(BOXES)
        assert list(masks) == [0, 1]
        for name, mask in masks.items():
            large = F.interpolate(expected[index][[name]], (48, 64), mode="bilinear", align_corners=False)
            np.testing.assert_array_equal(mask, (large[0, 0] > 0).numpy())
    assert [index for index, _ in recorder.logits] == list(range(count))
    for (_, ours), theirs in zip(recorder.logits, expected, strict=True):
        assert torch.equal(ours, theirs)
    # The comparison can fail: what is remembered does move the logits.
    assert not torch.equal(expected[-1], whole_clip(tiny_tracker(2, 2), frames, BOXES)[-1])


def test_what_is_held_does_not_grow_with_the_clip():
    tracks = Tracks(tiny_tracker(3, 5), SIZE, 40, CPU)
    held = []
    for index, frame in enumerate(media.pattern(14, SIZE)):
        tracks.advance(frame)
        if index == 0:
            tracks.add(BOXES)
        (session,) = tracks._sessions
        outputs = [
            out for o in session.output_dict_per_obj.values() for kind in o.values() for out in kind.values()
        ]
        held.append(sum(t.numel() for out in outputs for t in out.values() if isinstance(t, torch.Tensor)))
        assert dict.__len__(session.processed_frames) == 1
        assert not any(session.frames_tracked_per_obj.values())
        assert not any({"high_res_masks", "pred_masks"} & set(out) for out in outputs)
    assert held[5] == held[13] and held[1] > held[0]


def test_objects_added_later_leave_the_others_as_they_are():
    model, frames = tiny_tracker(), media.pattern(6, SIZE)
    alone, both = Tracks(Recorder(model), SIZE, 6, CPU), Tracks(Recorder(model), SIZE, 6, CPU)
    for index, frame in enumerate(frames):
        first, second = alone.advance(frame), both.advance(frame)
        if index == 0:
            first |= alone.add(BOXES)
            second |= both.add(BOXES)
        if index == 3:
            second |= both.add(BOXES[:1] + 8)
        assert list(second) == [0, 1, 2][: 2 + (index >= 3)]
        for name, mask in first.items():
            np.testing.assert_array_equal(mask, second[name])
    assert both.objects == 3 and alone.objects == 2
    ours = [logits for _, logits in both._network.logits if len(logits) == 2]
    theirs = [logits for _, logits in alone._network.logits]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_objects_cost_no_network():
    recorder = Recorder(tiny_tracker())
    tracks = Tracks(recorder, SIZE, 2, CPU)
    assert tracks.advance(media.pattern(1, SIZE)[0]) == {}
    assert tracks.add(BOXES[:0]) == {} and recorder.logits == []


def test_bf16_autocast_runs_through_both_networks(folders, monkeypatch):
    """The types that meet on a GPU, on the CPU: close to fp32, and not equal to it."""
    frame, detector = media.pattern(1, SIZE)[0], Detector(folders[0], CPU)
    model = tiny_tracker()

    def run():
        recorder = Recorder(model)
        tracks = Tracks(recorder, SIZE, 3, CPU)
        for index in range(3):
            tracks.advance(frame)
            if index == 0:
                tracks.add(BOXES)
        return recorder.logits[-1][1].float(), detector(frame, "a car.")[1][:5]

    exact = run()
    monkeypatch.setattr(segment_networks, "_precision", lambda device: torch.autocast("cpu", torch.bfloat16))
    for rounded, wanted in zip(run(), exact, strict=True):
        error = np.abs(np.asarray(rounded) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max()
        assert 0 <= error < 0.3


def test_nan_from_either_network_ends_the_clip_with_a_reason(folders):
    detector = Detector(folders[0], CPU)
    with torch.no_grad():
        next(detector._network.parameters()).fill_(float("nan"))
        model = tiny_tracker()
        model.mask_decoder.upscale_conv1.weight.fill_(float("nan"))
    frame = media.pattern(1, SIZE)[0]
    with pytest.raises(ClipError, match="NaN or infinity from the detector"):
        detector(frame, "a car.")
    tracks = Tracks(model, SIZE, 2, CPU)
    tracks.advance(frame)
    with pytest.raises(ClipError, match="NaN or infinity from the tracker"):
        tracks.add(BOXES)


# --- whole clips, with networks that know the answer ---

RED, GREEN, BLUE = (220, 10, 10), (10, 200, 20), (30, 30, 230)
SQUARES = {  # colour: (first frame, side); drawn in this order, moving right by 2 pixels a frame
    RED: (0, 20),
    GREEN: (0, 8),
    BLUE: (6, 12),
}
STARTS = {RED: (2, 4), GREEN: (2, 30), BLUE: (30, 8)}
FRAMES = 12


def squares() -> np.ndarray:
    frames = np.full((FRAMES, SIZE[1], SIZE[0], 3), 90, np.uint8)
    for colour, (first, side) in SQUARES.items():
        x, y = STARTS[colour]
        for t in range(first, FRAMES):
            frames[t, y : y + side, x + 2 * t : x + 2 * t + side] = colour
    return frames


def where(frames: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (frames == colour).all(-1)


class Oracle:
    """Stands for both networks: finds squares, one box each, and follows a square by its colour."""

    scores = {RED: 0.4, GREEN: 0.9, BLUE: 0.6}

    def __init__(self, network, size, frames, device) -> None:
        self.size, self.colours, self.objects = size, [], 0

    @classmethod
    def detect(cls, frame: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
        scores, boxes = [0.05], [(0.5, 0.5, 1, 1)]
        for colour, score in cls.scores.items():
            ys, xs = np.nonzero(where(frame, colour))
            if len(ys):
                x0, x1, y0, y1 = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
                box = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
                boxes.append(tuple(box / np.array([*SIZE, *SIZE])))
                scores.append(score)
        return np.array(scores, np.float32), np.array(boxes, np.float32)

    def advance(self, frame: np.ndarray) -> dict[int, np.ndarray]:
        self.frame = frame
        return {i: where(frame, colour) for i, colour in enumerate(self.colours)}

    def add(self, boxes: np.ndarray) -> dict[int, np.ndarray]:
        first = self.objects
        for x0, y0, x1, y1 in boxes:
            self.colours.append(tuple(self.frame[int(y0 + y1) // 2, int(x0 + x1) // 2].tolist()))
        self.objects = len(self.colours)
        return {i: where(self.frame, self.colours[i]) for i in range(first, self.objects)}


@pytest.fixture
def oracle(monkeypatch):
    monkeypatch.setattr(segmentation, "Tracks", Oracle)
    monkeypatch.setattr(segmentation.Segmenter, "_load", lambda self: (Oracle.detect, None))
    return Oracle


def made(maker, task) -> np.ndarray:
    return np.concatenate(list(maker.make(task, lambda done, total: None)))


def test_seg_colours_by_rank_and_hands_frames_on_without_loss(oracle, tmp_path):
    frames = squares()
    seen: list[tuple[int, int]] = []
    maker = segmentation.open_seg(CPU, MakerOptions())
    windows = list(maker.make(task_of(clip_of(tmp_path, frames)), lambda *done: seen.append(done)))
    result = np.concatenate(windows)
    palette = colours(2)
    expected = np.zeros_like(frames)
    expected[where(frames, RED)] = palette[1]  # green scores best, so it is object 0
    expected[where(frames, GREEN)] = palette[0]
    np.testing.assert_array_equal(result, expected)  # blue appears later: as published, nobody looks for it
    assert seen == [(i + 1, FRAMES) for i in range(FRAMES)]
    assert all(window.dtype == np.uint8 and len(window) >= 1 for window in windows)


def test_the_same_clip_gives_the_same_bytes(oracle, tmp_path):
    task = task_of(clip_of(tmp_path, squares()))
    runs = [made(segmentation.open_seg(CPU, MakerOptions()), task) for _ in range(2)]
    assert runs[0].tobytes() == runs[1].tobytes()


def test_mask_is_the_union_in_0_and_255(oracle, tmp_path):
    frames = squares()
    result = made(segmentation.open_mask(CPU, MakerOptions()), task_of(clip_of(tmp_path, frames)))
    expected = (where(frames, RED) | where(frames, GREEN)) * np.uint8(255)
    np.testing.assert_array_equal(result, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("every", [1, 4, 8])
def test_searching_again_adds_what_appears_later_and_nothing_twice(oracle, tmp_path, every):
    frames = squares()
    maker = segmentation.open_seg(CPU, MakerOptions(detect_every=every))
    result = made(maker, task_of(clip_of(tmp_path, frames)))
    found = -(-6 // every) * every  # blue comes in frame 6
    palette = colours(3)
    expected = np.zeros_like(frames)
    expected[where(frames, RED)] = palette[1]
    expected[where(frames, GREEN)] = palette[0]
    late = where(frames, BLUE)
    late[:found] = False
    expected[late] = palette[2]
    np.testing.assert_array_equal(result, expected)
    assert late.any()


def test_searching_again_finds_what_the_first_frame_lacks(oracle, tmp_path):
    frames = squares()
    frames[:5] = 90
    task = task_of(clip_of(tmp_path, frames))
    with pytest.raises(NothingFound):
        made(segmentation.open_mask(CPU, MakerOptions()), task)
    result = made(segmentation.open_mask(CPU, MakerOptions(detect_every=5)), task)
    assert not result[:5].any() and result[5:].any(axis=(1, 2, 3)).all()


def test_at_most_100_objects_are_followed(oracle, tmp_path, monkeypatch):
    many = (np.linspace(0.9, 0.2, 150), np.tile([0.5, 0.5, 0.1, 0.1], (150, 1)))
    added = []

    def add(self, boxes):
        added.append(len(boxes))
        self.objects += len(boxes)
        return {0: np.ones((48, 64), bool)}

    monkeypatch.setattr(segmentation.Segmenter, "_load", lambda self: (lambda frame, text: many, None))
    monkeypatch.setattr(Oracle, "add", add)
    made(segmentation.open_mask(CPU, MakerOptions(detect_every=6)), task_of(clip_of(tmp_path, squares())))
    assert added == [100, 0]


def test_long_windows_are_cut_by_bytes(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(segmentation, "_WINDOW_BYTES", 5 * 64 * 48 * 3)
    maker = segmentation.open_seg(CPU, MakerOptions())
    windows = list(maker.make(task_of(clip_of(tmp_path, squares())), lambda *done: None))
    assert [len(window) for window in windows] == [5, 5, 2]


@pytest.mark.parametrize(("kind", "key"), [("seg", "control_prompt"), ("mask", "mask_prompt")])
def test_nothing_found_names_words_thresholds_and_the_way_out(oracle, tmp_path, kind, key):
    maker = segmentation.Segmenter(CPU, MakerOptions(), kind)
    task = task_of(clip_of(tmp_path, np.full((3, 48, 64, 3), 90, np.uint8)), "a blue dragon.")
    with pytest.raises(NothingFound) as caught:
        made(maker, task)
    message = str(caught.value)
    assert message.startswith("words to segment: must match something in the first frame, got no box")
    assert "clip.mkv" not in message  # it is kept for any file of the same content
    for part in ("0.15", "0.1,", "'a blue dragon.'", key):
        assert part in message
    with pytest.raises(NothingFound, match=r"any frame searched \(every 2\)"):
        made(segmentation.Segmenter(CPU, MakerOptions(detect_every=2), kind), task)


def test_boxes_without_a_single_pixel_are_nothing_found(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(Oracle, "advance", lambda self, frame: setattr(self, "frame", frame) or {})
    monkeypatch.setattr(
        Oracle, "add", lambda self, boxes: setattr(self, "objects", 2) or {0: np.zeros((48, 64), bool)}
    )
    with pytest.raises(NothingFound, match=r"got 2 boxes for 'a red car\.' but no pixel from the tracker"):
        made(segmentation.open_seg(CPU, MakerOptions()), task_of(clip_of(tmp_path, squares())))


@pytest.mark.parametrize("text", ["", " \n"])
def test_blank_words_are_refused_before_anything_loads(text, tmp_path):
    maker = segmentation.open_mask(CPU, MakerOptions())
    with pytest.raises(SpecError, match="words to segment: must not be blank"):
        made(maker, task_of(clip_of(tmp_path, squares()), text))
    assert maker._networks is None


def test_stopping_in_the_middle_stops(oracle, tmp_path):
    class Stop(Exception):
        pass

    def on_frame(done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        list(segmentation.open_seg(CPU, MakerOptions()).make(task_of(clip_of(tmp_path, squares())), on_frame))


# --- end to end with the real classes ---


def test_real_classes_end_to_end_load_make_close_and_make_again(folders, tmp_path):
    """Random weights find random boxes; the clip comes out of the tracker's own masks."""
    frames = media.pattern(3, SIZE)
    task = task_of(clip_of(tmp_path, frames))
    maker = segmentation.open_seg(CPU, options(folders))
    first = made(maker, task)
    assert first.shape == frames.shape and maker._networks is not None

    scores, boxes = Detector(folders[0], CPU)(frames[0], task.text)
    boxes = pick_boxes(scores, boxes, SIZE)
    logits = whole_clip(load_tracker(folders[1], CPU), frames, boxes)
    masks = np.stack(
        [(F.interpolate(x, (48, 64), mode="bilinear", align_corners=False)[:, 0] > 0).numpy() for x in logits]
    )  # fmt: skip  (3, N, H, W)
    expected, palette = np.zeros_like(frames), colours(len(boxes))
    for name in sorted(range(len(boxes)), key=lambda i: -masks[:, i].sum()):
        expected[masks[:, name]] = palette[name]
    np.testing.assert_array_equal(first, expected)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 2

    maker.close()
    assert maker._networks is None
    np.testing.assert_array_equal(made(maker, task), first)


def test_an_image_is_a_clip_of_one_frame(folders, tmp_path):
    path = media.write_png(tmp_path / "still.png", media.pattern(1, SIZE)[0])
    assert made(segmentation.open_mask(CPU, options(folders)), task_of(path)).shape == (1, 48, 64, 3)


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_close_to_the_cpu(folders, tmp_path):
    task = task_of(clip_of(tmp_path, media.pattern(4, SIZE)))
    gpu = segmentation.open_mask(torch.device("cuda"), options(folders))
    near = (made(gpu, task) == made(segmentation.open_mask(CPU, options(folders)), task)).mean()
    assert near > 0.95
    gpu.close()


# --- identity ---


def test_identity_names_weights_rules_and_precision_without_reading_weights(folders, monkeypatch):
    monkeypatch.setattr(registry, "_download", lambda *given: pytest.fail("downloaded"))
    published = segmentation.open_seg(CPU, MakerOptions()).identity
    assert "IDEA-Research/grounding-dino-base@12bdfa3120f3" in published
    assert "facebook/sam2.1-hiera-large@665f8e2ad61c" in published
    others = [
        segmentation.open_mask(CPU, MakerOptions()).identity,
        segmentation.open_seg(CPU, MakerOptions(tracker_model="sam2-hiera-large")).identity,
        segmentation.open_seg(CPU, MakerOptions(detect_every=30)).identity,
        segmentation.open_seg(torch.device("cuda"), MakerOptions()).identity,
        segmentation.open_seg(CPU, options(folders)).identity,
    ]
    assert len({published, *others}) == 6


def test_identity_of_a_local_folder_changes_with_its_files(folders, tmp_path):
    copies = tuple(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders)
    maker = segmentation.open_seg(CPU, options(copies))
    before = maker.identity
    assert segmentation.open_seg(CPU, options(copies)).identity == before
    with open(copies[1] / "model.safetensors", "ab") as file:
        file.write(b"\0")
    assert maker.identity != before


# --- errors ---


def test_without_transformers_the_factory_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find(name, *a)
    )
    for opened in (segmentation.open_seg, segmentation.open_mask):
        with pytest.raises(EnvironmentProblem, match=r"needs the package transformers.*pip install"):
            opened(CPU, MakerOptions())


def test_the_factory_neither_imports_transformers_nor_finds_weights(monkeypatch):
    real = builtins.__import__

    def imported(name, *given, **more):
        assert name.split(".")[0] != "transformers"
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", imported)
    maker = segmentation.open_seg(CPU, MakerOptions(detector_model="nowhere", tracker_model="nowhere"))
    maker.close()


def test_an_old_transformers_is_named(folders, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "Sam2VideoModel", None)
    with pytest.raises(
        EnvironmentProblem, match=r"Sam2VideoModel must be in transformers, got \d.*pip install"
    ):
        load_tracker(folders[1], CPU)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_detect_every_must_count_frames(every):
    with pytest.raises(SpecError, match="detect_every: must be a number of frames of at least 1"):
        segmentation.open_seg(CPU, MakerOptions(detect_every=every))


def test_a_folder_that_is_not_there_or_lacks_a_file(folders, tmp_path):
    with pytest.raises(CheckpointError, match="must be an existing folder or one of .*sam2-hiera-large"):
        segmentation.open_seg(CPU, MakerOptions(detector_model=folders[0], tracker_model="sam9")).locate()
    lame = tmp_path / "lame"
    shutil.copytree(folders[0], lame)
    (lame / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"must hold .*, got no tokenizer\.json"):
        segmentation.open_seg(CPU, options((lame, folders[1]))).locate()


def test_folders_in_the_wrong_place(folders):
    with pytest.raises(CheckpointError, match="must hold a sam2_video model, got 'grounding-dino'"):
        load_tracker(folders[0], CPU)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 64, "must hold a readable grounding-dino model"),
        ("config.json", b"[]", "must be a JSON object"),
        ("config.json", b"{", "must be a JSON object"),
        ("tokenizer.json", b"{}", "must be a tokenizer"),
        ("preprocessor_config.json", b"{}", "size must have shortest_edge and longest_edge, got None"),
        (
            "preprocessor_config.json",
            b'{"size": {"height": 3}}',
            "size must have shortest_edge and longest_edge",
        ),
    ],
)
def test_damaged_files(folders, tmp_path, file, content, message):
    folder = Path(shutil.copytree(folders[0], tmp_path / "detector"))
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Detector(folder, CPU)


def test_missing_weights_are_an_error_not_random_numbers(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folders[1], tmp_path / "tracker"))
    state = load_file(folder / "model.safetensors")
    del state["memory_encoder.projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"got 1 too few: memory_encoder\.projection\.weight"):
        load_tracker(folder, CPU)


def test_published_ids_download_each_file_at_its_revision(monkeypatch, tmp_path):
    calls = []

    def download(repo, revision, file, *given):
        calls.append((repo, revision[:8], file))
        return tmp_path / repo.replace("/", "--") / file

    monkeypatch.setattr(registry, "_download", download)
    maker = segmentation.open_seg(CPU, MakerOptions(tracker_model="sam2-hiera-large"))
    maker.locate()
    assert {call[:2] for call in calls} == {
        ("IDEA-Research/grounding-dino-base", "12bdfa31"),
        ("facebook/sam2-hiera-large", "main"),
    }
    assert {file for repo, _, file in calls if "dino" in repo} >= set(segment_networks.DETECTOR_FILES)
    assert maker._folders == (
        tmp_path / "IDEA-Research--grounding-dino-base",
        tmp_path / "facebook--sam2-hiera-large",
    )


def test_frames_reach_the_tracker_as_they_were_drawn(oracle, tmp_path, monkeypatch):
    frames, seen = squares(), []
    advance = Oracle.advance
    monkeypatch.setattr(Oracle, "advance", lambda self, frame: seen.append(frame) or advance(self, frame))
    task = task_of(clip_of(tmp_path, frames))
    made(segmentation.open_seg(CPU, MakerOptions()), task)
    np.testing.assert_array_equal(np.stack(seen), frames)
