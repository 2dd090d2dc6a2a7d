"""The smallest model and tokenizer laid out like the published prompt encoder, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = 256, 257, 258

CONFIG: dict[str, Any] = {
    # The keys of the published config.json of this kind of model, at small sizes: text fields lie at the top.
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 48, "intermediate_size": 64,
    "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 4,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}, "sliding_window": 32768,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 260,
    "bos_token_id": 256, "eos_token_id": 258, "vision_config": {"depth": 1, "hidden_size": 32},
}  # fmt: skip


def plain_model(
    dtype: torch.dtype = torch.float32, attention: str = "eager", config: dict[str, Any] = CONFIG
) -> Any:
    """The language model of transformers, with random weights that make every part matter."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    text = Qwen2_5_VLConfig.from_dict(config).get_text_config()
    text._attn_implementation = attention
    model = Qwen2_5_VLTextModel(text).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        centre, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.2)
        weight.normal_(centre, spread, generator=generator)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # the weights alone: the table of rotary frequencies stays fp32
    return model


def byte_tokenizer() -> Tokenizer:
    """One token per byte, the token's number being the byte, and three marks."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(b) if b in plain else chr(next(others)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([PAD, START, END])
    return tokenizer


def write(
    folder: Path, model: Any, *, prefix: str = "model.", is_sharded: bool = True,
    config: dict[str, Any] = CONFIG, tokenizer_config: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Everything a folder of the published layout holds, with parts of a vision tower and a head that nobody needs."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {prefix + name: weight.clone() for name, weight in model.state_dict().items()}
    other = {"visual.blocks.0.attn.qkv.weight": torch.zeros(3), "lm_head.weight": torch.zeros(5)}
    if is_sharded:
        names = list(tensors)
        half = len(names) // 2
        shards = [
            {name: tensors[name] for name in names[:half]},
            {name: tensors[name] for name in names[half:]},
            other,
        ]
        table = {}
        for n, shard in enumerate(shards, 1):
            file = f"model-{n:05}-of-00003.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            table |= dict.fromkeys(shard, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    else:
        save_file(tensors | other, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"pad_token": PAD, "padding_side": "left"} if tokenizer_config is None else tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
