"""Ways to arrange a number of processes: every legal one, and the one a configuration asks for."""

from collections.abc import Iterator
from typing import NamedTuple

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
        ConfigError: there is none.
    """
    ulysses = config.sp_size if config.use_sequence_parallel else 1
    ssp = config.skiparse_sp_size if config.use_skiparse_sequence_parallel else 1
    cfg = getattr(config, "cfg_parallel_size", 1)
    fsdp = min(config.fsdp_size, world)
    segments = segment_count(recipe.transformer.layouts, recipe.settings["sparse_ratio"])
    if world % fsdp or (config.ddp_size is not None and config.ddp_size * fsdp != world):
        raise ConfigError(f"fsdp_size {fsdp} and ddp_size {config.ddp_size or 'of the rest'} do not make {world} ranks")
    if segments % ssp or world % (cfg * ssp * ulysses):
        raise ConfigError(
            f"cfg {cfg} x ssp {ssp} x ulysses {ulysses} does not fit {world} ranks and {segments} attention segments"
        )
    return Mesh(fsdp, world // fsdp, world // (cfg * ssp * ulysses), cfg, ssp, ulysses)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
