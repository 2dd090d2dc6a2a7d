"""Guardrails: every judge on its own, the 10 % rule over chunks, and what becomes of a clip that is blocked."""

from __future__ import annotations

import difflib
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rails
import torch
from system import CHUNK, clip_of, generate, leftovers, open_engine, request, write_spec

from cosmos_fast import guardrails, guardrails_text
from cosmos_fast import guardrails_faces as faces
from cosmos_fast.engine import Engine
from cosmos_fast.formats import CheckpointError, ClipError, EnvironmentProblem, Refused
from cosmos_fast.guardrails import OFF_BY_REQUEST, OFF_FOR_OWN_WEIGHTS, Guardrails, Watch, screening
from cosmos_fast.guardrails_frames import CLASSES, UNSAFE, ContentFilter, class_name, is_over
from cosmos_fast.guardrails_text import Blocklist, PromptJudge, Verdict, parse
from cosmos_fast.guards import StopFlag
from cosmos_fast.outputs import OutputFolder
from cosmos_fast.planning import preflight
from cosmos_fast.runner import Options, run_batch
from cosmos_fast.spec import NEGATIVE_PROMPT

GOLDEN = Path(__file__).parent / "golden" / "guardrails.npz"
CPU = torch.device("cpu")
IMAGE: dict[str, Any] = {"num_video_frames_per_chunk": 1}


@pytest.fixture(scope="module")
def blocklist(tmp_path_factory: pytest.TempPathFactory) -> Blocklist:
    return Blocklist(rails.make_blocklist(tmp_path_factory.mktemp("blocklist")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rails")
    rails.make_guardrails(path)
    return path


@pytest.fixture
def opened(folder: Path) -> Guardrails:
    """Fresh, so that no test sees what another one read."""
    return Guardrails.open(
        folder / "home", prompt_judge=folder / "judge", frame_tower=folder / "tower", device="cpu"
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_of(tmp_path_factory.mktemp("clips") / "street.mp4", 9)


# --- word lists ---


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ("A GROBNIK in the rain.", "a word of the list: 'GROBNIK'"),
        ("a gr0bnik walks", "a word of the list: 'gr0bnik'"),  # letters that look alike
        ("many flarnae here", "a word of the list: 'flarn'"),  # the dictionary form alone is listed
        ("It is a Red  Herring!", "a phrase of the list: 'red herring'"),
        (
            "a wubble! here",
            "a phrase of the list: 'wubble!'",
        ),  # ends in no word character: the ratio finds it
        ("say zorp.", "a phrase of the list: 'zorp'"),
        ("the quaxolotl", "a phrase of the list: 'quaxolotl'"),
        ("grobnik\u2603", "a word of the list: 'grobnik'"),
        ("", "the prompt is empty"),
    ],
)
def test_listed_words_block(blocklist: Blocklist, prompt: str, reason: str) -> None:
    verdict = blocklist.judge(prompt)
    assert not verdict.is_safe and verdict.check == "blocklist" and verdict.reason == reason


@pytest.mark.parametrize(
    "prompt",
    [
        "A busy street.", "Two blisters on a foot.", "zorps and zorpy", "a read herrings shop", "red fish, herring",
        "five * stars ** and ***", "caf\u00e9 au lait \u2588\u2588", NEGATIVE_PROMPT,
    ],
)  # fmt: skip
def test_other_words_do_not(blocklist: Blocklist, prompt: str) -> None:
    assert blocklist.judge(prompt) == Verdict(True, "blocklist")


def test_ratio_counts_from_six_characters_and_takes_no_letter_more(blocklist: Blocklist) -> None:
    """At the published tolerance of 0.4 characters one letter more is already too far, at any length over two."""
    assert not blocklist.judge("a wubble! b").is_safe and blocklist.judge("a zop! b").is_safe
    for text, entry in (
        ("quaxolotll", "quaxolotl"),
        ("redd herring", "red herring"),
        ("wubblee!", "wubble!"),
    ):
        ratio = difflib.SequenceMatcher(None, text, entry).ratio()
        assert (len(entry) - 0.5) / len(entry) <= ratio < (len(entry) - 0.4) / len(entry)
        assert blocklist.judge(f"a {text} b").is_safe


def test_links_of_the_hub_cache_are_no_obstacle(tmp_path: Path) -> None:
    real = rails.make_blocklist(tmp_path / "blobs")
    for file in [path for path in real.rglob("*") if path.is_file()]:
        link = tmp_path / "snapshot" / file.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert not Blocklist(tmp_path / "snapshot").judge("many flarnae").is_safe


@pytest.mark.parametrize(
    "damage, message",
    [
        ("custom", "custom must be a folder of word lists, got none"),
        ("exact_match", "exact_match must be a folder of word lists, got none"),
        ("nltk_data", "must hold nltk_data, got none. Download it again"),
    ],
)
def test_incomplete_lists_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    folder = rails.make_blocklist(tmp_path / "b")
    (folder / damage).rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=message):
        Blocklist(folder)


