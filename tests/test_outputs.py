"""Output folder, sidecar, manifest, resume: what a crash, a link or a rival process may not break."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cosmos_fast import outputs
from cosmos_fast.formats import ClipError, EnvironmentProblem, SpecError
from cosmos_fast.outputs import OutputFolder, name_problem, name_problems
from cosmos_fast.recipe import Plan, Recipe
from cosmos_fast.sidecar import SIDECAR_KEYS, build_sidecar, environment

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def sidecar(name: str = "clip", spec_hash: str = "s1", frames: int = 5, **changes: object) -> dict:
    fields: dict = {
        "name": name, "spec": {"name": name, "prompt": "a robot"}, "spec_hash": spec_hash,
        "recipe": Recipe.exact(), "plan": Plan(), "model": "edge", "seeds": [1], "chunks": [], "checks": {},
        "checkpoint": {"id": "tiny"}, "weights_sha256": {"edge": "w1"}, "kernels": {"gelu": ["reference"]},
        "stages": {"encode": {"seconds": 1.25, "peak_bytes": None}, "sample": {"seconds": 2.5}},
        "output": {"frames": frames, "width": 64, "height": 32, "fps": Fraction(30000, 1001)},
    }  # fmt: skip
    return build_sidecar(**(fields | changes))


def write_media(clip: outputs.ClipOutputs, data: bytes = b"video", frames: int = 5) -> Path:
    path = clip.media(frames)
    path.write_bytes(data)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    return OutputFolder(tmp_path / "out")


def names(folder: OutputFolder) -> set[str]:
    return {p.name for p in folder.root.iterdir()} - {".lock"}


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["done", "skipped", "elsewhere"], 0),
        ([], 0),
        (["done", "failed"], 1),
        (["done", "refused"], 1),
        (["refused", "failed"], 1),
        (["done", ""], 1),  # never made
        (["refused", "refused"], 4),
    ],
)
def test_exit_code_of_a_batch(statuses: list[str], code: int) -> None:
    assert outputs.exit_code(statuses) == code


# ------------------------------------------------------------------------------------ names and paths


@pytest.mark.parametrize("name", ["a", "robot_1", "A.b-c", "0" * 128])
def test_good_names_pass(name: str) -> None:
    assert name_problem(name) is None


BAD_NAMES = [
    "",
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    ".hidden",
    "-x",
    "a b",
    "é",
    "a\n",
    "a\0",
    "0" * 129,
    "..",
    "con",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "LPT1.x", "run", "x.part"])
def test_bad_names_are_refused_before_any_path_is_made(name: str, folder: OutputFolder) -> None:
    with pytest.raises(SpecError, match="name:"):
        folder.clip(name)
    assert names(folder) == set()


def test_batch_names_that_share_a_file_are_found() -> None:
    assert name_problems(["a", "b", "c_control_edge"]) == []
    problems = name_problems(["a", "A", "b", "B_control_edge", "c", "c_mask_guided_generation", "../d"])
    assert len(problems) == 4
    assert any("'a' and 'A'" in p for p in problems)
    assert any("'B_control_edge' is also a file that clip 'b'" in p for p in problems)


@pytest.mark.parametrize("filename", ["../x.mp4", "/tmp/x", "a/b.mp4", "", ".", "..", "a\0b"])
def test_paths_stay_in_the_folder(folder: OutputFolder, filename: str) -> None:
    with pytest.raises(ClipError, match="plain file name"):
        folder.path(filename)


def test_symlinks_and_folders_in_the_way_are_refused(folder: OutputFolder, tmp_path: Path) -> None:
    outside = tmp_path / "outside.mp4"
    outside.write_text("precious")
    clip = folder.clip("clip")
    os.symlink(outside, folder.root / "clip.mp4")
    os.symlink(tmp_path / "nowhere", folder.root / "clip.json")
    os.symlink(outside, folder.root / "manifest.jsonl")
    (folder.root / "clip_control_edge.mp4").mkdir()
    for make in (lambda: clip.media(5), lambda: clip.sidecar):
        with pytest.raises(ClipError, match="symbolic link"):
            make()
    with pytest.raises(ClipError, match="symbolic link"):
        clip.fail("why")
    with pytest.raises(ClipError, match="must be a plain file"):
        clip.control("edge", 5)
    assert outside.read_text() == "precious"


def test_part_link_planted_in_the_folder_is_not_followed(folder: OutputFolder, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("precious")
    os.symlink(outside, folder.root / "clip.json.part")
    write_media(folder.clip("clip"))
    folder.clip("clip").finish(sidecar())
    assert outside.read_text() == "precious" and not (folder.root / "clip.json").is_symlink()


def test_folder_swapped_for_a_link_is_noticed(folder: OutputFolder, tmp_path: Path) -> None:
    folder.root.rename(tmp_path / "moved")
    os.symlink(tmp_path / "moved", folder.root)
    with pytest.raises(ClipError, match="symbolic link"):
        folder.path("clip.mp4")


def test_unwritable_folder_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/cosmos-out")):
        with pytest.raises(EnvironmentProblem, match="can be written.*Choose another"):
            OutputFolder(place)


def test_read_only_folder_is_an_environment_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(outputs.os, "open", refuse)
    with pytest.raises(EnvironmentProblem, match="Read-only file system"):
        OutputFolder(tmp_path)


def test_every_file_of_a_clip_has_its_name(folder: OutputFolder) -> None:
    clip = folder.clip("c")
    paths = [
        clip.media(2), clip.media(1), clip.control("depth", 9), clip.control("vis", 1), clip.mask("seg", 9),
        clip.guided_mask(9), clip.prompt, clip.sidecar,
    ]  # fmt: skip
    assert [p.name for p in paths] == [
        "c.mp4", "c.jpg", "c_control_depth.mp4", "c_control_vis.jpg", "c_mask_seg.mp4",
        "c_mask_guided_generation.mp4", "c.txt", "c.json",
    ]  # fmt: skip
    assert {p.parent for p in paths} == {folder.root}
    with pytest.raises(ValueError, match="one of edge, vis, depth, seg"):
        clip.control("../edge", 1)


# ------------------------------------------------------------------------------------------ sidecar


def test_sidecar_has_the_documented_keys_and_plain_values() -> None:
    @dataclass(frozen=True)
    class Piece:
        index: int
        path: Path

    record = sidecar(chunks=[Piece(0, Path("/a"))], notes=("n",), checks={"jump": np.float32(0.5)})
    assert set(record) == set(SIDECAR_KEYS)
    assert record["chunks"] == [{"index": 0, "path": "/a"}]
    assert record["output"]["fps"] == "30000/1001"
    assert record["recipe"] == Recipe.exact().to_dict() and record["plan"]["vae_encode_window"] == 4
    assert record["checks"]["jump"] == 0.5
    assert record["guardrail"]["requested"] is record["guardrail"]["run"] is False
    assert record["guardrail"]["reason"]
    assert record["versions"]["python"] and record["versions"]["cosmos_fast"]


def test_sidecar_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError):
        sidecar(checks={"jump": math.nan})
    with pytest.raises(ValueError, match="output must tell width, fps"):
        sidecar(output={"frames": 5, "height": 3})


def test_environment_needs_no_heavy_import() -> None:
    code = (
        "import sys\nfrom cosmos_fast.sidecar import environment\nimport cosmos_fast.outputs\n"
        "assert environment()['torch']\nprint(sorted({'torch', 'av', 'cv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert environment({"name": "H100"})["gpu"] == {"name": "H100"}


def test_run_record_is_written(folder: OutputFolder) -> None:
    folder.write_run(environment())
    assert json.loads((folder.root / "run.json").read_text())["python"]


# ------------------------------------------------------------------------------------ finish, crash


def test_finish_writes_everything_and_the_manifest_last(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    write_media(clip)
    clip.control("edge", 5).write_bytes(b"edges")
    order: list[str] = []
    replace = os.replace

    def watch(src: object, dst: object) -> None:
        order.append(Path(str(dst)).name)
        assert not (folder.root / "manifest.jsonl").exists()
        replace(src, dst)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs.os, "replace", watch)
        record = clip.finish(sidecar(), files=[clip.control("edge", 5)])
    assert order == ["clip.txt", "clip.json"]
    assert names(folder) == {"clip.mp4", "clip.txt", "clip.json", "clip_control_edge.mp4", "manifest.jsonl"}
    assert clip.prompt.read_text() == "a robot"
    assert json.loads(clip.sidecar.read_text()) == record
    assert record["output"]["file"] == "clip.mp4" and record["output"]["bytes"] == 5
    assert record["files"] == {"clip.txt": 7, "clip_control_edge.mp4": 5}
    (line,) = folder.manifest()
    assert (line["name"], line["status"], line["seconds"]) == ("clip", "done", 3.75)
    assert line["sha256"] == record["output"]["sha256"] and line["reason"] is None


def test_finish_needs_media(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    with pytest.raises(ClipError, match="got no clip.mp4"):
        clip.finish(sidecar())
    write_media(clip, b"")
    with pytest.raises(ClipError, match="got no clip.mp4"):
        clip.finish(sidecar())
    assert names(folder) == {"clip.mp4"}


def test_finish_needs_the_claim_to_the_end(folder: OutputFolder) -> None:
    class Lost:
        def held(self) -> bool:
            return False

    clip = folder.clip("clip")
    write_media(clip)
    with pytest.raises(ClipError, match="taken over"):
        clip.finish(sidecar(), claim=Lost())
    assert not clip.sidecar.exists() and folder.manifest() == []


@pytest.mark.parametrize("stage", ["txt", "json", "manifest"])
def test_crash_at_each_stage_leaves_old_or_new(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    clip = folder.clip("clip")
    write_media(clip, b"old")
    clip.finish(sidecar(spec_hash="old"))
    old = clip.sidecar.read_bytes()

    write_media(clip, b"new!")
    with monkeypatch.context() as patch:
        if stage == "manifest":

            def fail(*_: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(OutputFolder, "_append", staticmethod(fail))
        else:
            replace = os.replace

            def crash(src: object, dst: object) -> None:
                if str(dst).endswith(stage):
                    raise OSError(28, "No space left on device")
                replace(src, dst)  # type: ignore[arg-type]

            patch.setattr(outputs.os, "replace", crash)
        with pytest.raises(ClipError, match="No space left"):
            clip.finish(sidecar(spec_hash="new"))
    assert not [n for n in names(folder) if n.endswith(".part")]
    if stage == "manifest":  # the record is whole, so the clip is done; the line is made up for on resume
        assert len(folder.manifest()) == 1
        assert clip.redo_reason("new") is None and clip.redo_reason("old") is not None
        assert [m["spec_hash"] for m in folder.manifest()] == ["old", "new"]
        assert clip.redo_reason("new") is None and len(folder.manifest()) == 2
    else:
        assert clip.sidecar.read_bytes() == old
        assert clip.redo_reason("old") == "clip.mp4 is not the file that was written"
        assert clip.redo_reason("new") == "spec changed since it was made"
        clip.finish(sidecar(spec_hash="new"))
        assert clip.redo_reason("new") is None


def test_kill_between_part_and_rename_leaves_the_old_record(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    write_media(clip, b"old")
    clip.finish(sidecar(spec_hash="old"))
    code = (
        "import os\nfrom cosmos_fast import outputs\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        f"outputs._write(outputs.Path({str(clip.sidecar)!r}), b'half')"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == -signal.SIGKILL
    assert clip.redo_reason("old") is None and "clip.json.part" in names(folder)
    clip.remove_parts()
    assert "clip.json.part" not in names(folder)


def test_stale_outputs_of_an_earlier_record_go(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    write_media(clip)
    clip.control("depth", 5).write_bytes(b"d")
    clip.finish(sidecar(), files=[clip.control("depth", 5)])
    (folder.root / "clip_control_seg.mp4").write_bytes(b"the user's own")
    clip.media(1).write_bytes(b"jpg")
    clip.finish(sidecar(frames=1))
    assert names(folder) == {"clip.jpg", "clip.txt", "clip.json", "manifest.jsonl", "clip_control_seg.mp4"}
    assert clip.redo_reason("s1") is None


def test_fail_records_the_reason_and_removes_parts(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    for name in ("clip.part.mp4", "clip_control_edge.part.mp4", "clip.json.part"):
        (folder.root / name).write_bytes(b"half")
    clip.fail("non-finite at step 3", spec_hash="s")
    clip.fail("blocked", status="refused")
    assert names(folder) == {"manifest.jsonl"}
    assert [(m["status"], m["reason"]) for m in folder.manifest()] == [
        ("failed", "non-finite at step 3"),
        ("refused", "blocked"),
    ]
    with pytest.raises(ValueError, match="cannot be recorded as done"):
        clip.fail("x", status="done")


# ------------------------------------------------------------------------------------------- resume


def test_resume_decides_by_hashes(folder: OutputFolder) -> None:
    clip = folder.clip("clip")
    assert clip.redo_reason("s1") == "clip.json is missing or not a finished record"
    media = write_media(clip)
    made = clip.finish(sidecar())
    good = {"recipe": Recipe.exact().to_dict(), "checkpoint": {"id": "tiny"}}
    assert clip.redo_reason("s1", **good) is None
    assert clip.redo_reason("s2", **good) == "spec changed since it was made"
    assert clip.redo_reason("s1", version="9.9") == "version changed since it was made"
    assert clip.redo_reason("s1", recipe=Recipe.fp32().to_dict()) == "recipe changed since it was made"
    assert clip.redo_reason("s1", checkpoint={"id": "other"}) == ("checkpoint changed since it was made")
    media.write_bytes(b"edits")  # same size as before
    assert clip.redo_reason("s1") == "clip.mp4 is not the file that was written"
    media.unlink()
    assert clip.redo_reason("s1") == "clip.mp4 is missing"
    clip.sidecar.write_text(json.dumps(made | {"output": made["output"] | {"file": "../../etc/passwd"}}))
    assert clip.redo_reason("s1") == "clip.json does not name this clip's output"
    for junk in ("{", "[]", '{"output": 3}', '"x"'):
        clip.sidecar.write_text(junk)
        assert clip.redo_reason("s1") == "clip.json is missing or not a finished record"


def test_manifest_survives_a_half_line(folder: OutputFolder) -> None:
    folder.record("a", "done")
    with open(folder.root / "manifest.jsonl", "ab") as file:
        file.write(b'{"name": "b", "sta')
    folder.record("c", "failed", "why")
    assert [m["name"] for m in folder.manifest()] == ["a", "c"]


def test_manifest_takes_lines_from_two_processes(folder: OutputFolder) -> None:
    code = (
        "import sys\nfrom cosmos_fast.outputs import OutputFolder\nf = OutputFolder(sys.argv[1])\n"
        "for i in range(100): f.record(f'{sys.argv[2]}{i}', 'failed', 'r' * (i * 97 % 9000))"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(folder.root), who], env=ENV) for who in "ab"]
    assert [job.wait(timeout=60) for job in jobs] == [0, 0]
    lines = folder.manifest()
    assert (folder.root / "manifest.jsonl").read_bytes().count(b"\n") == len(lines) == 200
    for who in "ab":
        assert [m["name"] for m in lines if m["name"][0] == who] == [f"{who}{i}" for i in range(100)]


def test_a_run_in_parts_ends_with_its_gravest_code_and_was_refused_only_as_a_whole() -> None:
    assert [outputs.of_all(codes) for codes in ([0], [4], [4, 4], [0, 4], [4, 1], [3, 4], [0, 130])] == [
        0,
        4,
        4,
        1,
        1,
        3,
        130,
    ]
