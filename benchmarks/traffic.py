"""What travels between the processes of a sequence, counted as it happens: collectives and bytes.

    torchrun --nproc-per-node 4 benchmarks/traffic.py --size 720p,768p

Runs the model's own seams on tokens of a few channels; bytes grow with them in proportion. For every size: what Ulysses
exchanges in a block, and what sparse sequence parallelism exchanges between two sparse blocks, at the edges of dense
ones, and inside blocks. Prints one JSON line a case and a table last.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import dit_step
import measure
import torch
import work
from scaling import Traffic

from ospnext.ops.layout import Grid, Layout
from ospnext.parallel.launch import Launch, gather_objects, joined, read_launch
from ospnext.parallel.mesh import Mesh, build_mesh, fit_sizes
from ospnext.parallel.sequence import ShardedAttend, ShardedSwitch

RATIO = 2
SWITCHES = (
    (Layout.TOKEN, Layout.GROUP),
    (Layout.GROUP, Layout.TOKEN),
    (Layout.FULL, Layout.TOKEN),
    (Layout.GROUP, Layout.FULL),
)
_COLUMNS = {
    "size": "size",
    "grid": "grid",
    "what": "what",
    "mesh": "ssp x ulysses",
    "collectives": "collectives",
    "of_shards": "sent, of all shards",
    "busiest_of_shard": "busiest, of its shard",
    "of_ulysses": "of Ulysses",
}


def mesh_of(launch: Launch, ssp: int) -> Mesh:
    """All processes on one video, on the CPU."""
    return build_mesh(fit_sizes(launch.world, ssp, launch.world // ssp, RATIO**2), "cpu")


def attend(mesh: Mesh, grid: Grid, layout: Layout, heads: int) -> tuple[Callable[[], Any], int]:
    """Attention of a block without its arithmetic, and the bytes of this process's tokens."""
    plan = ShardedSwitch(mesh.sharing).plan(grid, (layout,), RATIO, torch.device("cpu"))
    x = plan.scatter(torch.zeros(1, grid.tokens, heads, dtype=torch.bfloat16), layout).unsqueeze(-1)
    seam = ShardedAttend(lambda q, k, v, segments: v)  # type: ignore[arg-type]
    return lambda: seam(x, x, x, plan.segments(layout)), x.nbytes


def switch(mesh: Mesh, grid: Grid, here: Layout, there: Layout, channels: int) -> tuple[Callable[[], Any], int]:
    """The switch between two blocks, and the bytes of this process's tokens before it."""
    seam = ShardedSwitch(mesh.sharing)
    plan = seam.plan(grid, (here, there), RATIO, torch.device("cpu"))
    x = plan.scatter(torch.zeros(1, grid.tokens, channels, dtype=torch.bfloat16), here)
    return lambda: seam(x, plan, here, there), x.nbytes


def count(launch: Launch, call: Callable[[], Any], held: int) -> dict[str, Any]:
    """Collectives and bytes of the busiest process."""
    with Traffic() as traffic:
        call()
    each = gather_objects(launch, (traffic.count, traffic.sent, held))
    collectives, sent, _ = (max(column) for column in zip(*each, strict=True))
    return {
        "collectives": collectives,
        "sent_mb": sent / 1e6,
        "busiest_of_shard": max(sent / held for _, sent, held in each),
        "of_shards": sum(sent for _, sent, _ in each) / sum(held for *_, held in each),
        "all_mb": sum(sent for _, sent, _ in each) / 1e6,
    }


def run(arguments: argparse.Namespace, launch: Launch) -> list[dict[str, Any]]:
    """All cases of all sizes."""
    channels = arguments.channels
    ssp = next(n for n in (4, 2, 1) if launch.world % n == 0)
    ulysses, sparse = mesh_of(launch, 1), mesh_of(launch, ssp)
    records = []
    for size in arguments.size:
        grid = work.VIDEOS[size].grid
        cases = [("Ulysses: attention of a block", ulysses, attend(ulysses, grid, Layout.TOKEN, channels))]
        cases += [
            (f"switch {here.value} to {there.value}", sparse, switch(sparse, grid, here, there, channels))
            for here, there in SWITCHES
        ]
        for layout in (Layout.TOKEN, Layout.FULL):
            kind = "dense" if layout is Layout.FULL else "sparse"
            cases.append((f"attention of a {kind} block", sparse, attend(sparse, grid, layout, channels)))
        theirs = None
        for what, mesh, case in cases:
            result = count(launch, *case)
            theirs = result["all_mb"] if theirs is None else theirs
            about = {"benchmark": "traffic", "size": size, "grid": "x".join(map(str, grid)), "what": what}
            about |= {"processes": launch.world, "mesh": f"{mesh.sizes.ssp}x{mesh.sizes.ulysses}", "channels": channels}
            record = about | result | {"of_ulysses": result["all_mb"] / theirs, "torch": torch.__version__}
            records.append(measure.emit(record) if launch.first else record)
    return records


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=dit_step.one_of(work.VIDEOS), default=["720p", "768p"])
    parser.add_argument("--channels", type=int, default=40, help="of a token, each of them a head of its own")
    arguments = parser.parse_args()
    launch = read_launch(os.environ)  # noqa: TID251 - there is no command line to read it
    with joined(launch):
        lines = run(arguments, launch)
    if launch.first:
        print(measure.table(lines, _COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
