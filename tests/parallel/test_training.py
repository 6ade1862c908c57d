"""Steps of AdamW on many processes give the loss curve and the parameters of one device."""

from collections.abc import Callable
from pathlib import Path

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
CHECKPOINTED = Options(Sharding(explicit_prefetching_num_blocks=2), checkpointing=True)
KEPT = Options(Sharding(reshard_after_forward=False))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of what one device makes of the runs."""
    path = tmp_path_factory.mktemp("references") / "references.pt"
    torch.save({name_of(run): reference(run) for run in (ANY, SINGLE, DENSE_ENDS)}, path)
    return path


def test_two_processes(processes: Group, references: Path) -> None:
    some = [
        Case(ANY, Sizes(2, 1, 1), Copies(1, 2), Options()),
        Case(ANY, Sizes(1, 2, 1), Copies(1, 2), CHECKPOINTED),
        Case(ANY, Sizes(1, 1, 2), Copies(2, 1), KEPT),
    ]
    processes(2).run(cases.check_cases, some, references)


def test_four_processes(processes: Group, references: Path) -> None:
    some = [
        Case(DENSE_ENDS, Sizes(1, 2, 2), Copies(1, 4), CHECKPOINTED),
        Case(ANY, Sizes(2, 2, 1), Copies(2, 2), KEPT),
        Case(PARTS, Sizes(2, 1, 2), Copies(2, 2), Options()),
        Case(ANY, Sizes(4, 1, 1), Copies(4, 1), Options()),
    ]
    processes(4).run(cases.check_cases, some, references)


def test_float32_within_its_rounding(processes: Group, references: Path) -> None:
    case = Case(SINGLE, Sizes(2, 2, 1), Copies(2, 2), Options())
    processes(4).run(cases.check_cases, [case], references, 2e-5)