def test_empty_list_does_not_fall_back_to_another(tmp_path: Path) -> None:
    folder = rails.make_blocklist(tmp_path / "b")
    (folder / "custom" / "words").write_text("\n \n")
    with pytest.raises(CheckpointError, match="custom must hold words, got none"):
        Blocklist(folder)


# --- language model ---


@pytest.mark.parametrize(
    "answer, is_safe, reason, detail",
    [
        ("Safety: Safe\nCategories: None", True, "", "Safe"),
        ("Safety: Controversial\nCategories: Politically Sensitive Topics", True, "", "Controversial"),
        ("Safety: Unsafe\nCategories: Violent", False, "judged Unsafe (Violent)", "Unsafe"),
        ("Safety: Unsafe\nCategories: None", False, "judged Unsafe", "Unsafe"),
        ("text before Safety: Unsafe", False, "judged Unsafe", "Unsafe"),
    ],
)
def test_answers_are_read(answer: str, is_safe: bool, reason: str, detail: str) -> None:
    assert parse(answer) == Verdict(is_safe, "prompt judge", reason, detail)


@pytest.mark.parametrize("answer", ["", "I cannot say.", "Safety: Safeguard", "safety unsafe"])
def test_an_answer_without_judgement_is_a_fault_not_safe(answer: str) -> None:
    with pytest.raises(ClipError, match="must answer Safe, Unsafe or Controversial, got"):
        parse(answer)


def test_judge_asks_the_model_and_leaves_random_state_alone(tmp_path: Path) -> None:
    judge = PromptJudge(rails.make_judge(tmp_path / "unsafe", rails.UNSAFE), CPU)
    before = torch.get_rng_state()
    answers = [judge.answer("A busy street.") for _ in range(2)]
    assert answers[0] == answers[1] and answers[0].startswith(rails.UNSAFE)
    assert torch.equal(torch.get_rng_state(), before)
    assert judge._model.dtype == torch.bfloat16 and not judge.judge("A busy street.").is_safe


def test_judge_needs_every_weight_and_a_template(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = rails.make_judge(tmp_path / "judge")
    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.layers.0.mlp.up_proj.weight")
    assert lost.numel()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="must hold every weight, got no .*up_proj"):
        PromptJudge(folder, CPU)
    bare = rails.make_judge(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="must hold a chat template"):
        PromptJudge(bare, CPU)
    with pytest.raises(CheckpointError, match="must hold a causal language model and its tokenizer"):
        PromptJudge(tmp_path, CPU)


# --- prompts of a batch ---


class Fake:
    """A judge that blocks what contains a word, and fails on another."""

    def __init__(self, name: str, blocks: str) -> None:
        self.name, self.blocks = name, blocks
        self.asked: list[str] = []

    def judge(self, prompt: str) -> Verdict:
        self.asked.append(prompt)
        if "crash" in prompt:
            raise RuntimeError("out of luck")
        return Verdict(self.blocks not in prompt, self.name, "a bad word" if self.blocks in prompt else "")


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> tuple[Fake, Fake]:
    pair = Fake("first", "bad"), Fake("second", "worse")
    monkeypatch.setattr(Guardrails, "text_checks", lambda self: iter(pair))
    return pair


