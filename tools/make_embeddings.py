"""Write a file of text embeddings: by the published prompt encoder, or with RANDOM content where none is at hand.

    python tools/make_embeddings.py OUT --prompt TEXT [--prompt TEXT ...] [--spec FILE ...]
    python tools/make_embeddings.py OUT --spec FILE --random SEED

A file made on one machine serves machines without the encoder (`cosmos-fast generate --text-embeddings OUT`).
With --random every token row is normal noise shifted to mean 0 and scaled to deviation 1, which is the statistic of the
published embeddings; it carries no meaning, and results made with it follow the controls but not the prompt.
The row depends on SEED and the prompt alone. The file says so in its metadata (`content: random`).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from cosmos_fast.disk_cache import CACHE_HOME
from cosmos_fast.formats import CosmosFastError
from cosmos_fast.spec import NEGATIVE_PROMPT, load_specs
from cosmos_fast.text import prompt_key, write_embeddings
from cosmos_fast.text_cache import published_text


def random_embedding(prompt: str, tokens: int, width: int, seed: int) -> torch.Tensor:
    """(S, E) bf16 noise, mean 0 and deviation 1 in each row, fixed by prompt and seed."""
    generator = torch.Generator().manual_seed((int(prompt_key(prompt)[:15], 16) + seed) % 2**63)
    rows = torch.randn(tokens, width, generator=generator)
    rows -= rows.mean(1, keepdim=True)
    rows /= rows.std(1, keepdim=True, correction=0)
    return rows.to(torch.bfloat16)


def encode(prompts: list[str], options: Any) -> int:
    """Let the encoder read the prompts; 3 when it cannot, with the reason."""
    try:
        text = published_text(
            options.text_encoder, mode=options.text_mode, device=options.device, folder=options.cache_dir
        )
        found = dict(zip(prompts, text.encode(prompts), strict=True))
        record = {key: str(item) for key, item in text.record.items()}
    except CosmosFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    write_embeddings(options.out, found, metadata=record)
    for note in text.notes:
        print(note, file=sys.stderr)
    print(options.out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a file of text embeddings.")
    parser.add_argument("out", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt to include; may be repeated")
    parser.add_argument("--spec", action="append", default=[], help="take both prompts of these spec files")
    parser.add_argument("--default-negative", action="store_true", help="include the default negative prompt")
    parser.add_argument(
        "--width", type=int, default=100352, help="with --random: E, width of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, help="with --random: S, tokens per prompt (default: %(default)s)"
    )
    parser.add_argument("--random", type=int, metavar="SEED", help="write noise instead, with this seed")
    parser.add_argument(
        "--text-encoder", default="reason1", help="reason1, or a folder like it (default: %(default)s)"
    )
    parser.add_argument("--text-mode", choices=("auto", "bf16", "int8", "offload"), default="auto")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: a GPU when there is one)")
    parser.add_argument("--cache-dir", default=CACHE_HOME, help="folder of the cache (default: %(default)s)")
    options = parser.parse_args(arguments)
    prompts = list(options.prompt)
    if options.spec:
        try:
            specs = load_specs(options.spec)
        except ValueError as error:
            parser.error(str(error))
        prompts += [text for spec in specs for text in (spec.prompt, spec.negative_prompt)]
    if options.default_negative:
        prompts.append(NEGATIVE_PROMPT)
    if not prompts:
        parser.error("prompts: at least one --prompt, --spec or --default-negative is required, got none.")
    if options.width < 2 or options.tokens < 1:
        parser.error(f"sizes: width must be > 1 and tokens > 0, got {options.width} and {options.tokens}.")
    if options.random is None:
        return encode(prompts, options)
    if options.random < 0:
        parser.error(f"--random: must be 0 or more, got {options.random}.")
    embeddings = {
        prompt: random_embedding(prompt, options.tokens, options.width, options.random) for prompt in prompts
    }
    write_embeddings(options.out, embeddings, metadata={"content": "random", "seed": str(options.random)})
    print(f"{len(embeddings)} RANDOM embeddings (no meaning, for tests only)", file=sys.stderr)
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
