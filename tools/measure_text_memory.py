"""Peak GPU memory and time of the prompt encoder at its published shapes, in each mode, as JSON on stdout.

    python tools/measure_text_memory.py                         # 28 layers of width 3584 on the GPU, under a minute
    python tools/measure_text_memory.py --device cpu --tiny     # whether it runs at all

Weights are random. One layer's worth of them is made, and every layer takes its weights from there, so host memory
and start-up stay small; on the device each layer has a copy of its own. Everything from there on is what the
encoder does with a file whose pages are in memory: a cold disk adds the time to read 13 GB. The embedding table
has only the rows that are asked for. `seconds_first` contains loading, `seconds_again` is a second call of the same
prompts. `relative_error` is the L2 distance of 8-bit results to bf16 ones, relative, for these random weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from cosmos_fast.reason1 import TOKENS, Reason1  # noqa: E402
from cosmos_fast.safetensors_file import LazyTensor  # noqa: E402

CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False,
    "vision_config": {"depth": 1, "hidden_size": 32},
}  # fmt: skip
TINY = {
    "hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3,
    "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
}  # fmt: skip
ROWS = 4096
GIB = 1 << 30


class RandomReason1(Reason1):
    """The encoder with random weights of `config`, and random ids below ROWS for every prompt."""

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, LazyTensor], mode: str, device: str
    ) -> None:
        super().__init__("reason1", mode=mode, device=device)
        self.config, self.tensors = config, tensors

    def _json(self, name: str) -> dict[str, Any]:
        return self.config

    def _open_weights(self) -> dict[str, LazyTensor]:
        return self.tensors

    def tokenize(self, prompt: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(prompt.encode()))
        return torch.randint(ROWS, (TOKENS,), generator=generator)


def random_tensors(config: dict[str, Any], device: str) -> dict[str, LazyTensor]:
    """Every tensor of the language model; those of one layer serve all. Made on the device, kept on the host."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel

    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(Qwen2_5_VLConfig.from_dict(config).get_text_config())
    made: dict[str, Tensor] = {}
    tensors = {}
    for name, weight in model.state_dict().items():
        kind = name.split(".", 2)[-1] if name.startswith("layers.") else name
        if kind not in made:
            shape = (ROWS, weight.shape[1]) if name == "embed_tokens.weight" else weight.shape
            values = torch.randn(shape, device=device, dtype=torch.bfloat16)
            made[kind] = (values.mul_(0.02).add_(float("norm" in name))).cpu()
        tensors[name] = LazyTensor(tuple(weight.shape), torch.bfloat16, lambda kind=kind: made[kind])
    return tensors


def measure(
    config: dict[str, Any], tensors: dict[str, LazyTensor], mode: str, device: str
) -> tuple[Any, Any]:
    """One record, and the embeddings."""
    is_cuda = torch.device(device).type == "cuda"
    text = RandomReason1(config, tensors, mode, device)
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if is_cuda else 0
    prompts, seconds = ["a prompt", "what it must not be"], []
    for _ in range(2):
        start = time.perf_counter()
        found = text.encode(prompts)  # results are on the host when it returns
        seconds.append(time.perf_counter() - start)
    record = {
        "mode": text.mode, "seconds_first": round(seconds[0], 3), "seconds_again": round(seconds[1], 3),
        "peak_gib": round((torch.cuda.max_memory_allocated() - before) / GIB, 3) if is_cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if is_cuda else None,
    }  # fmt: skip
    text.close()
    record["left_gib"] = round((torch.cuda.memory_allocated() - before) / GIB, 3) if is_cuda else None
    return record, found


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory and time of the prompt encoder with random weights.")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--tiny", action="store_true", help="three narrow layers instead of the published shapes"
    )
    options = parser.parse_args()
    config = CONFIG | (TINY if options.tiny else {})
    torch.manual_seed(0)
    start = time.perf_counter()
    tensors = random_tensors(config, options.device)
    made_in = time.perf_counter() - start
    records, exact = [], None
    for mode in ("bf16", "offload", "int8", "auto"):
        record, found = measure(config, tensors, mode, options.device)
        if mode == "bf16":
            exact = found
        else:
            pairs = [(a.float(), b.float()) for a, b in zip(exact, found, strict=True)]
            record["equals_bf16"] = all(torch.equal(a, b) for a, b in pairs)
            record["relative_error"] = round(max(float((a - b).norm() / a.norm()) for a, b in pairs), 5)
        records.append({"asked": mode, **record})
    is_cuda = torch.device(options.device).type == "cuda"
    print(
        json.dumps(
            {
                "what": "prompt encoder, random weights, 2 prompts of 512 tokens",
                "layers": config["num_hidden_layers"], "width": config["hidden_size"],
                "gpu": torch.cuda.get_device_name() if is_cuda else None,
                "torch": torch.__version__, "python": platform.python_version(),
                "seconds_making_weights": round(made_in, 3),
                "host_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3),
                "modes": records,
            },
            indent=2,
        )
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
