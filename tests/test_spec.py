"""Spec files: every rule, every default, every problem reported with its place."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import string
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cosmos_fast import jsonc
from cosmos_fast.formats import CONTROLS, RESOLUTIONS, SpecError
from cosmos_fast.spec import (
    NEGATIVE_PROMPT,
    Spec,
    control_union,
    json_schema,
    load_specs,
    load_valid_specs,
)

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A folder with empty media files: specs judge them by suffix and stat alone."""
    for name in ("in.mp4", "edge.mp4", "mask.mp4", "style.png", "labels.npz", "IN.MOV"):
        (tmp_path / name).touch()
    (tmp_path / "prompt.txt").write_text("  A robot arm.\r\nIt moves. \n")
    return tmp_path


def put(folder: Path, text: str | dict, name: str = "clip.json") -> Path:
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False), encoding="utf-8")
    return path


def good(**fields) -> dict:
    return {"prompt": "A robot.", "video_path": "in.mp4", "edge": {}} | fields


def problems(folder: Path, text: str | dict, name: str = "clip.json", **overrides) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_specs([put(folder, text, name)], overrides, cwd=folder)
    return caught.value.problems


def one(folder: Path, **fields) -> Spec:
    return Spec.load(put(folder, good(**fields)))


# --- defaults and the published files -----


def test_defaults_are_the_published_ones(folder):
    assert one(folder).resolved() == {
        "name": "clip",
        "prompt": "A robot.",
        "negative_prompt": NEGATIVE_PROMPT,
        "seed": 2025,
        "guidance": 3,
        "video_path": str(folder / "in.mp4"),
        "max_frames": None,
        "context_frame_index": None,
        "image_context_path": None,
        "num_conditional_frames": 1,
        "resolution": "720",
        "sigma_max": None,
        "num_video_frames_per_chunk": 93,
        "num_steps": None,
        "show_control_condition": False,
        "show_input": False,
        "keep_input_resolution": True,
        "edge": {
            "control_path": None,
            "control_weight": 1.0,
            "mask_path": None,
            "mask_prompt": None,
            "preset_edge_threshold": "medium",
        },
        "guided_generation_mask": None,
        "guided_generation_step_threshold": 25,
        "guided_generation_foreground_labels": None,
        "output_dir": None,
    }
    # The published literal, letter for letter: embeddings are looked up by it.
    assert hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()[:16] == "aae258ebc64c61b0"


GUIDE = """{
    // a comment
    "prompt_path": "assets/robot_prompt.json",
    "output_dir": "outputs/robot_multicontrol", /* and
    another */
    "video_path": "assets/robot_input.mp4",
    "guidance": 3,
    "depth": {"control_path": "assets/depth.mp4", "control_weight": 0.5},
    "edge": {
        "control_path": "assets/edge.mp4",
        // trailing comma below
    },
    "seg": {"control_path": "assets/seg.mp4", "control_weight": 1.0},
    "vis":{ "control_weight": 0.5 }
}
"""


def test_the_commented_form_of_the_guide(folder):
    (folder / "assets").mkdir()
    for name in ("robot_input", "depth", "edge", "seg"):
        (folder / "assets" / f"{name}.mp4").touch()
    put(folder, {"prompt": " A lab. "}, "assets/robot_prompt.json")
    spec = Spec.load(put(folder, GUIDE, "robot.json"))
    assert (spec.name, spec.prompt, spec.guidance) == ("robot", "A lab.", 3)
    assert spec.output_dir == folder / "outputs/robot_multicontrol"
    assert spec.source == folder / "robot.json"
    assert list(spec.controls) == list(CONTROLS)
    assert [control.control_weight for control in spec.controls.values()] == [1.0, 0.5, 0.5, 1.0]
    assert spec.depth.control_path == folder / "assets/depth.mp4"


