"""Time depth at its published size, and compare half with full precision: random weights unless a file is given.

    python tools/bench_depth.py --frames 93                                    # on a GPU: about a minute
    python tools/bench_depth.py --weights video_depth_anything_vits.pth

Prints seconds and peak device memory of the whole maker (decode, network, stitching, range), of one window of the
network alone, and how far fp16 autocast moves its depth.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from cosmos_fast.clip_maker import ClipTask  # noqa: E402
from cosmos_fast.depth import VideoDepth, network_size  # noqa: E402
from cosmos_fast.depth_network import WINDOW, DepthNetwork  # noqa: E402
from cosmos_fast.dispatch import pick_device  # noqa: E402
from cosmos_fast.video import Writer, probe  # noqa: E402


def moving(frames: int, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [
        128 + 100 * np.sin(x / 40 + t / 9) * np.cos(y / 55 - t / 13) + 20 * ((x // 64 + y // 64 + t // 8) % 2)
        for t in range(frames)
    ]
    return np.stack(waves).clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=93)
    parser.add_argument("--size", type=int, nargs=2, default=(1280, 720), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device")
    given = parser.parse_args()
    device, (width, height) = pick_device(given.device), given.size
    on_gpu = device.type == "cuda"

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        weights = given.weights or Path(folder) / "random.pth"
        if given.weights is None:
            state = DepthNetwork().state_dict()
            state["head.scratch.output_conv2.2.bias"] += (
                1.0  # untrained, the last ReLU would leave nothing to compare
            )
            torch.save(state, weights)
        clip = Path(folder) / "clip.mkv"
        with Writer(clip, (width, height), 25, codec="ffv1") as writer:
            writer.write(moving(given.frames, width, height))
        maker, source = VideoDepth(device, weights), probe(clip)
        network = maker._load()
        columns, rows = network_size(width, height)
        x = torch.randn(WINDOW, 3, rows, columns, device=device)
        result: dict[str, float | str] = {"device": str(device), "network_size": f"{columns}x{rows}"}
        with torch.inference_mode():
            full = network(x)
            if on_gpu:
                with torch.autocast("cuda", torch.float16):
                    half = network(x)
                    start = now()
                    network(x)
                    result["window_fp16_s"] = round(now() - start, 4)
                spread = (full.max() - full.min()).item()
                result["fp16_max_error_of_range"] = round((half - full).abs().max().item() / spread, 6)
                del half
            start = now()
            network(x)
            result["window_fp32_s"] = round(now() - start, 4)
        del full, x
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = now()
        made = sum(len(part) for part in maker.make(ClipTask(source, (1280, 704)), lambda done, total: None))
        result |= {"frames": made, "maker_s": round(now() - start, 2)}
        if on_gpu:
            result["maker_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
