"""Use cosmos-fast as a library: one request, frames written as soon as they are decoded.

    python examples/generate.py SPEC CHECKPOINT MODEL EMBEDDINGS OUT.mp4

CHECKPOINT is a published id (then MODEL says the same), a file or a folder. The spec is the file that
`cosmos-fast generate` takes. An Engine makes any number of clips; nothing of a clip but one chunk is held.
"""

from __future__ import annotations

import sys

from cosmos_fast import Engine, Plan, Recipe, Spec, video


def main(spec: str, checkpoint: str, model: str, embeddings: str, out: str) -> None:
    engine = Engine(checkpoint, model=model, text=embeddings, recipe=Recipe.exact(), plan=Plan())
    clip = engine.planned(Spec.load(spec))  # every fault of the request is found here, before any work
    with video.Writer(out, clip.model_size, clip.fps) as writer:
        for part in engine.stream(clip):
            writer.write(part.frames)  # (F, H, W, 3) uint8
            print(f"chunk {part.chunk.index + 1} of {len(clip.chunks)}, seed {part.seed}: {out}")
    for stage, spent in engine.stages.record().items():
        print(f"{stage:<8} {spent['seconds']:8.2f} s")


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