def test_the_shipped_multi_control_values(folder):
    (folder / "multi").mkdir()
    paths = {key: {"control_path": "../edge.mp4"} for key in ("depth", "edge", "seg")}
    fields = {
        "name": "robot_multicontrol",
        "prompt_path": "../prompt.txt",
        "video_path": "../in.mp4",
        "guidance": 3,
        "depth": paths["depth"] | {"control_weight": 1.0},
        "edge": paths["edge"] | {"control_weight": 0.2},
        "seg": paths["seg"] | {"control_weight": 1.0},
        "vis": {"control_weight": 0.5, "preset_blur_strength": "high"},
    }
    spec = Spec.load(put(folder, fields, "multi/spec.json"))
    assert spec.prompt == "A robot arm.\nIt moves." and spec.prompt_path == folder / "prompt.txt"
    assert spec.video_path == folder / "in.mp4"
    assert (spec.edge.control_weight, spec.vis.preset_blur_strength) == (0.2, "high")


def test_the_distilled_and_image_forms(folder):
    distilled = good(name="robot_edge", guidance=3, num_steps=4, edge={"control_path": "edge.mp4"})
    assert Spec.load(put(folder, distilled)).num_steps == 4
    image = good(name="image2image", max_frames=1, num_video_frames_per_chunk=1, seed=1, edge={})
    assert Spec.load(put(folder, image)).num_video_frames_per_chunk == 1


# --- single values -----

ACCEPTED = [
    ("seed", -(2**63), -(2**63)),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("guidance", 3.0, 3),
    ("guidance", 0, 0),
    ("guidance", 7, 7),
    ("num_steps", 1, 1),
    ("num_steps", 250, 250),
    ("num_steps", None, None),
    ("num_conditional_frames", 0, 0),
    ("num_conditional_frames", 2.0, 2),
    ("context_frame_index", 0, 0),
    ("max_frames", 1, 1),
    ("num_video_frames_per_chunk", 1, 1),
    ("num_video_frames_per_chunk", 9, 9),
    ("resolution", 480, "480"),
    ("resolution", 256.0, "256"),
    *[("resolution", key, key) for key in RESOLUTIONS],
    ("sigma_max", 80, "80"),
    ("sigma_max", 0.5, "0.5"),
    ("sigma_max", "200", "200"),
    ("prompt", "", ""),
    ("prompt", "tab\tand\nline \N{ROBOT FACE}", "tab\tand\nline \N{ROBOT FACE}"),
    ("negative_prompt", "", ""),
    ("guided_generation_step_threshold", -1, -1),
    ("show_input", True, True),
    ("keep_input_resolution", False, False),
    ("name", "A1._-z", "A1._-z"),
    ("name", "a" * 128, "a" * 128),
    ("name", "console", "console"),
    ("vis", None, None),
]


@pytest.mark.parametrize(("key", "value", "expected"), ACCEPTED)
def test_accepted(folder, key, value, expected):
    found = getattr(one(folder, **{key: value}), key)
    assert found == expected and type(found) is type(expected)


