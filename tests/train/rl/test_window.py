"""Where random steps lie, iteration by iteration."""

import pytest

from ospnext.train.rl.window import Window


def places(window, steps, count):
    return [window.place(i, steps)[0] for i in range(count)]


def test_the_leading_window_stays_and_leaves_out_the_last_step():
    assert Window(size=10).place(7, 25) == (0, 10)
    assert Window(size=25).place(0, 25) == (0, 24)
    with pytest.raises(ValueError, match="two steps and one"):
        Window(size=4).place(0, 1)


def test_the_progressive_window_moves_and_begins_anew():
    window = Window("progressive", size=4, stride=2, interval=3)
    # 10 steps: starts 0 to 5, by twos 0, 2, 4
    assert places(window, 10, 11) == [0, 0, 0, 2, 2, 2, 4, 4, 4, 0, 0]


def test_mixgrpos_own_numbers():
    window = Window("progressive", size=4, stride=1, interval=25)
    assert window.place(0, 25) == (0, 4)
    assert window.place(24, 25) == (0, 4)
    assert window.place(25, 25) == (1, 4)
    assert window.place(25 * 20, 25) == (20, 4)  # the last that leaves out step 24
    assert window.place(25 * 21, 25) == (0, 4)


def test_the_decaying_window_stays_less_in_late_places():
    window = Window("decay", size=2, interval=4, rate=0.5, start=1)
    # starts 0 to 5; they stay ceil(4 e^(-0.5 max(l - 1, 0))) = 4, 4, 3, 2, 1, 1
    assert places(window, 8, 16) == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2 + [4, 5] + [0]


def test_the_random_window_is_a_function_of_the_iteration():
    window = Window("random", size=3, interval=2, seed=5)
    first = places(window, 10, 200)
    assert first == places(window, 10, 200)
    assert first[0::2] == first[1::2]
    assert set(first) == set(range(7))
    assert first != places(Window("random", size=3, interval=2, seed=6), 10, 200)
