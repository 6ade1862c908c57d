"""A model whose tokens are shared by processes computes what it does on one device, gradients included."""

from itertools import product
from pathlib import Path

import pytest
import torch
from processes import run_processes
from sequence_cases import Case, Setting, check_cases, reference

from ospnext.parallel.mesh import Sizes

GRIDS = [(2, 5, 7), (1, 9, 10)]
FAST = [Setting(grid, ratio, heads) for grid, ratio, heads in product(GRIDS, [2, 3], [3, 4])]
MESHES = {2: [(1, 2), (2, 1)], 4: [(2, 2), (4, 1), (1, 4)]}


def run(cases: list[Case], folder: Path, seconds: float) -> None:
    """All cases of one world size in one spawn."""
    settings = {str(case.setting): case.setting for case in cases}
    torch.save({name: reference(setting) for name, setting in settings.items()}, folder / "references.pt")
    run_processes(cases[0].sizes.world, check_cases, cases, folder / "references.pt", folder=folder, seconds=seconds)


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_and_gradients_are_those_of_one_device(world: int, tmp_path: Path) -> None:
    cases = [
        Case(Sizes(1, ssp, ulysses), setting)
        for (ssp, ulysses), setting in product(MESHES[world], FAST)
        if setting.ratio**2 % ssp == 0
    ]
    run(cases, tmp_path, 60)
