"""Process groups that the tests of a file share: one spawn for each world size."""

from collections.abc import Callable, Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Processes]]:
    """Groups by their number of processes, as far as they have been started."""
    started: dict[int, Processes] = {}
    yield started
    for group in started.values():
        group.stop()


@pytest.fixture(autouse=True)
def long_tests_leave_no_processes(request: pytest.FixtureRequest, groups: dict[int, Processes]) -> Iterator[None]:
    """End all groups after a long test: many processes that wait for each other keep the others from their work."""
    yield
    if request.node.get_closest_marker("long") is not None:
        while groups:
            groups.popitem()[1].stop()


@pytest.fixture(scope="module")
def processes(groups: dict[int, Processes], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Processes]:
    """``processes(world)``: the group of that size, started anew if a test has broken it."""

    def of_world(world: int) -> Processes:
        if world not in groups or not groups[world].alive:
            groups[world] = Processes(world, tmp_path_factory.mktemp("processes") / "rendezvous")
        return groups[world]

    return of_world