REFUSED = [
    ("seed", 2**63, "less than 9223372036854775808"),
    ("seed", 2**64, "less than"),
    ("seed", -(2**63) - 1, "greater than or equal"),
    ("seed", 1.5, "integer"),
    ("seed", 1e300, "seed: must"),
    ("seed", True, "must be a number"),
    ("seed", None, "integer"),
    ("guidance", 8, "less than or equal to 7"),
    ("guidance", -1, "greater than or equal to 0"),
    ("guidance", 3.5, "integer"),
    ("num_steps", 0, "greater than or equal to 1"),
    ("num_steps", 10**9, "less than or equal to 250"),
    ("max_frames", 0, "greater than or equal to 1"),
    ("context_frame_index", -1, "greater than or equal to 0"),
    ("num_conditional_frames", 3, "0, 1 or 2"),
    ("num_conditional_frames", True, "must be a number"),
    ("num_video_frames_per_chunk", 92, "4k+1"),
    ("num_video_frames_per_chunk", 0, "num_video_frames_per_chunk"),
    ("num_video_frames_per_chunk", -3, "num_video_frames_per_chunk"),
    ("resolution", "721", "Known: 1080, 1024, 720"),
    ("resolution", 721, "known resolution, got 721"),
    ("resolution", None, "known resolution"),
    ("resolution", True, "known resolution"),
    ("resolution", [], "known resolution"),
    ("sigma_max", "abc", "0 to 200"),
    ("sigma_max", 201, "0 to 200"),
    ("sigma_max", "nan", "0 to 200"),
    ("sigma_max", True, "0 to 200"),
    ("prompt", 5, "valid string, got 5"),
    ("prompt", "a\0b", "U+0000 at character 1"),
    ("prompt", "bell\x07", "U+0007"),
    ("prompt", "line\x85", "U+0085"),
    ("negative_prompt", None, "valid string"),
    ("negative_prompt", "\x1b[0m", "U+001B"),
    ("show_input", 7, "boolean"),
    ("guided_generation_foreground_labels", [], "at least 1 item"),
    ("edge", True, "object such as {}, got true"),
    ("edge", "on", "object such as {}"),
    ("edge", {"control_weight": -1}, "edge.control_weight: must be greater than or equal to 0, got -1"),
    ("edge", {"control_weight": 1.5}, "edge.control_weight: must be less than or equal to 1"),
    ("edge", {"control_weight": True}, "edge.control_weight: must be a number"),
    ("edge", {"control_weight": None}, "edge.control_weight"),
    ("edge", {"preset_edge_threshold": "meduim"}, "Did you mean 'medium'?"),
    ("edge", {"preset_edge_threshold": None}, "edge.preset_edge_threshold: must be 'very_low'"),
    ("seg", {"control_prompt": "a\0"}, "seg.control_prompt: must not hold control characters"),
    ("vis", {"mask_prompt": 3}, "vis.mask_prompt: must be a valid string"),
]


@pytest.mark.parametrize(("key", "value", "expected"), REFUSED)
def test_refused(folder, key, value, expected):
    found = problems(folder, good(**{key: value}))
    assert any(expected in problem and problem.split(":1: ")[1].startswith(key) for problem in found), found


def test_prompt_length_counts_bytes(folder):
    assert len(one(folder, prompt="é" * 500_000).prompt) == 500_000
    (found,) = problems(folder, good(prompt="é" * 500_001))
    assert "prompt: must be at most 1,000,000 bytes" in found and len(found) < 400


def test_numeric_text_counts_as_a_number(folder):
    """Documented acceptance: the published system takes it too."""
    assert one(folder, guidance="3", edge={"control_weight": "0.25"}).edge.control_weight == 0.25


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/b",
        "a\\b",
        "",
        ".a",
        "-a",
        "_a",
        "a" * 129,
        "a\n",
        "a b",
        "é",
        "a.",
        "con",
        "NUL.txt",
    ]
    + ["Com1", "lpt9.x.y", "run", "a.part", 5],
)
def test_refused_names(folder, name):
    (found,) = problems(folder, good(name=name))
    assert ": name: must " in found


@pytest.mark.parametrize("key", ["negative_prompt", "prompt", "name"])
def test_lone_surrogates_from_python_are_refused(folder, key):
    with pytest.raises(SpecError, match=key):
        Spec(**good(name="a", video_path=folder / "in.mp4") | {key: "\ud800"})


# --- unknown keys -----


@pytest.mark.parametrize(
    ("fields", "owner", "word", "meant"),
    [
        ({"dept": {}}, "spec", "dept", "depth"),
        ({"guidence": 3}, "spec", "guidence", "guidance"),
        ({"Seed": 3}, "spec", "Seed", "seed"),
        ({"blur": {}}, "spec", "blur", "vis"),
        ({"edge": {"control_wieght": 1}}, "edge", "control_wieght", "control_weight"),
        ({"seg": {"contol_prompt": "x"}}, "seg", "contol_prompt", "control_prompt"),
        ({"vis": {"preset_edge_threshold": "low"}}, "vis", "preset_edge_threshold", None),
        ({"edge": {"control_prompt": "x"}}, "edge", "control_prompt", None),
        ({"self": 1}, "spec", "self", None),
    ],
)
def test_unknown_keys_name_the_near_one(folder, fields, owner, word, meant):
    (found,) = problems(folder, good(**fields))
    assert f'{owner}: unknown key "{word}".' in found
    assert (f"Did you mean '{meant}'?" in found) if meant else ("Did you mean" in found or "Known: " in found)


