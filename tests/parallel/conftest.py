"""Process groups that the tests of a file share: one spawn for each world size."""

from collections.abc import Callable, Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Processes]]:
    """``processes(world)``: the group of that size, started anew if a test has broken it."""
    groups: dict[int, Processes] = {}

    def of_world(world: int) -> Processes:
        if world not in groups or not groups[world].alive:
            groups[world] = Processes(world, tmp_path_factory.mktemp("processes") / "rendezvous")
        return groups[world]

    yield of_world
    for group in groups.values():
        group.stop()