def test_each_prompt_is_judged_once_and_only_until_blocked(
    opened: Guardrails, judges: tuple[Fake, Fake]
) -> None:
    prompts = ["good", "bad", "worse", "crash"]
    opened.read([*prompts, "good"])
    opened.read(prompts)
    assert judges[0].asked == prompts and judges[1].asked == ["good", "worse"]
    assert opened.admit({"prompt": "good", "negative_prompt": ""}) == {
        "prompt": {"first": "Safe", "second": "Safe"}
    }
    with pytest.raises(Refused, match="^guardrails: prompt is blocked by the first: a bad word.$"):
        opened.admit({"prompt": "bad"})
    with pytest.raises(Refused, match="negative_prompt is blocked by the second"):
        opened.admit({"prompt": "good", "negative_prompt": "worse"})
    with pytest.raises(
        ClipError, match="prompt could not be checked, first: RuntimeError: out of luck"
    ) as fault:
        opened.admit({"prompt": "crash"})
    assert not isinstance(fault.value, Refused)


def test_real_judges_in_their_order(opened: Guardrails) -> None:
    record = opened.admit({"prompt": "A busy street.", "negative_prompt": "blurry"})
    assert record == {
        key: {"blocklist": "Safe", "prompt judge": "Safe"} for key in ("prompt", "negative_prompt")
    }
    with pytest.raises(Refused, match="prompt is blocked by the blocklist: a word of the list: 'grobnik'"):
        opened.admit({"prompt": "a grobnik"})
    with pytest.raises(Refused, match="the prompt is empty"):
        opened.admit({"prompt": ""})


# --- frames ---


def watch(frames: int, classes: Callable[[int], int], found: list[int] | None = None) -> Watch:
    """A watch over frames whose number is their first pixel."""
    return Watch(
        frames, lambda batch: [classes(int(frame[0, 0, 0])) for frame in batch],
        lambda batch: [0] * len(batch) if found is None else found, {"requested": True, "run": True}, {"versions": {}},
    )  # fmt: skip