@FEW
@given(key=st.text(string.ascii_letters + "_.$é /", min_size=1, max_size=20), inside=st.booleans())
def test_any_unknown_key_is_an_error(folder, key, inside):
    known = {*Spec.model_fields, "control_path", "control_weight", "mask_path", "mask_prompt"}
    if key in known | {"preset_edge_threshold"}:
        return
    fields = good(edge={key: 1}) if inside else good(**{key: 1})
    found = problems(folder, fields)
    assert any(f"unknown key {json.dumps(key)}" in problem for problem in found)


def test_a_flood_of_faults_is_cut(folder):
    found = problems(folder, good(**{f"k{i}": i for i in range(20_000)}))
    assert len(found) == 101 and any("19900 more problems" in problem for problem in found)


# --- rules between keys -----


def test_a_control_is_required(folder):
    for fields in (good(edge=None), {key: value for key, value in good().items() if key != "edge"}):
        (found,) = problems(folder, fields)
        assert "at least one control of edge, vis, depth, seg is required" in found


@pytest.mark.parametrize("extra", [{"image_context_path": "style.png"}, {"context_frame_index": 0}])
def test_vis_excludes_a_style_image(folder, extra):
    (found,) = problems(folder, good(vis={}, **extra))
    assert next(iter(extra)) in found and "together with vis" in found
    assert one(folder, **extra)  # with edge alone it is fine


def test_labels_need_an_npz(folder):
    labels = {"guided_generation_foreground_labels": [1, 2]}
    for mask in ({}, {"guided_generation_mask": "mask.mp4"}):
        (found,) = problems(folder, good(**labels, **mask))
        assert "needs an .npz guided_generation_mask" in found
    assert one(folder, **labels, guided_generation_mask="labels.npz").guided_generation_foreground_labels == (
        1,
        2,
    )


def test_prompt_and_prompt_path(folder):
    (both,) = problems(folder, good(prompt_path="prompt.txt"))
    assert "prompt: must not be set together with prompt_path" in both
    (neither,) = problems(folder, good(prompt=None))
    assert "prompt or prompt_path is required" in neither
    assert one(folder, prompt=None, prompt_path="prompt.txt").prompt == "A robot arm.\nIt moves."


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", b'"text"', "text"),
        ("p.JSON", b'\xef\xbb\xbf{"prompt": "text", "other": [1]} // note', "text"),
        ("p.md", b"\xef\xbb\xbf text \r\n", "text"),
        ("p", b"", ""),
    ],
)
def test_prompt_files(folder, name, content, expected):
    (folder / name).write_bytes(content)
    assert one(folder, prompt=None, prompt_path=name).prompt == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", b"{}", 'must hold a JSON string or {"prompt": "..."}'),
        ("p.json", b'{"prompt": 3}', "must hold a JSON string"),
        ("p.json", b'{"prompt": ', "line 1, column 12"),
        ("p.txt", b"\xff\xfeh\0", "UTF-16"),
        ("p.txt", b"caf\xe9", "byte 0xe9"),
        ("p.txt", b"a\x00", "control characters"),
        ("p.txt", b"x" * 1_000_001, "1,000,000 bytes"),
        ("p.txt", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("p.pkl", b"", "text or .json file"),
        ("gone.txt", None, "existing file"),
    ],
)
def test_bad_prompt_files(folder, name, content, expected):
    if content is not None:
        (folder / name).write_bytes(content)
    (found,) = problems(folder, good(prompt=None, prompt_path=name))
    assert ":1: prompt_path: " in found and expected in found


# --- paths -----


def test_paths_are_relative_to_the_file_and_overrides_to_the_cwd(folder, monkeypatch):
    deep, elsewhere = folder / "a" / "b", folder / "else"
    deep.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "other.mp4").touch()
    monkeypatch.chdir(elsewhere)
    path = put(deep, good(video_path="../../in.mp4", edge={"control_path": "../../edge.mp4"}))
    spec = Spec.load(path)
    assert spec.video_path == folder / "in.mp4" and spec.edge.control_path == folder / "edge.mp4"
    spec = Spec.load("../a/b/clip.json", video_path="other.mp4", **{"edge.mask_path": "../mask.mp4"})
    assert spec.video_path == elsewhere / "other.mp4" and spec.edge.mask_path == folder / "mask.mp4"
    (spec,) = load_specs("b/clip.json", {"video_path": "../in.mp4"}, cwd=folder / "a")
    assert spec.video_path == folder / "in.mp4"
    assert Path.cwd() == elsewhere


