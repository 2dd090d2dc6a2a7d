"""The sections of tools/bench_vae.py that end in a file: a clip through the engine, and the encoder of the mp4 alone."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import make_checkpoint
import numpy as np
import torch
from torch import Tensor
from vae import VAEBench, natural

from cosmos_fast import ops

NOISE = "noise with the spectrum of a picture, panning, grain on every frame"


def contents(b: VAEBench) -> dict[str, Tensor]:
    """What is shown -> (1, 3, F, H, W) in [-1, 1]: a real clip scaled to size, forwards and back, and noise."""
    from cosmos_fast.video import Source, probe

    frames, height, width = b.size
    found = probe(b.args.clip)
    count = min(found.frames, frames)
    with Source(found, (width, height), "linear") as source:
        codes_FHW3 = source.read(0, count)
    turn = [*range(count), *range(count - 2, 0, -1)]
    pixels = torch.from_numpy(codes_FHW3[np.resize(turn, frames)]).to(b.device)
    shown = pixels.permute(3, 0, 1, 2)[None].to(torch.bfloat16) / 127.5 - 1
    name = f"{b.args.clip.name}, {found.size[0]}x{found.size[1]} scaled, {count} frames forwards and back"
    return {name: shown, NOISE: natural(*b.size, b.device, seed=5).to(torch.bfloat16)}


def clip(b: VAEBench) -> None:
    """Clips through engine and runner: from the moment the last denoising step is computed to the mp4's name.

    The network is tiny, the VAE whole. The pictures of random weights are noise, which an encoder of video sees nowhere
    else, so what is decoded is replaced on the device, window by window: twice by a real clip, once by noise. The last
    step ends when the control's file is written: the steps of a whole network last many times longer than that file.
    """
    from cosmos_fast import video_write
    from cosmos_fast.clip_plan import BatchPlan
    from cosmos_fast.engine import Engine, Step
    from cosmos_fast.guards import StopFlag
    from cosmos_fast.media_files import Media
    from cosmos_fast.outputs import OutputFolder
    from cosmos_fast.recipe import Plan
    from cosmos_fast.runner import Options, run_batch
    from cosmos_fast.spec import Spec
    from cosmos_fast.text import TinyText
    from cosmos_fast.video import Writer

    frames, height, width = b.size
    real, noise = contents(b).items()
    (content, shown), turns = real, (real, real, noise)
    marks: dict[str, float] = {}
    publish, finish, begin, begun = video_write._publish, Writer.finish, Media.open, threading.Event()

    def told(part: Path, path: Path) -> None:
        publish(part, path)
        marks[path.stem] = time.perf_counter()

    def finished(writer: Writer) -> None:
        marks.setdefault(f"{writer.path.stem} fed", time.perf_counter())
        finish(writer)
        marks.setdefault(f"{writer.path.stem} checked", time.perf_counter())

    def opened(media: Media, opening: Any) -> None:
        begin(media, opening)
        begun.set()

    def on_step(step: Step) -> None:
        if step.step == step.steps:
            assert begun.wait(60), "the writer never began"
            marks["last step"] = b.sync()

    config = make_checkpoint.config_of("edge", "tiny")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_checkpoint.make(root / "models", "edge", "tiny", device=str(b.device))
        torch.save(
            {name: weight.cpu() for name, weight in b.state.items()}, root / "models" / "tokenizer.pth"
        )
        with Writer(root / "in.mp4", (width, height), 16) as writer:
            writer.write(ops.pixels(natural(*b.size, b.device)).cpu().numpy())
        text = TinyText(width=config.text_width, tokens=config.text_tokens)
        plan = Plan(device=str(b.device))
        engine = Engine(
            root / "models", model="edge", text=text, plan=plan, chunk_lengths=(frames, 1), guardrails=False
        )
        decode = engine.vae.decode_stream

        def natural_stream(z: Tensor, window: int | None = 1) -> Any:
            at = 0
            for part in decode(z, window):
                yield part.copy_(shown[:, :, at : at + part.shape[2]])
                at += part.shape[2]

        engine.vae.decode_stream = natural_stream  # type: ignore[method-assign]
        video_write._publish, Writer.finish, Media.open = told, finished, opened  # type: ignore[method-assign]
        b.record["clip"] = {"size": b.size, "cpus": os.cpu_count(), "guardrails": False, "runs": []}
        try:
            for index, (content, shown) in enumerate(turns[: 1 if b.args.smoke else None]):
                if index and b.is_late():
                    break
                name = f"clip{index}"
                begun.clear()
                spec = Spec(name=name, video_path=root / "in.mp4", prompt="A street.", edge={}, num_steps=2,
                            num_video_frames_per_chunk=frames, resolution="256" if b.args.smoke else "720",
                            keep_input_resolution=not b.args.smoke)  # fmt: skip
                batch, out = BatchPlan((engine.planned(spec),), (), None), OutputFolder(root / "out")
                if b.args.smoke:
                    shown = shown[..., :1, :1].expand(-1, -1, -1, *batch.clips[0].model_size[::-1])
                    shown = shown + 0.3 * torch.randn(shown.shape, dtype=shown.dtype)
                with b.watch(f"clip/{name}"):
                    done = run_batch(
                        batch, lambda model: engine, out, options=Options(), stop=StopFlag(), progress=on_step
                    )
                end = time.perf_counter()
                if done.failed:
                    raise RuntimeError(str(done.failed))
                stages = json.loads((root / "out" / f"{name}.json").read_text())["stages"]
                run = {
                    "content": content,
                    "last_step_to_mp4_s": marks[name] - marks["last step"], "last_step_to_record_s": end - marks["last step"],
                    "fed_s": marks[f"{name} fed"] - marks["last step"], "end_and_check_s": marks[f"{name} checked"] - marks[f"{name} fed"],
                    "stages": stages, "gpu": b.watch.summary(f"clip/{name}"),
                    "bytes": (root / "out" / f"{name}.mp4").stat().st_size,
                }  # fmt: skip
                b.record["clip"]["runs"].append(run)
                print(
                    f"  last step to mp4 {run['last_step_to_mp4_s']:.3f} s, fed at {run['fed_s']:.3f}, end and check "
                    f"{run['end_and_check_s']:.3f}: {content[:24]}, stages {stages}", flush=True
                )  # fmt: skip
        finally:
            video_write._publish, Writer.finish, Media.open = publish, finish, begin  # type: ignore[method-assign]
    runs = b.record["clip"]["runs"]
    for key, one in (("last_step_to_mp4_s", real[0]), ("noise_last_step_to_mp4_s", NOISE)):
        b.record["clip"][key] = min(
            (r["last_step_to_mp4_s"] for r in runs if r["content"] == one), default=None
        )


def encoder(b: VAEBench) -> None:
    """The CPU's part alone: frames per second of the writer, and the seconds it takes after its last frame."""
    from cosmos_fast.video import Writer

    rows = []
    for content, shown in contents(b).items():
        frames = ops.pixels(shown).cpu().numpy()
        with tempfile.TemporaryDirectory() as folder:
            with Writer(Path(folder) / "c.mp4", (b.size[2], b.size[1]), 16) as writer:
                start, cpu = time.perf_counter(), time.process_time()
                for at in range(0, len(frames), 4):
                    writer.write(frames[at : at + 4])
                fed = time.perf_counter()
                writer.finish()
                end, cpu = time.perf_counter(), time.process_time() - cpu
        rows.append({"content": content, "seconds": end - start, "fed_s": fed - start, "finish_s": end - fed,
                     "cpu_s": cpu, "cpu_ms_frame": 1e3 * cpu / len(frames), "frames_s": len(frames) / (end - start)})  # fmt: skip
    b.record["encoder"] = {"size": b.size, "cpus": os.cpu_count(), "runs": rows}
