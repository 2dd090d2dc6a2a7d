"""Write a text-embedding file with RANDOM content, so that full-size runs have inputs without the 7B encoder.

    python tools/make_embeddings.py OUT --prompt TEXT [--prompt TEXT ...] [--spec FILE ...] --random SEED

Every token row is normal noise shifted to mean 0 and scaled to deviation 1, which is the statistic of the
published embeddings; it carries no meaning, and results made with it follow the controls but not the prompt.
The row depends on SEED and the prompt alone. The file says so in its metadata (`content: random`).
"""

from __future__ import annotations

import argparse
import sys

import torch

from cosmos_fast.spec import NEGATIVE_PROMPT, load_specs
from cosmos_fast.text import prompt_key, write_embeddings


def random_embedding(prompt: str, tokens: int, width: int, seed: int) -> torch.Tensor:
    """(S, E) bf16 noise, mean 0 and deviation 1 in each row, fixed by prompt and seed."""
    generator = torch.Generator().manual_seed((int(prompt_key(prompt)[:15], 16) + seed) % 2**63)
    rows = torch.randn(tokens, width, generator=generator)
    rows -= rows.mean(1, keepdim=True)
    rows /= rows.std(1, keepdim=True, correction=0)
    return rows.to(torch.bfloat16)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a text-embedding file with random content.")
    parser.add_argument("out", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt to include; may be repeated")
    parser.add_argument("--spec", action="append", default=[], help="take both prompts of these spec files")
    parser.add_argument("--default-negative", action="store_true", help="include the default negative prompt")
    parser.add_argument(
        "--width", type=int, default=100352, help="E, width of a token (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=512, help="S, tokens per prompt (default: %(default)s)")
    parser.add_argument("--random", type=int, required=True, metavar="SEED", help="seed of the noise")
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
