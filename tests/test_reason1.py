"""The published prompt encoder at tiny size: beside plain transformers, in every mode, and with every fault."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import language
import numpy as np
import pytest
import torch
from huggingface_hub import errors

from cosmos_fast import registry, safetensors_file
from cosmos_fast.formats import CheckpointError, EnvironmentProblem
from cosmos_fast.reason1 import HEADROOM, Reason1, normalized
from cosmos_fast.text import TextEncoder
from cosmos_fast.text_layers import Int8Linear, Layers

PROMPTS = ["A robot arm pours coffee.", "é ⏎ 机器人", ""]
SYSTEM_TEXT = "You are a helpful assistant who will provide prompts to an image generator."


@pytest.fixture(scope="module")
def model():
    return language.plain_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return language.write(tmp_path_factory.mktemp("reason1"), model)


def encoder(folder: Path, mode: str = "offload", dtype: torch.dtype = torch.float32) -> Reason1:
    return Reason1(folder, mode=mode, device="cpu", dtype=dtype)


def wanted(model, ids: torch.Tensor) -> np.ndarray:
    """What transformers makes of padded ids, normalised in float64 with numpy."""
    states = model(input_ids=ids[None], output_hidden_states=True).hidden_states
    assert len(states) == 4
    rows = np.stack([state[0].double().numpy() for state in states[1:]], axis=1)
    rows = (rows - rows.mean(-1, keepdims=True)) / (rows.std(-1, ddof=1, keepdims=True) + 1e-8)
    return rows.reshape(len(ids), -1)


# --- ids ---


def golden(prompt: bytes) -> list[int]:
    s, e = language.START_ID, language.END_ID
    system = [s, *b"system\n", *SYSTEM_TEXT.encode(), e, *b"\n"]
    return [*system, s, *b"user\n", *prompt, e, *b"\n"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_the_chat_padded_on_the_right(folder, prompt):
    chat = golden(prompt.encode())
    assert encoder(folder).tokenize(prompt).tolist() == chat + [language.PAD_ID] * (512 - len(chat))
    assert encoder(folder).note(prompt) == ""


def test_marks_in_a_prompt_are_read_as_the_published_tokenizer_reads_them(folder):
    ids = encoder(folder).tokenize("a<|im_end|>b").tolist()
    assert ids[: len(golden(b"")) + 3].count(language.END_ID) == 3


@pytest.mark.parametrize(("extra", "is_cut"), [(-1, False), (0, False), (1, True), (300, True)])
def test_a_long_prompt_loses_its_tail(folder, extra, is_cut):
    room = 512 - len(golden(b""))
    prompt = "x" * (room + extra)
    ids = encoder(folder).tokenize(prompt)
    assert ids.shape == (512,) and ids.tolist() == (golden(prompt.encode()) + [language.PAD_ID])[:512]
    note = encoder(folder).note(prompt)
    assert bool(note) == is_cut
    if is_cut:
        assert f"{512 + extra} tokens" in note and "first 512" in note


def test_the_chat_template_of_the_tokenizer_rules(model, tmp_path):
    published = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for template, ids in ((published, golden(b"hi")), ("{{ messages[1].content[0].text }}!", [*b"hi!"])):
        settings = {"pad_token": {"content": language.PAD}, "chat_template": template}
        text = encoder(language.write(tmp_path, model, tokenizer_config=settings))
        assert text.tokenize("hi").tolist() == ids + [language.PAD_ID] * (512 - len(ids))


# --- embeddings ---


@pytest.mark.parametrize("mode", ["bf16", "offload"])
def test_against_plain_transformers(model, folder, mode):
    text = encoder(folder, mode)
    assert isinstance(text, TextEncoder) and (text.tokens, text.width) == (512, 3 * 48)
    for prompt, found in zip(PROMPTS, text.encode(PROMPTS), strict=True):
        assert found.shape == (512, 144) and found.dtype == torch.float32 and found.device.type == "cpu"
        error = np.abs(found.double().numpy() - wanted(model, text.tokenize(prompt))).max()
        assert error <= 1e-5


def test_bf16_is_the_plain_model_in_bf16_bit_for_bit(folder):
    plain = language.plain_model(torch.bfloat16, attention="sdpa")
    text = encoder(folder, dtype=torch.bfloat16)
    (found,) = text.encode(PROMPTS[:1])
    states = plain(input_ids=text.tokenize(PROMPTS[0])[None], output_hidden_states=True).hidden_states
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([normalized(state[0]) for state in states[1:]], dim=-1))


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.", ""])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_key_layouts(model, folder, tmp_path, prefix, is_sharded):
    found = encoder(language.write(tmp_path, model, prefix=prefix, is_sharded=is_sharded)).encode(["a"])
    assert torch.equal(found[0], encoder(folder).encode(["a"])[0])


def test_vision_tower_and_head_are_not_read(model, tmp_path):
    folder = language.write(tmp_path, model)
    (folder / "model-00003-of-00003.safetensors").unlink()
    encoder(folder).encode(["a"])


def test_tokens_see_what_is_before_them_alone(folder):
    a, b, shorter = encoder(folder).encode(["robot one", "robot two", "robot"])
    same = len(golden(b"robot ")) - 2
    assert torch.equal(a[:same], b[:same])
    assert not torch.allclose(a[same], b[same], atol=1e-3)
    assert torch.equal(a[: same - 1], shorter[: same - 1])  # the pads after it change nothing
    # Pads are tokens as others: they are not zero, differ from place to place and with the prompt before them.
    assert not torch.allclose(a[500], b[500], atol=1e-3) and not torch.allclose(a[500], a[501], atol=1e-3)


def test_bits_do_not_depend_on_the_batch(folder):
    text = encoder(folder, "bf16", torch.bfloat16)
    together = text.encode([*PROMPTS, PROMPTS[0]])
    for prompt, found in zip([*PROMPTS, PROMPTS[0]], together, strict=True):
        assert torch.equal(found, text.encode([prompt])[0])
    assert text.encode([]) == []


def test_offload_equals_resident_bit_for_bit(folder):
    resident, offload = (encoder(folder, mode, torch.bfloat16) for mode in ("bf16", "offload"))
    for _ in range(2):
        for a, b in zip(resident.encode(PROMPTS), offload.encode(PROMPTS), strict=True):
            assert torch.equal(a, b)


def test_what_stays_on_the_device(folder, monkeypatch):
    """Resident weights are read once; offloaded ones every time, and none of them stays."""
    reads = []
    plain = safetensors_file.typed
    monkeypatch.setattr(safetensors_file, "typed", lambda *given: reads.append(1) or plain(*given))
    for mode, again, kept in (("bf16", 3, 3), ("int8", 3, 3), ("offload", 3 + 36, 0)):
        text = encoder(folder, mode)
        text.encode(["a"])
        first = len(reads)
        reads.clear()
        text.encode(["a", "b", "c"])
        assert first == 36 + 2 and len(reads) == again  # 12 weights in 3 layers, final norm, embedding rows
        reads.clear()
        assert len(text._layers.kept) == kept


@pytest.mark.parametrize(("mode", "most"), [("offload", 0), ("bf16", 2)])
def test_offload_holds_one_layer_at_a_time(folder, monkeypatch, mode, most):
    made, alive = [], []
    plain = Layers._filled

    def filled(self, *given):
        alive.append(sum(layer() is not None for layer in made))
        layer = plain(self, *given)
        made.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(Layers, "_filled", filled)
    encoder(folder, mode).encode(PROMPTS)
    assert len(alive) == 3 and max(alive) == most


def test_close_frees_and_the_next_call_loads_again(folder):
    text = encoder(folder, "bf16")
    (before,) = text.encode(["a"])
    text.close()
    assert text._layers is None and text._norm is None and text.loads == 1
    assert torch.equal(text.encode(["a"])[0], before) and text.loads == 2


def test_normalized():
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    deviation = np.sqrt((4 + 1 + 0 + 9) / 3)
    expected = np.array([[-2, -1, 0, 3], [0, 0, 0, 0]]) / np.array([[deviation], [1.0]])
    np.testing.assert_allclose(normalized(x).numpy(), expected, atol=1e-6)
    # In bf16 mean and deviation are rounded before they are used: mean of these is 100.333 -> 100.5.
    y = torch.tensor([[100.0, 100.0, 101.0]], dtype=torch.bfloat16)
    deviation = torch.tensor(1 / 3**0.5).bfloat16()
    mean = torch.tensor(100.5).bfloat16()
    assert torch.equal(normalized(y), (y - mean) / deviation)


# --- 8 bits ---


def test_int8_linear():
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(5, 40)
    linear = Int8Linear(weight, bias)
    step = weight.abs().amax(1, keepdim=True) / 127
    decoded = linear.weight.float() * linear.scale[:, None]
    assert linear.weight.dtype == torch.int8
    assert bool(((decoded - weight).abs() <= step / 2 * 1.001).all())
    torch.testing.assert_close(linear(x), x @ decoded.T + bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(Int8Linear(torch.zeros(2, 3))(torch.ones(1, 3)), torch.zeros(1, 2))


def test_int8_error_of_embeddings(folder):
    """Measured 0.027 relative L2 in fp32, where bf16 itself is 0.022 off (three layers of random weights)."""
    exact, coarse = (encoder(folder, mode).encode(PROMPTS) for mode in ("bf16", "int8"))
    error = max(float((a - b).norm() / a.norm()) for a, b in zip(exact, coarse, strict=True))
    assert 1e-3 < error < 0.035


# --- which mode ---


@pytest.mark.parametrize(
    ("device", "spare", "mode"), [("cuda", 0, "bf16"), ("cuda", -1, "offload"), ("cpu", 1 << 40, "offload")]
)
def test_auto_goes_by_free_memory(folder, monkeypatch, device, spare, mode):
    text = encoder(folder, "auto")
    text.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 + HEADROOM + spare, 1 << 50))
    assert text.chosen_mode(1000) == mode
    text.mode = "int8"
    assert text.chosen_mode(1 << 60) == "int8"


def test_modes_and_what_they_mean_for_results(folder):
    with pytest.raises(ValueError, match="mode must be auto, bf16, int8, offload, got 'fp4'"):
        Reason1(folder, mode="fp4")
    same = {json.dumps(encoder(folder, mode).identity) for mode in ("auto", "bf16", "offload")}
    assert len(same) == 1
    assert json.dumps(encoder(folder, "int8").identity) not in same
    assert json.dumps(encoder(folder, dtype=torch.bfloat16).identity) not in same


def test_another_checkpoint_has_another_identity(model, folder, tmp_path):
    found = {json.dumps(encoder(folder).identity)}
    copy = language.write(tmp_path, model)
    for change in (
        lambda: None,
        lambda: (copy / "tokenizer_config.json").write_text(json.dumps({"pad_token": language.END})),
        lambda: (copy / "model-00001-of-00003.safetensors").touch(),
    ):
        change()
        identity = json.dumps(encoder(copy).identity)
        assert identity not in found
        found.add(identity)


# --- the published one ---


@pytest.fixture
def hub(monkeypatch, folder):
    """The hub, serving the tiny folder under the published id."""
    fake = SimpleNamespace(calls=[], error=None)

    def download(repo, file, *, revision, **_):
        fake.calls.append((repo, file, revision))
        if fake.error is not None:
            raise fake.error
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return fake


@pytest.mark.parametrize("name", ["reason1", "nvidia/Cosmos-Reason1-7B"])
def test_published_id(hub, folder, name):
    text = Reason1(name, mode="offload", device="cpu", dtype=torch.float32)
    revision = "3210bec0495fdc7a8d3dbb8d58da5711eab4b423"
    assert (text.tokens, text.width) == (512, 28 * 3584) and hub.calls == []
    assert text.record == {
        "encoder": "nvidia/Cosmos-Reason1-7B", "revision": revision, "precision": "float32", "mode": "offload",
    }  # fmt: skip
    assert text.identity["revision"] == revision and hub.calls == []
    assert torch.equal(text.encode(["a"])[0], encoder(folder).encode(["a"])[0])
    assert {(repo, at) for repo, _, at in hub.calls} == {("nvidia/Cosmos-Reason1-7B", revision)}
    fetched = {file for _, file, _ in hub.calls}
    assert "model-00002-of-00003.safetensors" in fetched
    assert "model-00003-of-00003.safetensors" not in fetched  # vision tower and head alone


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.GatedRepoError("no", response=SimpleNamespace(status_code=401, headers={}, request=None)),
            "needs a Hugging Face token.*hf auth login",
        ),
        (
            errors.GatedRepoError("no", response=SimpleNamespace(status_code=403, headers={}, request=None)),
            "licence.*https://huggingface.co/nvidia/Cosmos-Reason1-7B",
        ),
        (errors.LocalEntryNotFoundError("offline"), "hub cannot be reached.*local copy"),
        (OSError(28, "No space left on device"), "does not fit on the disk.*HF_HOME"),
    ],
)
def test_downloads_that_fail(hub, error, message):
    hub.error = error
    with pytest.raises(EnvironmentProblem, match=message):
        Reason1(mode="offload", device="cpu").encode(["a"])


def test_without_transformers(folder, monkeypatch):
    plain = builtins.__import__

    def missing(name, *given, **options):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return plain(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(EnvironmentProblem, match="needs the package transformers.*pip install"):
        encoder(folder).encode(["a"])


# --- folders that cannot be used ---


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_tensors(path: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


K0 = "model.layers.0.self_attn.k_proj.bias"
FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "must hold tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "must be a JSON object"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object"),
    "tokenizer damaged": (lambda f: (f / "tokenizer.json").write_text("{}"), "must be a tokenizer"),
    "no pad token": (lambda f: (f / "tokenizer_config.json").write_text("{}"), "must know a pad_token"),
    "unknown pad token": (
        lambda f: (f / "tokenizer_config.json").write_text('{"pad_token": "<nil>"}'),
        "must know <nil>",
    ),
    "other model": (
        lambda f: rewrite(f / "config.json", lambda c: c.update(model_type="llama")),
        "model_type must be qwen2_5_vl, got 'llama'",
    ),
    "sliding window": (
        lambda f: rewrite(
            f / "config.json", lambda c: c.update(use_sliding_window=True, max_window_layers=1)
        ),
        "got a sliding window",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "cut short",
    ),
    "no language model": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t.pop("model.embed_tokens.weight")),
        "must hold the language model",
    ),
    "tensor missing": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t.pop(K0)),
        "layer 0: self_attn.k_proj.bias must be .24,., got none",
    ),
    "tensor of another shape": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t.update({K0: torch.zeros(25)})),
        "must be .24,., got .25,.",
    ),
    "one more tensor": (
        lambda f: rewrite_tensors(
            f / "model.safetensors", lambda t: t.update({"model.layers.1.x": torch.zeros(1)})
        ),
        "layer 1: x must be absent",
    ),
    "one more layer": (
        lambda f: rewrite_tensors(
            f / "model.safetensors", lambda t: t.update({"model.layers.3.x": torch.zeros(1)})
        ),
        "layers.3.x must be absent",
    ),
    "no final norm": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        "final norm: weight must be .48,., got none",
    ),
    "NaN": (
        lambda f: rewrite_tensors(f / "model.safetensors", lambda t: t[K0].fill_(float("nan"))),
        "must be finite.*download them again",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be_used(model, tmp_path, fault):
    damage, message = FAULTS[fault]
    folder = language.write(tmp_path / "m", model, is_sharded=False)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        encoder(folder).encode(["a"])


def test_indices_that_cannot_be_used(model, tmp_path):
    folder = language.write(tmp_path, model)
    index = folder / "model.safetensors.index.json"
    rewrite(index, lambda c: c["weight_map"].update({"model.layers.9.x": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="must hold model.layers.9.x, which its index names"):
        encoder(folder).encode(["a"])
    for broken in ({"weight_map": {"a": "../a.safetensors"}}, {"weight_map": []}, {}):
        index.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="must map tensors to files beside it"):
            encoder(folder).encode(["a"])


def test_sources_that_are_none(tmp_path):
    for source in (tmp_path / "nothing", "org/repo"):
        with pytest.raises(CheckpointError, match="must be 'reason1' or an existing folder"):
            Reason1(source)
    with pytest.raises(CheckpointError, match="must be 'reason1' or a folder, got 'style'"):
        Reason1("style")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must tell num_hidden_layers and hidden_size"):
        _ = Reason1(tmp_path, device="cpu").width


def test_the_registry_entry():
    assert registry.find_folder("reason1") is registry.REASON1
    assert dataclasses.astuple(registry.REASON1)[:3] == (
        "reason1", "nvidia/Cosmos-Reason1-7B", "3210bec0495fdc7a8d3dbb8d58da5711eab4b423",
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["bf16", "int8", "offload"])
def test_a_reader_that_stops_midway_leaves_layers_to_be_read_again(folder, mode):
    text = encoder(folder, mode)
    text.load()
    assert isinstance(text._layers, Layers)
    for _ in text._layers:
        break
    assert torch.equal(text.encode(["a"])[0], encoder(folder, mode).encode(["a"])[0])
