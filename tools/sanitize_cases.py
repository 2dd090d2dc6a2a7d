"""The small cases of every kernel of ours, once each, in one process: what tools/sanitize.py runs under compute-sanitizer.

    python tools/sanitize_cases.py [--part 1/8] [--select "gelu and bf16"] [--filled] [--list]

Operands are made on the CPU and copied over, results are copied back and compared there, so that on the GPU nothing but our
kernels and copies runs: torch's own kernels cost minutes under a tool, and their errors would be theirs. Prints a line of
JSON before and one after each case. Exits 1 if a result is wrong, 2 if nothing was selected.

--filled: allocations inside an op start out full of one byte, between fences of it. For initcheck, which does not follow what
the copy engine writes (see BULK); a value that nothing wrote is then a wrong result, and a write outside breaks a fence.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from fence import Fenced  # noqa: E402
from torch import Tensor  # noqa: E402

from cosmos_fast import attention8, testing  # noqa: E402
from cosmos_fast.dispatch import TABLE, Candidate  # noqa: E402

testing.kernels_from_checkout()

BULK = {
    f"{op}/triton": "its results are written by the copy engine (cp.async.bulk.tensor)"
    for op in ("linear_gelu", "linear_head_norm", "linear_gelu_fp8")
}
"""Kernels whose results initcheck takes for unwritten, and why; tools/sanitize.py proves that filling them first ends that."""


@dataclass(frozen=True)
class Job:
    """One case of one implementation."""

    op: str
    candidate: Candidate
    case: testing.Case
    dtype: torch.dtype

    @property
    def kernel(self) -> str:
        return f"{self.op}/{self.candidate.name}"

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.case.name.replace(' ', '_')}/{str(self.dtype).removeprefix('torch.')}"


def ours(candidate: Candidate) -> bool:
    """Kernels of this repository: Triton and CUDA; not what calls a library."""
    return candidate.name == "triton" or (candidate.symbol is not None and candidate.device == "cuda")


def jobs(select: str = "") -> list[Job]:
    """Small, odd and empty cases in bf16, and the first in fp32 as well, by turns of the kernels.

    select: words that must be in the name, joined by `and`; `not` before a word excludes it.
    """
    queues = []
    for op, row in TABLE.items():
        cases = [case for case in testing.CASES.get(op, ()) if case.group != "production"]
        kinds = [*((case, torch.bfloat16) for case in cases), *((case, torch.float32) for case in cases[:1])]
        queues += [[Job(op, c, *kind) for kind in kinds] for c in row.candidates if ours(c)]
    longest = max(map(len, queues))
    mixed = [job for turn in range(longest) for queue in queues for job in queue[turn : turn + 1]]
    return [job for job in mixed if chosen(job.name, select)]


def chosen(name: str, select: str) -> bool:
    words = [word.strip() for word in re.split(r"\band\b", select) if word.strip()]
    return all(
        (word.removeprefix("not ").strip() in name) != word.startswith("not ") for word in words
    )  # fmt: skip


def moved(value: Any, device: torch.device, seen: dict[int, Tensor]) -> Any:
    """Operands on another device, views as views: a storage is copied once and whole, strides and offsets stay."""
    if isinstance(value, list | tuple):
        return type(value)(moved(part, device, seen) for part in value)
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in seen:
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        seen[storage.data_ptr()] = whole.to(device, copy=True)
    copy = torch.empty(0, dtype=value.dtype, device=device)
    return copy.set_(
        seen[storage.data_ptr()].untyped_storage(), value.storage_offset(), value.shape, value.stride()
    )  # type: ignore[call-overload]


def as_bytes(x: Tensor) -> Tensor:
    """All bytes of x in one row. An axis of one or no value may have any stride, which a view of another size refuses."""
    x = x.contiguous()
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def spoiled(op: str, after: tuple[Any, ...], before: tuple[Any, ...]) -> list[str]:
    """Which operands an implementation wrote to, though the op's schema does not say so."""
    schema = getattr(torch.ops.cosmos_fast, op).default._schema
    found = []
    for argument, new, old in zip(schema.arguments, after, before, strict=True):
        may = argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(new, Tensor) and not may and not torch.equal(as_bytes(new.cpu()), as_bytes(old)):
            found.append(f"{argument.name}: written, though the op does not update it")
    return found


def run(job: Job, device: torch.device, filled: bool) -> dict[str, Any]:
    """Run one case; what is wrong with its results is under `faults`, why it cannot run here under `skipped`."""
    args = testing.inputs(job.op, job.case, "cpu", job.dtype)
    if device.type == "cuda" and (reason := job.candidate.obstacle(device, args[0].dtype)):
        return {"skipped": reason}
    call: Callable[..., Any] = job.candidate.load()
    there = moved(args, device, {})
    fenced = Fenced() if filled else None
    with torch.no_grad(), fenced or nullcontext():
        outputs = testing.as_tuple(call(*there))
    if device.type == "cuda":
        for out in outputs:  # a kernel that reads all of it: initcheck then sees what nothing wrote
            torch.bitwise_not(as_bytes(out))
        torch.cuda.synchronize()
    back = tuple(out.cpu() for out in (*outputs, *testing.written(job.op, there)))
    found = testing.faults(job.op, back, args, job.candidate.name) + spoiled(job.op, there, args)
    if fenced is not None and (broken := fenced.broken()):
        found.append(f"{broken} bytes outside of its results were written")
    return {"faults": found}


def results(wanted: list[Job], device: torch.device, filled: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, empty) before a case and (name, result) after it."""
    for job in wanted:
        yield job.name, {}
        try:
            yield job.name, run(job, device, filled)
        except Exception as error:  # one kernel must not keep the others from being checked
            traceback.print_exc(limit=-3)
            yield job.name, {"faults": [f"{type(error).__name__}: {str(error)[:300]}"]}


def part_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(match[1]), int(match[2])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N", help="every N-th case, from the I-th"
    )
    parser.add_argument(
        "--select", default="", metavar="WORDS", help="words of a name, joined by 'and'; 'not WORD' excludes"
    )
    parser.add_argument(
        "--filled", action="store_true", help="results start out full of one byte, between fences"
    )
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(arguments)
    index, count = options.part
    wanted = jobs(options.select)[index - 1 :: count]
    if options.list:
        print(*(job.name for job in wanted), sep="\n")
        return 0 if wanted else 2
    if not wanted:
        print("sanitize_cases: no case was selected", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, torch {torch.__version__} sees none.")
    wrong = False
    for name, result in results(wanted, torch.device("cuda"), options.filled):
        wrong |= bool(result.get("faults"))
        print(json.dumps({"case": name, **result}), flush=True)
    return int(wrong)


if __name__ == "__main__":
    # What is proven of a library or a kernel as it loads runs torch's kernels; here the cases are the proof.
    attention8.proven = lambda name, attend, device="cuda": attend
    sys.exit(main(sys.argv[1:]))