def test_home_links_and_upper_case_suffixes(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert one(folder, video_path="~/IN.MOV").video_path == folder / "IN.MOV"
    (folder / "blob").touch()
    (folder / "link.mp4").symlink_to("blob")
    assert (
        one(folder, video_path="link.mp4").video_path == folder / "link.mp4"
    )  # the suffix lives in the link


@pytest.mark.parametrize("suffix", ["pkl", "pt", "npy", "pth", "txt", "mp4.pkl", "npz"])
@pytest.mark.parametrize("key", ["control_path", "mask_path", "video_path", "image_context_path"])
def test_other_types_are_refused(folder, suffix, key):
    (folder / f"x.{suffix}").touch()
    value = {key: f"x.{suffix}"}
    (found,) = problems(folder, good(**value) if "video" in key or "image" in key else good(edge=value))
    assert "must be one of .mp4 .avi .mov .mkv .webm .png .jpg .jpeg .gif, got" in found


@pytest.mark.parametrize("name", ["x.pkl", "x.pt", "x.npy", "x.mp4", "x.npz"])
def test_a_payload_is_never_opened(folder, name, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "ran"),)

    (folder / name).write_bytes(pickle.dumps(Payload()))
    opened = []
    real = open
    monkeypatch.setattr(
        "builtins.open", lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1]
    )
    path = put(
        folder, good(edge={"control_path": name}, prompt=None, prompt_path=name, guided_generation_mask=name)
    )
    opened.clear()
    _, found = load_valid_specs([path])
    assert found and not (folder / "ran").exists()
    assert opened == [str(path)] if name != "x.mp4" else True
    if name == "x.mp4":  # text is asked for by prompt_path: read as text and refused, never unpickled
        assert any("prompt_path: must hold a prompt" in problem for problem in found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("gone.mp4", "must be an existing file, got"),
        ("", 'path of a local file, got ""'),
        ("a\0.mp4", "path of a local file"),
        ("https://x/y.mp4", "URLs are not read"),
        (5, "path of a local file, got 5"),
        (["in.mp4"], "path of a local file"),
        ("folder.mp4", "regular file"),
        ("fifo.mp4", "regular file"),
        ("/dev/zero", "must be one of"),
        ("dangling.mp4", "existing file"),
        ("loop.mp4", "existing file"),
        ("x" * 5000 + ".mp4", "existing file"),
    ],
)
def test_bad_paths(folder, value, expected):
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "dangling.mp4").symlink_to("nowhere")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (found,) = problems(folder, good(video_path=value))
    assert ": video_path: " in found and expected in found


def test_output_dir(folder):
    assert one(folder, output_dir="new/deep").output_dir == folder / "new/deep"
    assert not (folder / "new").exists()
    (found,) = problems(folder, good(output_dir="in.mp4"))
    assert "output_dir: must be a folder" in found


# --- files -----


