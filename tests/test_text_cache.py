"""Embeddings on disk: the encoder is loaded for prompts never seen before, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import language
import pytest
import torch

from cosmos_fast import text_cache
from cosmos_fast.disk_cache import DiskCache
from cosmos_fast.formats import EnvironmentProblem
from cosmos_fast.reason1 import Reason1
from cosmos_fast.text import TextEncoder, prompt_key
from cosmos_fast.text_cache import CachedText

ROOT = Path(__file__).resolve().parent.parent


class Fake:
    """Counts what is asked of it; an embedding tells its prompt."""

    tokens, width = 4, 6

    def __init__(self, **identity) -> None:
        self.identity, self.record = {"encoder": "fake", **identity}, {"encoder": "fake"}
        self.calls: list[list[str]] = []
        self.closed = 0

    def note(self, prompt: str) -> str:
        return "long" if len(prompt) > 20 else ""

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        self.calls.append(prompts)
        return [embedding(prompt) for prompt in prompts]

    def close(self) -> None:
        self.closed += 1


def embedding(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(prompt_key(prompt)[:12], 16))
    return torch.randn(4, 6, generator=generator).bfloat16()


def opened(folder: Path, encoder: Fake | None = None, limit: int = 1 << 20) -> CachedText:
    return CachedText(encoder or Fake(), DiskCache(folder, limit))


def test_a_hit_does_not_ask_the_encoder(tmp_path):
    first = opened(tmp_path)
    assert isinstance(first, TextEncoder) and (first.tokens, first.width) == (4, 6)
    first.prepare(["a", "b", "a"])
    assert first.encoder.calls == [["a", "b"]] and first.encoder.closed == 1
    again = opened(tmp_path)
    again.prepare(["b", "a"])
    found = again.encode(["b", "a", "b"])
    assert again.encoder.calls == [] and again.encoder.closed == 0 and again.notes == []
    for prompt, tensor in zip(["b", "a", "b"], found, strict=True):
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, embedding(prompt))


def test_encode_alone_fills_the_cache(tmp_path):
    text = opened(tmp_path)
    assert torch.equal(text.encode(["a"])[0], embedding("a"))
    text.encode(["a", "c"])
    assert text.encoder.calls == [["a"], ["c"]] and text.encoder.closed == 2


def test_another_encoder_has_entries_of_its_own(tmp_path):
    opened(tmp_path).prepare(["a"])
    for identity in ({"revision": "2"}, {"template": 2}, {"precision": "int8"}):
        other = opened(tmp_path, Fake(**identity))
        other.prepare(["a"])
        assert other.encoder.calls == [["a"]]


def test_prompts_go_in_groups_and_a_stop_frees_the_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "GROUP", 2)
    text, told = opened(tmp_path), []

    def between() -> None:
        told.append(len(text.encoder.calls))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text.prepare(list("abcdef"), between)
    assert told == [0, 1, 2] and text.encoder.calls == [["a", "b"], ["c", "d"]] and text.encoder.closed == 1
    text.prepare(list("abcdef"))
    assert text.encoder.calls[2:] == [["e", "f"]]


def test_a_note_is_told_each_time(tmp_path):
    for _ in range(2):
        text = opened(tmp_path)
        text.encode(["x" * 21, "short", "x" * 21])
        assert text.notes == ["long"]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut short":
        content = content[:-5]
    elif how == "one bit":
        content[-1] ^= 1
    elif how == "header":
        content[12] ^= 0xFF
    elif how == "empty":
        content = bytearray()
    elif how == "other shape":
        from safetensors.torch import save_file

        save_file({"text": torch.zeros(4, 5)}, path)
        return
    elif how == "other tensor":
        from safetensors.torch import save_file

        save_file({"image": torch.zeros(4, 6)}, path)
        return
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut short", "one bit", "header", "empty", "other shape", "other tensor"])
def test_a_damaged_entry_is_made_again(tmp_path, how):
    opened(tmp_path).prepare(["a", "b"])
    text = opened(tmp_path)
    damage(text.cache.path(text.key("a")), how)
    assert torch.equal(text.encode(["a"])[0], embedding("a"))
    assert text.encoder.calls == [["a"]]
    assert len(text.notes) == 1 and "is damaged" in text.notes[0] and "made again" in text.notes[0]
    assert opened(tmp_path).encode(["a"])[0] is not None


def test_a_batch_is_kept_whole_and_old_entries_go(tmp_path):
    text = opened(tmp_path, limit=1)
    text.prepare(["old"])
    text.prepare(list("abc"))
    assert len(list(tmp_path.iterdir())) == 3
    text.encode(list("abc"))
    assert text.encoder.calls == [["old"], ["a", "b", "c"]]


def test_room_is_asked_for_before_the_encoder(tmp_path, monkeypatch):
    text = opened(tmp_path / "new" / "folder")
    usage = type("Usage", (), {"free": 2 * 4 * 6 * 2 - 1})
    monkeypatch.setattr(text_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentProblem, match="for 2 prompts.*--cache-dir"):
        text.prepare(["a", "b"])
    assert text.encoder.calls == []
    text.prepare(["a"])


def test_an_entry_that_another_process_removes_at_once_is_still_returned(tmp_path, monkeypatch):
    text = opened(tmp_path)
    monkeypatch.setattr(text.cache, "get", lambda key: None)
    assert torch.equal(text.encode(["a"])[0], embedding("a"))


def test_reason1_is_loaded_for_misses_alone(tmp_path):
    folder = language.write(tmp_path / "model", language.plain_model())

    def text() -> CachedText:
        encoder = Reason1(folder, mode="bf16", device="cpu", dtype=torch.float32)
        return CachedText(encoder, DiskCache(tmp_path / "cache"))

    first = text()
    direct = Reason1(folder, mode="bf16", device="cpu", dtype=torch.float32).encode(["a", "b"])
    first.prepare(["a", "b"])
    assert first.encoder.loads == 1 and first.encoder._layers is None  # loaded once, and freed
    second = text()
    for tensor, expected in zip(second.encode(["a", "b"]), direct, strict=True):
        assert torch.equal(tensor, expected)
    assert second.encoder.loads == 0
    assert second.record["encoder"] == str(folder) and second.record["mode"] == "bf16"


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_text_cache import Fake, embedding, opened
import torch
for turn in range(25):
    text = opened(sys.argv[2], limit=500)
    prompts = [f"prompt {(turn + k) % 5}" for k in range(2)]
    for prompt, found in zip(prompts, text.encode(prompts)):
        assert torch.equal(found, embedding(prompt))
    assert not text.notes, text.notes
"""


def test_processes_that_share_a_folder(tmp_path):
    """The limit holds about two entries, so that both replace and evict what the other reads."""
    command = [sys.executable, "-c", WRITER, str(ROOT / "tests"), str(tmp_path)]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
