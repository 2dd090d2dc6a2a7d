"""What one of several ranks does for a clip of the distilled model, on one GPU: the others are stood in for.

    python tools/bench_rank.py --out bench/results                      of 2, 4 and 8 ranks, beside a clip of one GPU, in turns
    python tools/bench_rank.py --out F.json --ranks 2 --rounds 5
    python tools/bench_rank.py --out /tmp/f.json --smoke --device cpu   tiny weights and frames: checks this script

What another rank would send is taken to be what this one sends, so the clip shows nothing, and all else is as among several GPUs:
this rank's tokens, heads and rows, every kernel, copy and flag of the exchange. It is a rank of the middle, whose strip has rows to
take along on both sides, and reads the clip as the first of a host does. Messages come out of its own memory, so often that they
take as long as over a link; of more than two ranks they may take longer even once, which the record tells. Not in it: that ranks
wait for the slowest of them, and whatever else several GPUs do to each other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools"), str(ROOT)]

import scaling_clip  # noqa: E402
from records import destination, environment  # noqa: E402
from scaling_ranks import write  # noqa: E402

from cosmos_fast import neighbours, testing  # noqa: E402
from cosmos_fast.copies import Copies, Lane  # noqa: E402
from cosmos_fast.parallel import Exchange, Group, Mesh, Ranks  # noqa: E402
from cosmos_fast.peer_memory import FLAGS, SLOTS, Driver, PeerMemory, slot_bytes  # noqa: E402

T = TypeVar("T")

LINK_BYTES_S = 259e9
"""What copies carried from GPU to GPU each way: bench/results/nvidia-h200/2026-11-23-fb1d53a-scaling.json."""
STEPS = 4


@dataclass(frozen=True)
class StandIn(Group):
    """A group of which only this rank is there: the others have, and send, what it has and sends itself."""

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Exchange:
        if self.copies is not None:
            return super().all_to_all(rows, sent, received)
        own = rows.split(list(sent))[self.rank]
        return Exchange(torch.cat([own[:count] for count in received]), rows, None)

    def gather(self, x: Tensor, rows: Sequence[int] | None = None) -> list[Tensor]:
        return [x.clone() for _ in range(self.size)]

    def broadcast(self, x: Tensor | None, source: int, device: torch.device) -> Tensor:
        assert x is not None
        return x.to(device)

    def tell(self, value: T, source: int = 0) -> T:
        return value

    def hear(self, value: T) -> list[T]:
        return [value] * self.size

    def by_first(self, make: Callable[[], T], otherwise: T) -> T:
        return make()

    def spread(
        self, jobs: Sequence[Callable[[], Tensor] | None], device: torch.device
    ) -> list[Tensor | None]:
        wanted = [i for i, job in enumerate(jobs) if job is not None]
        results: list[Tensor | None] = [None] * len(jobs)
        for first in range(0, len(wanted), self.size):
            turn = wanted[first : first + self.size]
            made = jobs[turn[min(self.rank, len(turn) - 1)]]()  # type: ignore[misc]
            for i in turn:
                results[i] = made.clone()
        return results


class Mirror(PeerMemory):
    """Peers whose memory is this rank's: what it puts for one of them is what it gets from that one.

    times: how often each chunk is copied out of its slot.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.times = rank, size, 1
        self.slots, self.slot_bytes = SLOTS, slot_bytes(size)
        self._driver, self._device, self.hinted = Driver(), device, True
        self._lanes, self._given = {}, {}
        self._aside = torch.cuda.Stream(device, priority=-1)
        room = FLAGS + (size - 1) * SLOTS * self.slot_bytes
        self._memory = torch.zeros(room, dtype=torch.uint8, device=device)
        self._all = [self._memory] * size
        torch.cuda.synchronize(device)

    def inbox(self, peer: int, slot: int) -> Tensor:
        return self.outbox(peer, slot)

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        for _ in range(self.times if lane[0] == "in" else 1):
            super().copy(lane, target, source)

    def _flag(self, owner: int, setter: int, flag: int, slot: int) -> int:
        return super()._flag(self.rank, setter if owner == self.rank else owner, flag, slot)

    def slow_down(self, copies: Copies) -> dict[str, float]:
        """Copy as often as brings a slot to each peer in the time nearest to that of a link; that time, and the link's."""
        rows = torch.zeros(self.size, self.slot_bytes, dtype=torch.uint8, device=self._device)
        link_ms = (self.size - 1) * self.slot_bytes / LINK_BYTES_S * 1e3
        taken: dict[int, float] = {}
        for self.times in (8, *range(1, 9)):  # the first one wakes the device
            runs = []
            for _ in range(9):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(10):
                    copies.start(rows, [1] * self.size, [1] * self.size)[1].wait()
                end.record()
                torch.cuda.synchronize(self._device)
                runs.append(start.elapsed_time(end) / 10)
            taken[self.times] = median(runs)
        self.times = min(taken, key=lambda times: abs(taken[times] - link_ms))
        return {"times": self.times, "ms": taken[self.times], "link_ms": link_ms}


def mesh_of(size: int, device: torch.device) -> tuple[Mesh, dict[str, float]]:
    """The mesh of a rank of the middle, and how its messages were slowed down."""
    if size == 1:
        return Mesh.alone(device), {}
    rank, copies, slowed = size // 2, None, {}
    if device.type == "cuda":
        peers = Mirror(rank, size, device)
        copies = Copies(peers)
        slowed = peers.slow_down(copies)
    world = StandIn(rank, size)
    return Mesh(Ranks(0, size, 0), device, world, StandIn(rank, size, copies=copies), Group()), slowed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file, or the folder of results")
    parser.add_argument(
        "--ranks", default="2,4,8", help="of how many; each divides the latent rows and the heads"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="for a copy without git")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    testing.kernels_from_checkout()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    rows: list[dict[str, Any]] = []
    record = {"kind": "rank", "environment": environment(args.commit), "rows": rows}
    out = destination(args.out, record["environment"], "rank")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)
        scaling_clip.make(files, smoke=args.smoke, device=args.device)
        fields = scaling_clip.fields(files, smoke=args.smoke)
        engines = {}
        for size in (1, *map(int, args.ranks.split(","))):
            mesh, slowed = mesh_of(size, device)
            # Nobody is there to be met: this rank reads for itself, as the first of a host does.
            with mock.patch.object(neighbours, "meet", lambda world: neighbours.Neighbours()):
                engines[size] = scaling_clip.open_engine(files, mesh, smoke=args.smoke)
            scaling_clip.frames_of(engines[size], 1, fields)
            rows.append({"ranks": size, "slowed": slowed, "runs_s": []})
        for _ in range(args.rounds):
            for row in rows:
                engine = engines[row["ranks"]]
                start = time.perf_counter()
                scaling_clip.frames_of(engine, STEPS, fields)
                row["runs_s"].append(time.perf_counter() - start)
                told = scaling_clip.stages_of(engine)  # its peaks are of all engines together
                row |= {
                    "seconds": median(row["runs_s"]),
                    "stages": told["stages"],
                    "beside_s": told["beside_s"],
                }
                print(f"bench_rank: of {row['ranks']}: {row['runs_s'][-1]:.3f} s {row['stages']}", flush=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                write(out, record)
    for row in rows:
        print(
            f"bench_rank: of {row['ranks']}: {row['seconds']:.3f} s, {rows[0]['seconds'] / row['seconds']:.3f} times"
        )


if __name__ == "__main__":
    main()
