"""Sizes of a mesh: what fits, and what a misfit is told; no process is started."""

import pytest

from ospnext.parallel.mesh import Sizes, check_segments, fit_sizes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1, 1, 1, 1), Sizes(1, 1, 1, 1)),
        ((8, 4, 2, 4), Sizes(1, 1, 4, 2)),
        ((8, 2, 1, 4), Sizes(4, 1, 2, 1)),
        ((6, 3, 2, 9), Sizes(1, 1, 3, 2)),
        ((7, 1, 7, 4), Sizes(1, 1, 1, 7)),
        ((1024, 4, 2, 4), Sizes(128, 1, 4, 2)),
        ((16, 4, 1, 4, 2), Sizes(2, 2, 4, 1)),
    ],
)
def test_what_a_sequence_leaves_over_is_data_parallel(arguments: tuple, expected: Sizes) -> None:
    assert fit_sizes(*arguments) == expected
    assert expected.world == arguments[0]


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        ((4, 3, 1, 4), "ssp 1 with ulysses 1, 2 or 4; ssp 2 with ulysses 1 or 2; ssp 4 with ulysses 1$"),
        ((6, 4, 1, 4), "ssp 1 with ulysses 1, 2, 3 or 6; ssp 2 with ulysses 1 or 3$"),
        ((4, 2, 1, 1), "ssp 2 x ulysses 1 .* does not fit 4 processes and 1 attention segments.*ssp 1 with ulysses"),
        ((6, 2, 1, 9), "ssp 1 with ulysses 1, 2, 3 or 6; ssp 3 with ulysses 1 or 2$"),
        ((4, 1, 3, 4), r"ssp 1 x ulysses 3 \(skiparse_sp_size x sp_size\) does not fit 4 processes"),
        ((4, 0, 1, 4), "ssp 0"),
        ((4, 1, -1, 4), "ulysses -1"),
        ((0, 1, 1, 4), "world size is 0"),
        ((5, 1, 1, 4, 2), "cfg_parallel_size 2 does not fit 5 processes. What fits: 1$"),
        ((6, 1, 1, 4, 3), "cfg_parallel_size 3 does not fit 6 processes. What fits: 1 or 2$"),
        ((8, 4, 2, 4, 2), "8 processes with cfg_parallel_size 2 .* What fits: .*; ssp 4 with ulysses 1$"),
    ],
)
def test_a_misfit_names_what_fits(arguments: tuple, way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out):
        fit_sizes(*arguments)


def test_a_mesh_is_held_to_the_model() -> None:
    check_segments(Sizes(1, 1, 4, 1), 4)
    with pytest.raises(ValueError, match=r"ssp 4 x ulysses 1 .* does not fit 4 processes and 9 attention segments"):
        check_segments(Sizes(1, 1, 4, 1), 9)
