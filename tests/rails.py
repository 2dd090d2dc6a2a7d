"""Guardrail weights at their smallest, in the published layout: word lists, judge, tower, classifier, face detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cosmos_fast.guardrails import Guardrails
from cosmos_fast.guardrails_faces import RetinaFace

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SAFE, UNSAFE = "Safety: Safe Categories: None", "Safety: Unsafe Categories: Violent"


def _lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make_blocklist(folder: Path) -> Path:
    """Lists of a few words; NLTK data that knows one plural and no abbreviations."""
    _lines(folder / "custom" / "words", "grobnik", "flarn", "blister", "")
    _lines(folder / "whitelist" / "words", "blisters")
    _lines(folder / "exact_match" / "phrases", "red herring", "zorp", "", "Quaxolotl", "wubble!", "zop!")
    punkt = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        _lines(punkt / name)
    words = folder / "nltk_data" / "corpora" / "wordnet"
    for kind in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{kind}", f"data.{kind}", f"{kind}.exc"):
            _lines(words / name)
    for name in ("cntlist.rev", "index.sense", "lexnames"):
        _lines(words / name)
    _lines(words / "index.noun", "flarn n 1 0 1 0 00000001")
    _lines(words / "noun.exc", "flarnae flarn")
    return folder


def make_judge(folder: Path, answer: str = SAFE, seed: int = 0) -> Path:
    """A causal language model whose every answer is `answer`: its last norm is zero, so token 0 always wins."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {answer: 0, "[UNK]": 1, "[EOS]": 2} | {f"word{i}": i for i in range(3, 32)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="[EOS]"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, eos_token_id=2, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.save_pretrained(folder)
    return folder


def make_tower(folder: Path, kind: str = "siglip", is_whole: bool = True) -> Path:
    """A random vision tower; is_whole: among the tensors of a whole model, as it is published."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(**sizes, image_size=32, patch_size=16)
        model = transformers.SiglipVisionModel(config)
    else:
        model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes))
    model.save_pretrained(folder)
    if is_whole:
        state = load_file(folder / "model.safetensors")
        whole = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in state.items()}
        save_file(whole | {"text_model.final_layer_norm.weight": torch.ones(4), "logit_bias": torch.ones(1)},
                  folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
        inner = json.loads((folder / "config.json").read_text())
        outer = {
            "model_type": kind,
            "vision_config": inner,
            "text_config": {"model_type": f"{kind}_text_model"},
        }
        (folder / "config.json").write_text(json.dumps(outer))
    return folder


def make_classifier(path: Path, width: int = 32) -> Path:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, 12), torch.nn.BatchNorm1d(12), torch.nn.ReLU(),
        torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 7),
    )  # fmt: skip
    for norm in (layers[1], layers[4]):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {f"network.layers.{k}": v for k, v in layers.state_dict().items()}}, path)
    return path


def make_faces(path: Path) -> Path:
    """A random detector that finds nothing: no score of its reaches the threshold."""
    torch.manual_seed(2)
    net = RetinaFace(width=4, features=16, depths=(1, 1, 1, 1))
    for head in net.ClassHead:
        head.conv1x1.bias.data[:] = torch.tensor([4.0, -4.0, 4.0, -4.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, path)
    return path


def make_guardrails(folder: Path, answer: str = SAFE) -> Guardrails:
    """All of it, opened."""
    make_blocklist(folder / "home" / "blocklist")
    make_classifier(folder / "home" / "video_content_safety_filter" / "safety_filter.pt")
    make_faces(folder / "home" / "face_blur_filter" / "Resnet50_Final.pth")
    return Guardrails.open(
        folder / "home", prompt_judge=make_judge(folder / "judge", answer),
        frame_tower=make_tower(folder / "tower"), device="cpu",
    )  # fmt: skip
