"""The meshes a recipe can run on, each with what the run is like there, and the plan made of them."""

from typing import NamedTuple

from ospnext.prepare.plan_devices import Device
from ospnext.prepare.plan_memory import Phase, phases
from ospnext.prepare.plan_mesh import Mesh
from ospnext.prepare.plan_recipe import Recipe
from ospnext.prepare.plan_time import Run, Seconds, run_seconds, step_seconds


class Option(NamedTuple):
    """One mesh and what a run is like on it."""

    mesh: Mesh
    phases: tuple[Phase, ...]
    step: Seconds
    run: Run

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases)


class Plan(NamedTuple):
    """A recipe on so many devices."""

    recipe: Recipe
    device: Device
    world: int
    videos: int
    chosen: Option | None  # what the configuration asks for
    refusal: str  # why there is none
    options: tuple[Option, ...]  # all that fit, best first
    tried: int
    least: Option  # the mesh that needs least memory
    notices: tuple[str, ...]


def try_mesh(recipe: Recipe, mesh: Mesh, device: Device, videos: int = 1) -> Option:
    """A recipe on one mesh."""
    step = step_seconds(recipe, mesh, device)
    return Option(mesh, phases(recipe, mesh, device), step, run_seconds(recipe, mesh, device, videos))


def order(recipe: Recipe, option: Option) -> tuple[float, int]:
    """What to sort by: of ``generate`` the time of all videos, of ``train`` that of one sample; then memory."""
    if recipe.kind == "generate":
        return _rounded(option.run.total), option.peak
    return _rounded(option.step.total / option.mesh.dp), option.peak


def _rounded(seconds: float) -> float:
    """Four digits: what is closer is as good, and memory decides."""
    return float(f"{seconds:.4g}")
