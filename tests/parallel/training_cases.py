"""What the tests of training run in every process: steps of AdamW on a sharded model, and the same on one device."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import groups_forgotten
from sequence_cases import Setting, compare, float64_throughout, mesh_of
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ospnext.flow.path import TIMESTEPS, interpolate
from ospnext.flow.sample import BothHalves, GuidanceMode, guided
from ospnext.parallel.apply import Options, parallelise
from ospnext.parallel.fsdp import Copies, clip_gradients, copies_mesh
from ospnext.parallel.guidance import SplitGuidance
from ospnext.parallel.mesh import Sizes

STEPS = 5
MAX_NORM = 1.0  # less than the gradients of the first steps have, so that clipping acts

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Run(NamedTuple):
    """What is trained on: the same on one device and on many."""

    setting: Setting
    videos: int  # in all, a step
    dtype: torch.dtype = torch.float64
    micro_steps: int = 1  # gradients of so many parts of the batch are added up before a step

    @property
    def exact(self) -> AbstractContextManager:
        """In float64 rounding hides no error."""
        return float64_throughout() if self.dtype == torch.float64 else nullcontext()


class Case(NamedTuple):
    """A run on a mesh."""

    run: Run
    sizes: Sizes
    copies: Copies
    options: Options


def batches(run: Run, data_rank: int = 0, data_ranks: int = 1) -> Iterator[Batch]:
    """Noisy latents, timesteps, text and velocities of every step: this data rank's share of its videos."""
    t, h, w = run.setting.tokens
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(run.videos, *shape, generator=generator, dtype=torch.float64)

    for _ in range(STEPS):
        sigma = torch.rand(run.videos, generator=generator, dtype=torch.float64)
        x_t, velocity = interpolate(randn(3, t, 2 * h, 2 * w), randn(3, t, 2 * h, 2 * w), sigma)
        whole = (x_t, TIMESTEPS * sigma, randn(7, 5), velocity)
        x_t, timestep, text, velocity = (x.to(run.dtype).chunk(data_ranks)[data_rank] for x in whole)
        yield x_t, timestep, text, velocity


def train(
    model: Any, run: Run, data_rank: int = 0, data_ranks: int = 1, halves: GuidanceMode | BothHalves = "sequential"
) -> dict[str, torch.Tensor]:
    """Train for some steps; this process's losses, the gradient norms and all parameters at the end."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)
    losses, norms = [], []

    def velocity_of(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        def call(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            return model(x, t, condition).sample

        return guided(call, text, -text / 2, 3.0 if run.setting.guided else 1.0, halves)(x, t)

    for batch in batches(run, data_rank, data_ranks):
        total = torch.zeros((), dtype=run.dtype)
        parts = list(zip(*(x.chunk(run.micro_steps) for x in batch), strict=True))
        for i, (x_t, timestep, text, velocity) in enumerate(parts):
            if run.micro_steps > 1 and hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(i + 1 == len(parts))
            loss = F.mse_loss(velocity_of(x_t, timestep, text), velocity) / run.micro_steps
            loss.backward()
            total += loss.detach()
        losses.append(total)
        norms.append(clip_gradients(model.parameters(), MAX_NORM).detach())
        optimiser.step()
        optimiser.zero_grad()
    return {"losses": torch.stack(losses), "norms": torch.stack(norms)} | whole_state(model)


def whole_state(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter, put together from its shards."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def reference(run: Run) -> dict[str, torch.Tensor]:
    """What one device makes of it, in one go."""
    with run.exact:
        return train(run.setting.model().to(run.dtype), run._replace(micro_steps=1))


@cache
def weights_of(copies: Copies) -> DeviceMesh:
    """One mesh of each shape in a process."""
    return copies_mesh(copies, "cpu")


def trained(case: Case) -> dict[str, torch.Tensor]:
    """What many processes make of it."""
    mesh = mesh_of(case.sizes)
    model = case.run.setting.model().to(case.run.dtype)
    parallelise(model, mesh, weights_of(case.copies), case.options)
    halves = SplitGuidance(mesh) if case.sizes.cfg == 2 else "sequential"
    results = train(model, case.run, mesh.group, case.sizes.dp, halves)
    dist.all_reduce(results["losses"])
    results["losses"] /= dist.get_world_size()  # the mean over data; equal among the processes of a sequence
    return results


def check_cases(rank: int, cases: list[Case], references: Path, tolerance: float = 1e-9) -> None:
    """Hold losses, norms and parameters of every case to those of one device."""
    expected = torch.load(references, weights_only=True)
    for _, alike in groupby(cases, lambda case: case.sizes):
        with groups_forgotten():
            for case in alike:
                with case.run.exact:
                    compare(trained(case), expected[name_of(case.run)], str(case), tolerance)
        mesh_of.cache_clear()


def error_of_bfloat16(rank: int, case: Case, references: Path) -> float:
    """The largest relative error of a step's loss where gathered weights are bfloat16."""
    exact = torch.load(references, weights_only=True)[name_of(case.run)]["losses"]
    return float((trained(case)["losses"] / exact - 1).abs().max())


def check_compiled(rank: int, case: Case, references: Path, tolerance: float) -> int:
    """As ``check_cases``; the number of graphs that were compiled for it."""
    torch._dynamo.reset()
    counters.clear()
    check_cases(rank, [case], references, tolerance)
    return counters["stats"]["unique_graphs"]


def name_of(run: Run) -> str:
    """The name of a run's reference: how its batch is cut makes no difference."""
    return str(run._replace(micro_steps=1))