def test_every_problem_of_every_file_with_its_line(folder):
    text = """{ "prompt": "x",
  "guidance": 8,
  "dept": {},
  "edge": {
     "control_weight": 2,
     "control_path": "x.pkl" },
  "vis": {}, "context_frame_index": 3 }"""
    first, second = put(folder, text, "a.json"), put(folder, good(seed="x"), "b.json")
    with pytest.raises(SpecError) as caught:
        load_specs([first, second, folder / "gone.json", folder / "c.yaml"])
    found = [problem.removeprefix(str(folder) + "/") for problem in caught.value.problems]
    starts = [
        "a.json:1: video_path: is required",
        "a.json:2: guidance: must be less than or equal to 7, got 8.",
        'a.json:3: spec: unknown key "dept"',
        "a.json:5: edge.control_weight: must be less than or equal to 1, got 2.",
        "a.json:6: edge.control_path: must be one of",
        "a.json:7: context_frame_index: must not be set together with vis",
        "b.json:1: seed: must be a valid integer",
        "gone.json: file: must be readable, got 'No such file or directory'.",
        "c.yaml: spec files must end in .json or .jsonc or .jsonl, got 'c.yaml'. YAML is not read",
    ]
    assert len(found) == len(starts)
    for problem, start in zip(found, starts):
        assert problem.startswith(start)
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_jsonl(folder):
    lines = ["// a comment", json.dumps(good()), "", "  \r", json.dumps(good(name="b", seed=1)), ""]
    specs = load_specs(put(folder, "\ufeff" + "\n".join(lines), "batch.jsonl"))
    assert [(spec.name, spec.seed) for spec in specs] == [("batch-2", 2025), ("b", 1)]
    assert (
        load_specs(put(folder, json.dumps(good(prompt="a\u2028b"), ensure_ascii=False), "u.jsonl"))[0].prompt[
            1
        ]
        == "\u2028"
    )
    with pytest.raises(SpecError, match="at least one object"):
        load_specs(put(folder, "\n// nothing\n", "empty.jsonl"))
    with pytest.raises(SpecError, match="one request, got 2"):
        Spec.load(folder / "batch.jsonl")


def test_bad_lines_of_a_long_jsonl(folder):
    lines = [json.dumps(good()) for _ in range(5000)]
    lines[4320] = '{"prompt": '
    lines[77] = json.dumps(good(guidance=9))
    path = put(folder, "\n".join(lines), "batch.jsonl")
    specs, found = load_valid_specs([path])
    assert len(specs) == 4998 and len(found) == 2
    assert found[0].startswith(f"{path}:78: guidance:") and found[1].startswith(
        f"{path}:4321:12: expected a value"
    )


def test_a_folder_is_read_in_order(folder):
    (folder / "specs").mkdir()
    for name in ("b.json", "a.jsonl", "c.JSON", "d.jsonc"):
        put(folder, good(video_path="../in.mp4"), f"specs/{name}")
    put(folder, "not read", "specs/readme.txt")
    assert [spec.name for spec in load_specs([folder / "specs"])] == ["a-1", "b", "c", "d"]
    (folder / "none").mkdir()
    with pytest.raises(SpecError, match="folder must hold"):
        load_specs(folder / "none")
    with pytest.raises(SpecError, match="at least one spec file"):
        load_specs([])


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a"), ("Clip", "cLIP"), ("a", "a_control_edge"), ("a_mask_seg", "A")]
)
def test_names_are_unique_in_the_batch(folder, first, second):
    paths = [put(folder, good(name=first), "1.json"), put(folder, good(name=second), "2.json")]
    specs, found = load_valid_specs(paths)
    assert [spec.name for spec in specs] == [first]
    assert (
        len(found) == 1 and found[0].startswith(f"{paths[1]}:1: name: ") and f"See {paths[0]}:1." in found[0]
    )
    with pytest.raises(SpecError, match="name"):
        load_specs(paths)


def test_a_stem_that_is_no_name(folder):
    (found,) = problems(folder, good(), "my clip.json")
    assert "name: must be 1 to 128" in found


@pytest.mark.parametrize("value", ["[]", '[{"prompt": "x"}]', "3", '"x"', "null"])
def test_the_top_level_is_an_object(folder, value):
    (found,) = problems(folder, value)
    assert "must be one object {...}, got" in found and ".jsonl" in found


def test_special_files_do_not_hang(folder):
    os.mkfifo(folder / "pipe.json")
    results = []
    worker = threading.Thread(
        target=lambda: results.append(load_valid_specs([folder / "pipe.json"])), daemon=True
    )
    worker.start()
    worker.join(5)
    assert results and "must be a regular file" in results[0][1][0]


def test_size_limits(folder):
    (found,) = problems(folder, " " * (4 * 2**20 + 1))
    assert "at most 4,194,304 bytes" in found
    with open(folder / "huge.json", "wb") as file:
        file.truncate(100 * 2**20)
    assert "at most" in load_valid_specs([folder / "huge.json"])[1][0]
    (found,) = problems(folder, "{" + " " * (4 * 2**20) + "\n{}", "big.jsonl")[:1]
    assert "big.jsonl:1:1: line: must be at most" in found


