"""Ways to arrange a number of processes: every legal one, and the one a configuration asks for."""

from collections.abc import Iterator
from typing import NamedTuple

from ospnext.assemble import fit_run
from ospnext.config import ConfigError
from ospnext.parallel.ownership import segment_count
from ospnext.prepare.plan_recipe import Recipe
from ospnext.prepare.plan_traffic import Sequence
from ospnext.sections import RunConfig


class Mesh(NamedTuple):
    """Processes by what they share: weights (fsdp x ddp) and, independently, the work (dp x cfg x ssp x ulysses)."""

    fsdp: int
    ddp: int
    dp: int
    cfg: int
    ssp: int
    ulysses: int

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.fsdp * self.ddp

    @property
    def video(self) -> int:
        """Processes that share a video."""
        return self.cfg * self.ssp * self.ulysses

    def sequence(self, recipe: Recipe) -> Sequence:
        """How a video of a recipe is shared."""
        settings = recipe.settings
        layouts = recipe.transformer.layouts
        return Sequence(recipe.grid, layouts, settings["sparse_ratio"], settings["num_heads"], self.ssp, self.ulysses)


def all_meshes(recipe: Recipe, world: int) -> Iterator[Mesh]:
    """Every arrangement in which each process has a head in dense blocks and whole segments in sparse ones."""
    segments = segment_count(recipe.transformer.layouts, recipe.settings["sparse_ratio"])
    heads = recipe.settings["num_heads"]
    for cfg in (1, 2) if recipe.guided else (1,):
        for ssp in _divisors(segments):
            for ulysses in range(1, heads // ssp + 1):
                if world % (cfg * ssp * ulysses) == 0:
                    for fsdp in _divisors(world):
                        yield Mesh(fsdp, world // fsdp, world // (cfg * ssp * ulysses), cfg, ssp, ulysses)


def configured_mesh(recipe: Recipe, config: RunConfig, world: int) -> Mesh:
    """The arrangement that a configuration asks for on so many processes.

    Raises:
        ConfigError: there is none; the message names some.
    """
    segments = segment_count(recipe.transformer.layouts, recipe.settings["sparse_ratio"])
    try:
        sizes, copies = fit_run(config, world, segments, recipe.guided)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Mesh(copies.fsdp, copies.ddp, *sizes)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
