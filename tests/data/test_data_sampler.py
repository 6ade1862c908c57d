"""The order: a function of seed and epoch, shared by any number of ranks, resumed at the very next clip."""

from itertools import pairwise

import numpy as np
import pytest

from ospnext.data.sampler import Progress, Sampler


def take(clips: int | list[int], steps: int, progress: Progress | None = None, world: int = 1, **settings):
    """Clips of ``steps`` steps in the order of all ranks, each with its epoch, and the progress after them."""
    sizes = [clips] if isinstance(clips, int) else clips
    bounds = np.cumsum([0, *sizes])
    groups = [np.arange(a, b) for a, b in pairwise(bounds)]
    ranks = [Sampler(groups, **({"batch_size": 2} | settings), rank=rank, world=world) for rank in range(world)]
    progress = progress or ranks[0].start
    order = []
    for _ in range(steps):
        taken = [rank.step(progress) for rank in ranks]
        assert len({step.after for step in taken}) == 1
        assert len({draw.group for step in taken for draw in step.draws}) == 1
        order += [(draw.epoch, draw.clip) for step in taken for draw in step.draws]
        progress = taken[0].after
    return order, progress


def test_an_epoch_is_a_permutation_and_no_epoch_is_like_another() -> None:
    order, _ = take(24, 36)
    epochs = [[clip for epoch, clip in order if epoch == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert take(24, 36, seed=1)[0] != order
    assert take(24, 36)[0] == order


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_resumed_at_any_step_equals_uninterrupted(shuffle: bool, drop_last: bool) -> None:
    settings = {"shuffle": shuffle, "drop_last": drop_last, "world": 2}
    whole, _ = take(23, 20, **settings)
    for done in range(20):
        before, progress = take(23, done, **settings)
        after, _ = take(23, 20 - done, progress, **settings)
        assert before + after == whole


@pytest.mark.parametrize("worlds", [(1, 4), (4, 2), (2, 3), (3, 1), (8, 6)])
def test_another_number_of_ranks_takes_the_very_next_clips(worlds: tuple[int, int]) -> None:
    before, after = worlds
    whole, _ = take(96, 48 * 3, world=1, batch_size=1)
    for done in (0, 1, 3):
        head, progress = take(96, done, world=before, batch_size=1)
        epoch_left = (96 - len(head)) // after
        tail, _ = take(96, epoch_left, progress, world=after, batch_size=1)
        assert head + tail == whole[: len(head) + len(tail)]


@pytest.mark.parametrize("seed", range(8))
def test_any_history_of_ranks_takes_the_order_of_one(seed: int) -> None:
    """Stopped anywhere, in any epoch, and gone on with other ranks and other batches, again and again."""
    rng = np.random.default_rng(seed)
    whole, _ = take(840, 6 * 840, batch_size=1, seed=seed)
    order: list[tuple[int, int]] = []
    progress = None
    while len(order) < 4 * 840:
        left = 840 - len(order) % 840
        fitting = [(w, b) for w in range(1, 9) for b in range(1, 5) if left % (w * b) == 0]  # no end is left out
        world, batch = fitting[rng.integers(len(fitting))]
        steps = int(rng.integers(1, 2 * 840 // (world * batch)))
        steps = min(steps, left // (world * batch)) if 840 % (world * batch) else steps
        taken, progress = take(840, steps, progress, world, batch_size=batch, seed=seed)
        order += taken
    assert order == whole[: len(order)]


def test_without_shuffle_clips_come_as_they_stand() -> None:
    assert [clip for _, clip in take(6, 6, shuffle=False)[0]] == [*range(6)] * 2


def test_the_end_is_left_out_or_filled_up() -> None:
    order, _ = take(7, 4, world=2, batch_size=1, shuffle=False)
    assert [clip for _, clip in order] == [0, 1, 2, 3, 4, 5, 0, 1]
    order, _ = take(7, 5, world=2, batch_size=1, shuffle=False, drop_last=False)
    assert [clip for _, clip in order] == [0, 1, 2, 3, 4, 5, 6, 0, 0, 1]
    order, _ = take(1, 2, world=2, batch_size=2, drop_last=False)
    assert [clip for _, clip in order] == [0] * 8
    with pytest.raises(ValueError, match="lower batch_size"):
        take(3, 1, world=2, batch_size=2)


def test_groups_are_drawn_by_what_is_left_and_all_are_taken() -> None:
    order, progress = take([40, 8, 16], 32)
    assert sorted(clip for _, clip in order) == list(range(64))
    assert progress == Progress(0, (40, 8, 16))
    groups = [0 if clip < 40 else 1 if clip < 48 else 2 for _, clip in order[:32:2]]
    assert len(set(groups)) > 1
    whole, _ = take([40, 9, 17], 60, world=2, batch_size=1)
    for done in (1, 7, 30, 40):
        head, progress = take([40, 9, 17], done, world=2, batch_size=1)
        tail, _ = take([40, 9, 17], 60 - done, progress, world=2, batch_size=1)
        assert head + tail == whole


def test_groups_on_another_number_of_ranks_repeat_and_skip_nothing() -> None:
    head, progress = take([40, 8, 16], 5, world=4, batch_size=1)
    tail, _ = take([40, 8, 16], 22, progress, world=2, batch_size=1)
    assert sorted(clip for epoch, clip in head + tail if epoch == 0) == list(range(64))


def test_state_is_plain_and_of_this_order_only() -> None:
    sampler = Sampler([np.arange(10)], 2)
    state = sampler.state_dict(sampler.step(sampler.start).after)
    assert state == {"epoch": 0, "taken": [2], "seed": 0, "shuffle": True, "groups": [10]}
    assert Sampler([np.arange(10)], 1, 1, 3).load_state_dict(state) == Progress(0, (2,))
    for other in (
        Sampler([np.arange(10)], 2, seed=1),
        Sampler([np.arange(11)], 2),
        Sampler([np.arange(10)], 2, shuffle=False),
    ):
        with pytest.raises(ValueError, match="saved with"):
            other.load_state_dict(state)