# --- overrides -----


def test_overrides_replace_values_in_every_spec(folder):
    paths = [put(folder, good(guidance=9), "1.json"), put(folder, good(), "2.json")]
    changes = {"guidance": 5, "seed": None, "edge.control_weight": 0.5, "vis.preset_blur_strength": "low"}
    for spec in load_specs(paths, changes):
        assert (spec.guidance, spec.seed, spec.edge.control_weight) == (5, 2025, 0.5)
        assert spec.vis.preset_blur_strength == "low"


def test_prompt_overrides_win_over_either_form(folder):
    inline = put(folder, good())
    from_file = put(folder, good(prompt=None, prompt_path="prompt.txt"), "f.json")
    for path in (inline, from_file):
        assert Spec.load(path, prompt="New.").prompt == "New."
        (spec,) = load_specs(path, {"prompt_path": "prompt.txt"}, cwd=folder)
        assert spec.prompt == "A robot arm.\nIt moves."
    found = problems(folder, good(), prompt="x", prompt_path="prompt.txt")
    assert any("must not be set together with prompt_path" in problem for problem in found)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("name", "Did you mean"),
        ("edge", "Did you mean 'seed'?"),
        ("guidence", "Did you mean 'guidance'?"),
        ("edge.control_wieght", "Did you mean 'edge.control_weight'?"),
        ("edge.control_prompt", "Did you mean 'seg.control_prompt'?"),
    ],
)
def test_unknown_overrides_leave_nothing_valid(folder, key, hint):
    specs, found = load_valid_specs(put(folder, good()), {key: 1})
    assert specs == [] and len(found) == 1
    assert found[0].startswith(f"override: unknown key '{key}'.") and (
        "Known" in found[0] or hint[:8] in found[0]
    )


def test_a_bad_override_value_is_reported_once(folder):
    path = put(folder, "\n".join(json.dumps(good()) for _ in range(5)), "b.jsonl")
    specs, found = load_valid_specs(path, {"guidance": 9, "edge.control_weight": 3})
    assert specs == []
    assert found == [
        "override guidance: must be less than or equal to 7, got 9.",
        "override edge.control_weight: must be less than or equal to 1, got 3.",
    ]


# --- what a spec offers -----


def test_direct_construction_and_freezing(folder):
    spec = Spec(name="a", prompt="x", video_path=folder / "in.mp4", depth={"control_weight": 0})
    assert spec.depth.control_weight == 0.0 and spec.source is None
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.seed = 1
    with pytest.raises(SpecError) as caught:
        Spec(prompt="x", video_path=folder / "in.mp4", edge={}, dept=1)
    assert len(caught.value.problems) == 2
    with pytest.raises(ValueError, match="guidance"):
        Spec.model_validate(good(name="a", video_path=str(folder / "in.mp4"), guidance=8))


def test_hash_covers_the_picture_and_nothing_else(folder):
    base = one(folder).hash()
    assert len(base) == 64 and one(folder, seed=2025, edge={"control_weight": 1}).hash() == base
    for same in ({"name": "b"}, {"output_dir": "x"}, {"sigma_max": 80}, {"vis": None}):
        assert one(folder, **same).hash() == base
    assert (
        one(folder, prompt=None, prompt_path="prompt.txt").hash()
        == one(folder, prompt="A robot arm.\nIt moves.").hash()
    )
    changes = [
        {"prompt": "B"}, {"negative_prompt": ""}, {"seed": 1}, {"guidance": 2}, {"video_path": "edge.mp4"},
        {"max_frames": 3}, {"context_frame_index": 0}, {"image_context_path": "style.png"},
        {"num_conditional_frames": 2}, {"resolution": 480}, {"num_steps": 4},
        {"num_video_frames_per_chunk": 5},
        {"show_control_condition": True}, {"show_input": True}, {"keep_input_resolution": False}, {"vis": {}},
        {"edge": {"control_weight": 0.5}}, {"edge": {"mask_path": "mask.mp4"}},
        {"edge": {"preset_edge_threshold": "low"}}, {"guided_generation_mask": "mask.mp4"},
        {"guided_generation_step_threshold": 1},
    ]  # fmt: skip
    hashes = {one(folder, **change).hash() for change in changes}
    assert len(hashes) == len(changes) and base not in hashes


