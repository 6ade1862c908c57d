"""Steps of AdamW on many processes give the loss curve and the parameters of one device."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from shutil import which

import pytest
import torch
import training_cases as cases
from processes import Processes
from sequence_cases import Setting
from training_cases import Case, Run, name_of, reference

from ospnext.parallel.apply import Options
from ospnext.parallel.fsdp import Copies, Sharding
from ospnext.parallel.mesh import Sizes

Group = Callable[[int], Processes]

DENSE_ENDS = Run(Setting((2, 5, 7), 2, 3), 4)
ANY = Run(Setting((2, 5, 7), 2, 3, dense_ends=False), 4)
SINGLE = ANY._replace(dtype=torch.float32)
PARTS = ANY._replace(micro_steps=2)
GUIDED = ANY._replace(setting=ANY.setting._replace(guided=True))
CHECKPOINTED = Options(Sharding(explicit_prefetching_num_blocks=2), checkpointing=True)
KEPT = Options(Sharding(reshard_after_forward=False))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of what one device makes of the runs."""
    path = tmp_path_factory.mktemp("references") / "references.pt"
    torch.save({name_of(run): reference(run) for run in (ANY, SINGLE, DENSE_ENDS, GUIDED)}, path)
    return path


def test_one_process(processes: Group, references: Path) -> None:
    processes(1).run(cases.check_cases, [Case(PARTS, Sizes(1, 1, 1, 1), Copies(1, 1), CHECKPOINTED)], references)


def test_two_processes(processes: Group, references: Path) -> None:
    some = [
        Case(ANY, Sizes(2, 1, 1, 1), Copies(1, 2), Options()),
        Case(ANY, Sizes(1, 1, 2, 1), Copies(1, 2), CHECKPOINTED),
        Case(ANY, Sizes(1, 1, 1, 2), Copies(2, 1), KEPT),
    ]
    processes(2).run(cases.check_cases, some, references)


def test_four_processes(processes: Group, references: Path) -> None:
    some = [
        Case(DENSE_ENDS, Sizes(1, 1, 2, 2), Copies(1, 4), CHECKPOINTED),
        Case(PARTS, Sizes(2, 1, 2, 1), Copies(2, 2), KEPT),
        Case(ANY, Sizes(2, 1, 1, 2), Copies(4, 1), Options()),
        Case(GUIDED, Sizes(1, 2, 2, 1), Copies(1, 4), CHECKPOINTED),
    ]
    processes(4).run(cases.check_cases, some, references)


def test_float32_within_its_rounding(processes: Group, references: Path) -> None:
    case = Case(SINGLE, Sizes(2, 1, 2, 1), Copies(2, 2), Options())
    processes(4).run(cases.check_cases, [case], references, 2e-5)


def test_bfloat16_within_its_rounding(processes: Group, references: Path) -> None:
    case = Case(SINGLE, Sizes(2, 1, 2, 1), Copies(2, 2), Options(Sharding(param_dtype=torch.bfloat16), True))
    errors = processes(4).run(cases.error_of_bfloat16, case, references)
    assert 0 < max(errors) < 0.005


def every_mesh(world: int, segments: int, cfg: int = 1) -> list[Sizes]:
    """Every legal way to share videos."""
    shapes = product(range(1, world + 1), repeat=2)
    every = [Sizes(world // (cfg * s * u), cfg, s, u) for s, u in shapes if segments % s == 0]
    return [sizes for sizes in every if sizes.world == world]


def every_copy(world: int) -> list[Copies]:
    """Every legal way to share weights."""
    return [Copies(world // n, n) for n in range(1, world + 1) if world % n == 0]


@pytest.mark.long
@pytest.mark.parametrize(("checkpointing", "reshard"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("world", "cfg"), [(world, cfg) for world in (2, 3, 4, 6, 8) for cfg in (1, 2) if world % cfg == 0]
)
def test_every_mesh(world: int, cfg: int, checkpointing: bool, reshard: bool, processes: Group, tmp_path: Path) -> None:
    """12 heads on up to 8 processes, a grid that divides by nothing, two videos or more at a time."""
    run = Run(Setting((2, 5, 7), 2, 12, dense_ends=False, guided=cfg == 2), 2 * world)
    torch.save({name_of(run): reference(run)}, tmp_path / "references.pt")
    options = Options(Sharding(reshard_after_forward=reshard), checkpointing)
    some = [
        Case(run, sizes, copies, options)
        for sizes, copies in product(every_mesh(world, run.setting.segments, cfg), every_copy(world))
    ]
    if world > 4:  # many processes on few cores take their time: each half in one of the two ways
        some = some[int(checkpointing) :: 2]
    processes(world).run(cases.check_cases, some, tmp_path / "references.pt", seconds=3000)


@pytest.mark.long
@pytest.mark.parametrize("world", [4, 8])
def test_every_setting(world: int, processes: Group, tmp_path: Path) -> None:
    """Dense ends, nine segments, segments in a row, more processes than tokens, parts of a batch; cut in many ways."""
    settings = [
        Setting((1, 9, 10), 2, 3),
        Setting((2, 5, 7), 3, 4, dense_ends=False),
        Setting((2, 5, 7), 2, 4, dense_ends=False, pattern="1d"),
        Setting((1, 2, 2), 2, 12),
    ]
    runs = [Run(setting, 2 * world) for setting in settings]
    torch.save({name_of(run): reference(run) for run in runs}, tmp_path / "references.pt")
    some = [
        Case(run._replace(micro_steps=parts), sizes, copies, CHECKPOINTED)
        for run, parts in product(runs, [1, 2])
        for sizes, copies in zip(every_mesh(world, run.setting.segments), every_copy(world), strict=False)
    ]
    if world > 4:
        some = some[::2]
    processes(world).run(cases.check_cases, some, tmp_path / "references.pt", seconds=3000)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks(checkpointing: bool, processes: Group, references: Path) -> None:
    backend = "inductor" if which("g++") else "aot_eager"
    options = Options(checkpointing=checkpointing, compile_backend=backend)
    case = Case(SINGLE, Sizes(1, 1, 2, 2), Copies(2, 2), options)
    graphs = processes(4).run(cases.check_compiled, case, references, 2e-5, seconds=600)
    assert min(graphs) > 0