def numbered(start: int, stop: int) -> np.ndarray:
    frames = np.zeros((stop - start, 2, 2, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(start, stop)
    return frames


@pytest.mark.parametrize("unsafe, frames, blocked", [(18, 186, False), (19, 186, True), (2, 20, False), (3, 20, True), (1, 1, True), (1, 9, True), (1, 10, False)])  # fmt: skip
def test_more_than_a_tenth_of_the_whole_clip_blocks(unsafe: int, frames: int, blocked: bool) -> None:
    """The unsafe frames come last: no chunk alone decides."""
    one = watch(frames, lambda number: 3 if number >= frames - unsafe else 0)
    cuts = [0, *range(7, frames, 7), frames]
    if blocked:
        with pytest.raises(Refused, match=rf"at most 10% of {frames} frames may be unsafe, got .* Drugs\)"):
            for start, stop in zip(cuts, cuts[1:]):
                one.screen(numbered(start, stop))
    else:
        for start, stop in zip(cuts, cuts[1:]):
            one.screen(numbered(start, stop))
        assert one.finish()["video"]["unsafe"] == unsafe
    assert is_over(unsafe, frames) is blocked


def test_a_clip_beyond_the_limit_ends_at_once() -> None:
    one = watch(100, lambda number: 4 if number < 20 else 0)
    one.screen(numbered(0, 10))
    with pytest.raises(Refused, match=r"got 20 in the first 20 \(20 Child_Abuse\)"):
        one.screen(numbered(10, 20))


def test_only_named_classes_count_and_all_are_recorded() -> None:
    assert [class_name(i) for i in range(CLASSES)] == [
        "Safe", "Sexual_Content", "class 2", "Drugs", "Child_Abuse", "Hate_and_Harassment", "Self-Harm",
    ]  # fmt: skip
    one = watch(10, lambda number: 2 if number else 6, [1, 0, 2, 0, 0, 0, 0, 0, 0, 0])
    one.screen(numbered(0, 10))
    assert one.finish()["video"] == {
        "frames": 10, "unsafe": 1, "limit": 0.1, "classes": {"Self-Harm": 1, "class 2": 9},
        "faces": 3, "frames_with_faces": 2,
    }  # fmt: skip
    assert sorted(UNSAFE) == [1, 3, 4, 5, 6]


def test_the_callers_frames_stay_as_they_are() -> None:
    def blacken(frames: np.ndarray) -> list[int]:
        frames[:] = 0
        return [1] * len(frames)

    given = numbered(1, 5)
    shown = Watch(4, lambda batch: [0] * len(batch), blacken, {}, {}).screen(given)
    assert not shown.any() and np.array_equal(given, numbered(1, 5))


def test_frames_that_were_not_seen_are_not_safe() -> None:
    one = watch(10, lambda number: 0)
    one.screen(numbered(0, 9))
    with pytest.raises(ClipError, match="all 10 frames must be checked, got 9"):
        one.finish()
    short = Watch(4, lambda batch: [0], lambda batch: [0], {}, {})
    with pytest.raises(ClipError, match="4 frames must get a class each, got 1"):
        short.screen(numbered(0, 4))


def test_filter_gives_each_frame_its_class_whatever_the_batch(folder: Path) -> None:
    home = folder / "home"
    found = ContentFilter(folder / "tower", home / "video_content_safety_filter" / "safety_filter.pt", CPU)
    frames = np.random.default_rng(0).integers(0, 256, (11, 48, 40, 3), dtype=np.uint8)
    frames[5:] //= 4
    classes = found.classify(frames)
    assert classes == [c for frame in frames for c in found.classify(frame[None])] and len(classes) == 11
    features = found.features(torch.from_numpy(frames))
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(11))
    state = torch.load(home / "video_content_safety_filter" / "safety_filter.pt")["model"]
    x = features
    for index in (0, 3, 6):
        x = x @ state[f"network.layers.{index}.weight"].T + state[f"network.layers.{index}.bias"]
        if index < 6:
            norm = {
                k: state[f"network.layers.{index + 1}.{k}"]
                for k in ("running_mean", "running_var", "weight", "bias")
            }
            x = (x - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt() * norm["weight"] + norm[
                "bias"
            ]
            x = x.clamp(min=0)
    assert x.argmax(-1).tolist() == classes


def test_features_are_the_pooled_output_of_the_processors_pixels(folder: Path) -> None:
    import transformers
    from PIL import Image

    found = ContentFilter(
        folder / "tower", folder / "home" / "video_content_safety_filter" / "safety_filter.pt", CPU
    )
    frame = np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    small = (
        Image.fromarray(frame)
        .resize((32, 50), Image.Resampling.BICUBIC)
        .resize((32, 32), Image.Resampling.BICUBIC)
    )
    pixels = (torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    assert isinstance(found._tower, transformers.SiglipVisionModel)
    pooled = found._tower(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found.features(torch.from_numpy(frame)[None]), pooled / pooled.norm())


def test_classifier_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    wide = rails.make_classifier(tmp_path / "wide.pt", width=40)
    with pytest.raises(CheckpointError, match=r"must read features of width 32 .* got 40"):
        ContentFilter(folder / "tower", wide, CPU)
    state = torch.load(wide)["model"]
    torch.save({"model": {k: v for k, v in state.items() if ".3." not in k}}, tmp_path / "cut.pt")
    with pytest.raises(CheckpointError, match="must hold the frame classifier"):
        ContentFilter(folder / "tower", tmp_path / "cut.pt", CPU)
    state["network.layers.0.weight"].fill_(float("nan"))
    torch.save({"model": state}, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match="must be finite"):
        ContentFilter(folder / "tower", tmp_path / "nan.pt", CPU)


# --- faces ---


def formulas(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that need no file: a sine of their index, scaled so that activations stay of order one."""
    out = {}
    for i, (key, like) in enumerate(sorted(state.items())):
        if not like.dtype.is_floating_point:
            out[key] = torch.zeros_like(like)
            continue
        steps = torch.arange(like.numel(), dtype=torch.float32)
        wave = torch.sin(steps * (0.37 + 0.001 * i) + i).reshape(like.shape)
        if like.ndim == 4:
            out[key] = wave * (2.0 / (like.shape[1] * like.shape[2] * like.shape[3])) ** 0.5 * 1.2
        elif "running_var" in key:
            out[key] = 1 + 0.3 * wave
        else:
            out[key] = 1 + 0.2 * wave if key.endswith("weight") else 0.1 * wave
    return out


def test_detector_is_the_published_network() -> None:
    """Names, shapes and outputs recorded from the published package with the same formulas as weights."""
    net = faces.RetinaFace().eval()
    names = "\n".join(f"{k} {tuple(v.shape)}" for k, v in sorted(net.state_dict().items()))
    assert hashlib.sha256(names.encode()).hexdigest().startswith("eb54b880ab291bf8")
    net.load_state_dict(formulas(net.state_dict()))
    x = torch.sin(torch.arange(3 * 72 * 88, dtype=torch.float32) * 0.013).reshape(1, 3, 72, 88) * 100
    with torch.inference_mode():
        boxes, scores = net(x)
    golden = np.load(GOLDEN)
    np.testing.assert_allclose(boxes[0].numpy()[::7], golden["face_boxes"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores[0].numpy()[::7], golden["face_scores"], rtol=1e-3, atol=1e-4)


def test_anchors_and_boxes() -> None:
    grid = faces.anchors(72, 88)
    assert len(grid) == 2 * (9 * 11 + 5 * 6 + 3 * 3)
    np.testing.assert_allclose(grid[0], [4 / 88, 4 / 72, 16 / 88, 16 / 72], rtol=1e-6)
    np.testing.assert_allclose(grid[3], [12 / 88, 4 / 72, 32 / 88, 32 / 72], rtol=1e-6)
    np.testing.assert_allclose(grid[-1], [80 / 88, 80 / 72, 512 / 88, 512 / 72], rtol=1e-6)
    anchor = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    np.testing.assert_allclose(faces.decode(torch.zeros(1, 4), anchor), [[0.4, 0.3, 0.6, 0.7]], rtol=1e-5)
    moved = faces.decode(torch.tensor([[1.0, -1.0, np.log(2) / 0.2, 0.0]]), anchor)
    np.testing.assert_allclose(moved, [[0.32, 0.26, 0.72, 0.66]], rtol=1e-5)


def test_only_the_best_of_overlapping_boxes_stays() -> None:
    boxes = np.array(
        [[0, 0, 99, 99], [10, 0, 109, 99], [60, 0, 159, 99], [300, 0, 340, 40], [400, 0, 440, 40]], np.float32
    )
    scores = np.array([0.8, 0.9, 0.75, 0.7, 0.71], np.float32)
    # 1 beats 0 (overlap 90 / 110); 2 shares 50 columns with 1 (50 / 150 < 0.4); a score of 0.7 is not over 0.7.
    assert np.array_equal(faces.strongest(boxes, scores), boxes[[1, 2, 4]])
    assert len(faces.strongest(boxes, np.zeros(5, np.float32))) == 0


def test_mosaic_has_five_blocks_a_side_inside_the_box_alone() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    before = frame.copy()
    boxes = np.array(
        [[10.9, 5, 40, 45], [-30, 60, 20, 120], [50, 50, 69, 75], [200, 5, 260, 70], [60, 2, 90, 21]],
        np.float32,
    )
    assert faces.pixelate(frame, boxes) == 2  # the third and last are under 20 pixels, the fourth is outside
    changed = np.zeros((80, 100), bool)
    changed[5:45, 10:40] = changed[60:80, 0:20] = True
    assert np.array_equal(frame[~changed], before[~changed])
    block = frame[5:45, 10:40]
    assert len(np.unique(block.reshape(-1, 3), axis=0)) <= 25
    assert np.array_equal(block[:8, :6], np.broadcast_to(block[0, 0], (8, 6, 3)))


def test_filter_covers_what_the_network_finds_frame_by_frame(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = faces.FaceFilter(folder / "home" / "face_blur_filter" / "Resnet50_Final.pth", CPU)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    before, sizes = frames.copy(), []
    assert found.cover(frames) == [0, 0] and np.array_equal(frames, before)

    def face(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(tuple(x.shape))
        corner = x[0, :, 0, 0] + torch.tensor(faces.MEAN_BGR)
        assert corner.tolist() == frames[len(sizes) - 1, 0, 0, ::-1].tolist()  # BGR, means removed
        count = len(faces.anchors(64, 64))
        scores = torch.zeros(1, count)
        scores[0, 2 * 64 + 2] = 0.99  # first anchor of row 0, column 1 of stride 16: 64 x 64 around (24, 8)
        return torch.zeros(1, count, 4), scores

    monkeypatch.setattr(found, "_net", face)
    assert found.cover(frames) == [1, 1] and sizes == [(1, 3, 64, 64)] * 2
    assert not np.array_equal(frames[0, :40, :56], before[0, :40, :56])
    assert np.array_equal(frames[:, :, 56:], before[:, :, 56:]) and np.array_equal(
        frames[:, 40:], before[:, 40:]
    )


def test_detector_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "home" / "face_blur_filter" / "Resnet50_Final.pth")
    torch.save({k: v for k, v in state.items() if "ssh2.conv5X5_1.0" not in k}, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="(?s)must hold a RetinaFace network.*ssh2.conv5X5_1.0.weight"):
        faces.FaceFilter(tmp_path / "cut.pth", CPU)
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="must hold a RetinaFace network"):
        faces.FaceFilter(tmp_path / "other.pth", CPU)


# --- on, off, missing ---


def test_on_for_published_weights_alone_unless_chosen(
    opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cosmos_fast.models import is_published

    assert [
        is_published(name) for name in ("edge", "multi", "published", "edge/distilled", "edge/older")
    ] == [True] * 5
    assert [is_published(name) for name in (None, "tiny", "./edge", "model.pt", {"edge": "edge"})] == [
        False
    ] * 5
    monkeypatch.setattr(Guardrails, "open", classmethod(lambda cls, device=None: opened))
    assert screening(None, True) == (opened, None) == screening(True, False) == screening(opened, False)
    assert screening(None, False) == (None, OFF_FOR_OWN_WEIGHTS)
    assert screening(False, True) == (None, OFF_BY_REQUEST)


def test_missing_package_names_the_command_and_the_way_without(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = metadata.version

    def version(package: str) -> str:
        if package in ("nltk", "better-profanity"):
            raise metadata.PackageNotFoundError(package)
        return kept(package)

    monkeypatch.setattr(guardrails_text.metadata, "version", version)
    with pytest.raises(
        EnvironmentProblem,
        match=r"need the packages better-profanity, nltk.*pip install 'cosmos-fast\[guardrails\]'.*--no-guardrails",
    ):
        Guardrails.open()


def test_weights_that_cannot_be_had_name_the_way_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import errors

    class Gated(errors.GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "gated")
            self.response = type("R", (), {"status_code": 403})()

    def refuse(*args: Any, **options: Any) -> str:
        assert args[0] == "nvidia/Cosmos-Guardrail1" and "blocklist/*" in options["allow_patterns"]
        assert options["revision"] == "d6d4bfa899a71454a700907664f3e88f503950cf"
        raise Gated

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        EnvironmentProblem, match=r"licence to be accepted.*Cosmos-Guardrail1.*--no-guardrails"
    ):
        Guardrails.open(device="cpu")
    with pytest.raises(CheckpointError, match=r"must hold blocklist, got none.*--no-guardrails"):
        Guardrails.open(tmp_path, prompt_judge=folder / "judge", frame_tower=folder / "tower", device="cpu")
    with pytest.raises(CheckpointError, match=r"must hold config.json.*--no-guardrails"):
        Guardrails.open(folder / "home", prompt_judge=tmp_path, frame_tower=folder / "tower", device="cpu")


# --- in a batch ---


def batch_of(
    models: Path, out: Path, specs: list[Any], rails_: Guardrails | None, **options: Any
) -> tuple[Any, list[str], list[str]]:
    """(summary, lines, models opened) of the specs made with the smallest networks."""
    from cosmos_fast.models import limits, local_configs
    from cosmos_fast.recipe import Recipe

    batch = preflight(
        specs, "edge", configs=local_configs(models, "edge"), recipe=Recipe.fp32(), **limits(models)
    )
    lines: list[str] = []
    opened: list[str] = []

    def open_one(model: str) -> Engine:
        opened.append(model)
        return open_engine(models, model, guardrails=rails_ if rails_ is not None else options.get("choice"))

    with StopFlag(1.0) as stop:
        summary = run_batch(
            batch, open_one, OutputFolder(out),
            options=Options(guardrails=rails_, resume=options.get("resume", False)), stop=stop, report=lines.append,
        )  # fmt: skip
    return summary, lines, opened


def manifest(out: Path) -> list[tuple[str, str]]:
    return [
        (r["name"], r["status"]) for r in map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    ]


def names(out: Path) -> set[str]:
    return {p.name for p in out.iterdir() if p.name not in ("manifest.jsonl", "run.json", ".lock")}


def test_safe_clip_is_made_and_its_record_tells_all(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails
) -> None:
    summary, _, _ = batch_of(models, tmp_path, [request(clip, "street", max_frames=CHUNK)], opened)
    assert summary.done == ["street"] and not summary.failed
    record = json.loads((tmp_path / "street.json").read_text())
    rail = record["guardrail"]
    assert rail["requested"] is rail["run"] is True and rail["reason"] is None
    assert rail["text"]["prompt"] == {"blocklist": "Safe", "prompt judge": "Safe"}
    assert set(rail["text"]) == {"prompt", "negative_prompt"}
    assert (
        rail["video"]["frames"] == CHUNK == sum(rail["video"]["classes"].values())
        and rail["video"]["limit"] == 0.1
    )
    assert rail["versions"] == {p: metadata.version(p) for p in ("better-profanity", "nltk", "transformers")}
    assert rail["weights"]["guardrail"] == str(opened.folder)
    assert record["stages"]["guardrails"]["beside_s"] > 0


def unsafe_clips(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[int], list[int]]) -> None:
    """Frames get the classes of `verdict(call)`; every call is one chunk."""
    calls: Iterator[int] = iter(range(1000))
    monkeypatch.setattr(
        ContentFilter, "classify", lambda self, frames: (verdict(next(calls)) * len(frames))[: len(frames)]
    )


def test_blocked_video_leaves_nothing_and_the_next_clip_is_made(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsafe_clips(monkeypatch, lambda call: [1] if call == 1 else [0])  # the first clip's second chunk
    summary, lines, _ = batch_of(models, tmp_path, [request(clip, "one"), request(clip, "two")], opened)
    assert summary.done == ["two"] and list(summary.refused) == ["one"] and summary.exit_code == 1
    assert (
        "video is blocked by the content filter: at most 10% of 9 frames may be unsafe"
        in summary.refused["one"]
    )
    assert any(line.startswith("one: refused: guardrails: video is blocked") for line in lines)
    assert manifest(tmp_path) == [("one", "refused"), ("two", "done")]
    assert not [name for name in names(tmp_path) if name.startswith("one")] and leftovers(tmp_path) == []


def test_blocked_prompt_loads_no_model_and_the_rest_is_made(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails
) -> None:
    bad = request(clip, "bad", prompt="A grobnik dances.")
    summary, lines, loaded = batch_of(models, tmp_path / "alone", [bad], opened)
    assert loaded == [] and manifest(tmp_path / "alone") == [("bad", "refused")]
    assert "prompt is blocked by the blocklist" in summary.refused["bad"] and "grobnik" in lines[0]
    assert summary.failed == {} and summary.exit_code == 4
    summary, _, loaded = batch_of(models, tmp_path / "both", [bad, request(clip, "good", **IMAGE)], opened)
    assert loaded == ["edge"] and summary.done == ["good"] and list(summary.refused) == ["bad"]


def test_a_check_that_crashes_fails_the_clip(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any) -> list[int]:
        raise RuntimeError("no luck")

    monkeypatch.setattr(ContentFilter, "classify", crash)
    summary, _, _ = batch_of(models, tmp_path, [request(clip, "street", **IMAGE)], opened)
    assert summary.failed["street"].startswith("RuntimeError: no luck")
    assert manifest(tmp_path) == [("street", "failed")] and names(tmp_path) == set()


def test_without_guardrails_the_record_says_why(models: Path, clip: Path, tmp_path: Path) -> None:
    for choice, reason in ((None, OFF_FOR_OWN_WEIGHTS), (False, OFF_BY_REQUEST)):
        out = tmp_path / str(choice)
        batch_of(models, out, [request(clip, "street", **IMAGE)], None, choice=choice)
        record = json.loads((out / "street.json").read_text())
        assert record["guardrail"] == {"requested": False, "run": False, "reason": reason}


def test_resume_makes_unscreened_clips_again(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails
) -> None:
    spec = request(clip, "street", **IMAGE)
    batch_of(models, tmp_path, [spec], None)
    summary, lines, _ = batch_of(models, tmp_path, [spec], opened, resume=True)
    assert summary.done == ["street"] and "street: made again: it was made without guardrails" in lines
    assert batch_of(models, tmp_path, [spec], opened, resume=True)[0].skipped == ["street"]
    assert batch_of(models, tmp_path, [spec], None, resume=True)[0].skipped == ["street"]


def test_faces_are_covered_in_what_is_written(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blacken(self: Any, frames: np.ndarray) -> list[int]:
        frames[:, :, : frames.shape[2] // 2] = 0
        return [1] * len(frames)

    monkeypatch.setattr(faces.FaceFilter, "cover", blacken)
    batch_of(models, tmp_path, [request(clip, "street", max_frames=CHUNK)], opened)
    import media

    written = media.read(tmp_path / "street.mp4")
    assert written[:, :, :20].mean() < 8 < written[:, :, 40:].mean()
    assert json.loads((tmp_path / "street.json").read_text())["guardrail"]["video"]["faces"] == CHUNK


# --- from the command line ---


def test_switch_of_the_command_line(
    models: Path, clip: Path, tmp_path: Path, opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guardrails, "open", classmethod(lambda cls, device=None: opened))
    good, bad = (
        write_spec(tmp_path, "good", clip, **IMAGE),
        write_spec(tmp_path, "bad", clip, prompt="a grobnik"),
    )
    for switch, reason in (((), OFF_FOR_OWN_WEIGHTS), (("--no-guardrails",), OFF_BY_REQUEST)):
        out = tmp_path / str(len(switch))
        assert generate(models, out, good, *switch).code == 0
        assert json.loads((out / "good.json").read_text())["guardrail"]["reason"] == reason
    run = generate(models, tmp_path / "on", good, bad, "--guardrails")
    assert run.code == 1 and [path.name for path in run.paths] == ["good.jpg"]
    assert "bad: refused: guardrails: prompt is blocked by the blocklist" in run.err
    assert json.loads((tmp_path / "on" / "good.json").read_text())["guardrail"]["run"] is True
    alone = generate(models, tmp_path / "alone", bad, "--guardrails")
    assert alone.code == 4 and not alone.paths


def test_missing_parts_end_the_command_before_anything_starts(
    models: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(guardrails_text.metadata, "version", version)
    run = generate(models, tmp_path / "out", write_spec(tmp_path, "good", clip, **IMAGE), "--guardrails")
    assert (
        run.code == 3 and "pip install 'cosmos-fast[guardrails]'" in run.err and "--no-guardrails" in run.err
    )
    assert not (tmp_path / "out").exists()


# --- as a library ---


def test_library_stream_screens_prompt_and_frames(
    models: Path, clip: Path, opened: Guardrails, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(models, guardrails=opened)
    assert engine.guardrails is opened and engine.unguarded is None
    with pytest.raises(Refused, match="prompt is blocked"):
        next(engine.stream(request(clip, prompt="a grobnik")))
    assert len(engine.generate(request(clip, **IMAGE)).frames) == 1
    unsafe_clips(monkeypatch, lambda call: [5] if call else [0])
    parts = engine.stream(request(clip))
    next(parts)
    with pytest.raises(Refused, match="Hate_and_Harassment"):
        next(parts)


def test_judges_are_freed_after_reading(opened: Guardrails, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Heavy(Fake):
        def __init__(self) -> None:
            super().__init__("heavy", "bad")
            made.append(weakref.ref(self))

    alive: list[bool] = []
    monkeypatch.setattr(Guardrails, "text_checks", lambda self: (Heavy() for _ in range(2)))
    monkeypatch.setattr(guardrails, "_free", lambda device: alive.extend(ref() is not None for ref in made))
    opened.read(["good"])
    assert len(made) == 2 and alive == [False, False]