def test_control_union_and_order(folder):
    text = "\n".join(
        json.dumps(good(edge=None, **extra)) for extra in ({"seg": {}}, {"depth": {}, "vis": {}})
    )
    specs = load_specs(put(folder, text, "u.jsonl"))
    assert control_union(specs) == ("vis", "depth", "seg") and control_union(specs[:1]) == ("seg",)
    assert list(specs[1].controls) == ["vis", "depth"] and control_union([]) == ()


def test_segmentation_prompt(folder):
    words = [f"w{i}" for i in range(200)]
    assert one(folder, prompt=" ".join(words), seg={}).segmentation_prompt == " ".join(words[:128])
    assert one(folder, seg={"control_prompt": "car"}).segmentation_prompt == "car"
    assert one(folder).segmentation_prompt is None


def test_notes_name_what_has_no_effect(folder):
    assert one(folder).notes == ()
    spec = one(
        folder,
        sigma_max=80,
        context_frame_index=1,
        image_context_path="style.png",
        depth={},
        edge={
            "control_path": "edge.mp4",
            "mask_path": "mask.mp4",
            "mask_prompt": "x",
            "preset_edge_threshold": "low",
        },
    )
    starts = [
        "sigma_max",
        "image_context_path",
        "style image",
        "edge.mask_prompt",
        "edge.preset_edge_threshold",
    ]
    assert [note.split(":")[0] for note in spec.notes] == starts


WEIGHTED = st.fixed_dictionaries(
    {}, optional={"control_weight": st.floats(0, 1), "mask_prompt": st.text("ab \n", max_size=9)}
)
FIELDS = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40), "depth": WEIGHTED},
    optional={
        "seed": st.integers(-(2**63), 2**63 - 1),
        "guidance": st.integers(0, 7),
        "num_steps": st.none() | st.integers(1, 250),
        "num_conditional_frames": st.integers(0, 2),
        "num_video_frames_per_chunk": st.integers(0, 500).map(lambda k: 4 * k + 1),
        "resolution": st.sampled_from(list(RESOLUTIONS)),
        "max_frames": st.none() | st.integers(1, 10**6),
        "sigma_max": st.none() | st.integers(0, 200),
        "show_input": st.booleans(),
        "edge": st.none() | WEIGHTED,
        "seg": st.none() | WEIGHTED,
    },
)


@FEW
@given(fields=FIELDS)
def test_round_trip(folder, fields):
    fields |= {"video_path": "in.mp4"}
    spec = Spec.load(put(folder, fields))
    again = Spec(**json.loads(json.dumps(spec.resolved(), allow_nan=False)))
    assert again.resolved() == spec.resolved() and again.hash() == spec.hash()
    assert all(
        getattr(spec, key) == value
        for key, value in fields.items()
        if key in ("seed", "prompt", "resolution")
    )


def test_json_schema(folder):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema") and set(schema["properties"]) == set(
        Spec.model_fields
    )
    objects = [schema, *schema["$defs"].values()]
    assert all(len(field["description"]) > 9 for part in objects for field in part["properties"].values())
    judge = jsonschema.Draft202012Validator(schema)
    for fields in (
        good(),
        good(resolution=480, sigma_max=3, vis=None),
        jsonc.parse(GUIDE).value,
        one(folder).resolved(),
    ):
        assert judge.is_valid(fields), list(judge.iter_errors(fields))
    bad = [
        good(edge=None),
        good(dept={}),
        good(edge={"x": 1}),
        good(guidance=8),
        good(resolution="7"),
        good(name="a/b"),
    ]
    bad += [good(num_steps=0), {"prompt": "x", "edge": {}}, {"video_path": "x", "edge": {}}]
    assert [fields for fields in bad if judge.is_valid(fields)] == []
