"""8-bit layers scale by the largest number of the whole tensor, on however many processes it lies."""

from collections.abc import Callable

import pytest
import quantised_cases as cases
from processes import Processes
from sequence_cases import Setting

from ospnext.parallel.mesh import Sizes

Group = Callable[[int], Processes]
SETTING = Setting((2, 6, 8), 2, 4, dense_ends=False)


MESHES = [Sizes(1, 1, 2, 1), Sizes(1, 1, 1, 2)]


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_results_are_those_of_one_device(sizes: Sizes, attention: bool, processes: Group) -> None:
    for found in processes(2).run(cases.errors, sizes, SETTING, attention, True):
        # 3e-7 where no number falls on the other side of a midpoint; one that does costs a small tensor more.
        assert max(found.values()) < 1e-2, found


def test_each_process_by_itself_would_round_otherwise(processes: Group) -> None:
    for found in processes(2).run(cases.errors, MESHES[0], SETTING, True, False):
        assert found["output"] > 1e-2
        assert max(found.values()) > 0.1
