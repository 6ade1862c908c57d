"""A model whose tokens are shared by processes computes what it does on one device, gradients included."""

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest
import sequence_cases as cases
import torch
from processes import Processes
from sequence_cases import Case, Setting, reference

from ospnext.ops.layout import Grid, Layout
from ospnext.parallel.mesh import Sizes

Group = Callable[[int], Processes]

GRIDS = [(2, 5, 7), (1, 9, 10)]
MESHES = {  # (cfg, ssp, ulysses)
    2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)],
    4: [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2)],
}
PLAIN = [Setting(grid, ratio, heads) for grid, ratio, heads in product(GRIDS, [2, 3], [3, 4])]
ANY = PLAIN[0]
SPARSE = ANY._replace(dense_ends=False)  # two blocks: TOKEN and GROUP
NO_TOKENS = ANY._replace(tokens=(1, 2, 2))  # GROUP has one segment: some processes own no token
GUIDED = ANY._replace(guided=True)
OTHER = [SPARSE, SPARSE._replace(pattern="1d"), NO_TOKENS, GUIDED, SPARSE._replace(guided=True)]


def cases_on(meshes: Iterable[Sizes], settings: list[Setting], checkpointing: bool = False) -> list[Case]:
    """Every setting on every mesh that fits it."""
    return [
        Case(sizes, setting, checkpointing)
        for sizes, setting in product(meshes, settings)
        if setting.segments % sizes.ssp == 0 and setting.guided >= (sizes.cfg == 2)
    ]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of what one device computes in all settings."""
    path = tmp_path_factory.mktemp("references") / "references.pt"
    torch.save({str(setting): reference(setting) for setting in PLAIN + OTHER}, path)
    return path


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_and_gradients_are_those_of_one_device(world: int, processes: Group, references: Path) -> None:
    meshes = [Sizes(1, *mesh) for mesh in MESHES[world]]
    some = cases_on(meshes, PLAIN + OTHER) + cases_on(meshes, [ANY], checkpointing=True)
    processes(world).run(cases.check_cases, some, references)


def test_data_parallel_sequences_do_not_meet(processes: Group, references: Path) -> None:
    processes(4).run(
        cases.check_cases, cases_on([Sizes(2, 1, 2, 1), Sizes(2, 1, 1, 2), Sizes(4, 1, 1, 1)], [ANY]), references
    )


def test_a_copy_samples_and_the_model_trains(processes: Group, references: Path) -> None:
    processes(2).run(cases.sample_then_train, Sizes(1, 1, 2, 1), ANY, references)


@pytest.mark.parametrize("sizes", [Sizes(1, 1, 4, 1), Sizes(1, 1, 2, 2), Sizes(1, 1, 1, 4)], ids=str)
def test_tokens_travel_while_the_others_are_computed(sizes: Sizes, processes: Group, references: Path) -> None:
    """Two exchanges a switch, two in a block with Ulysses, and the gathering of the output."""
    settings = [setting for setting in (*PLAIN, NO_TOKENS, *OTHER[:2]) if setting.segments % sizes.ssp == 0]
    counts = processes(4).run(cases.check_overlap, sizes, settings, references)
    dense, sparse = (8, 2) if sizes.ulysses > 1 else (4, 0)
    expected = [2 * (5 if s.dense_ends else 1) + 2 * (dense if s.dense_ends else sparse) + 1 for s in settings]
    assert counts == [expected] * 4


def test_blocks_compile_whole(processes: Group, references: Path) -> None:
    processes(2).run(cases.compile_blocks, Sizes(1, 1, 1, 2), SPARSE, references)


def test_bfloat16_is_close(processes: Group, references: Path) -> None:
    assert max(processes(4).run(cases.error_of_bfloat16, Sizes(1, 1, 2, 2), ANY, references)) < 0.03


def test_kernels_are_still_chosen_by_name(processes: Group) -> None:
    assert processes(2).run(cases.kernel_names, Sizes(1, 1, 2, 1), ANY) == [["auto", "sdpa", "sdpa"]] * 2


@pytest.mark.parametrize(
    ("sizes", "checkpointing", "expected"),
    [
        # 8 blocks, 2 dense at either end: 5 switches, 2 exchanges in each block with Ulysses, 1 gather of the output.
        (Sizes(1, 1, 4, 1), False, (5 + 2 * 4 + 1, 5 + 2 * 4)),
        (Sizes(1, 1, 4, 1), True, (5 + 2 * 4 + 1, 5 + 4 * 4)),  # blocks run again in the backward pass, switches do not
        (Sizes(1, 1, 2, 2), False, (5 + 2 * 8 + 1, 5 + 2 * 8)),
        (Sizes(1, 1, 1, 4), False, (5 + 2 * 8 + 1, 5 + 2 * 8)),
    ],
    ids=str,
)
def test_one_collective_a_switch(
    sizes: Sizes, checkpointing: bool, expected: tuple[int, int], processes: Group
) -> None:
    assert processes(4).run(cases.count_of_a_step, Case(sizes, ANY, checkpointing)) == [expected] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sparse_blocks_of_whole_segments_send_nothing_inside(checkpointing: bool, processes: Group) -> None:
    case = Case(Sizes(1, 1, 4, 1), SPARSE, checkpointing)
    assert processes(4).run(cases.count_of_a_step, case) == [(1 + 1, 1)] * 4


@pytest.mark.parametrize(("grid", "share"), [(Grid(21, 48, 84), 0.25), (Grid(21, 45, 80), 0.27)], ids=str)
def test_bytes_sent_at_video_sizes(grid: Grid, share: float, processes: Group) -> None:
    """Four processes: a sparse block of whole segments sends a quarter of what Ulysses does."""
    ulysses = processes(4).run(cases.bytes_of_attention, Sizes(1, 1, 1, 4), grid, Layout.TOKEN)
    ours = processes(4).run(cases.bytes_of_switch, Sizes(1, 1, 4, 1), grid, Layout.TOKEN, Layout.GROUP)
    inside = processes(4).run(cases.bytes_of_attention, Sizes(1, 1, 4, 1), grid, Layout.TOKEN)
    assert [sent for sent, _ in inside] == [0] * 4
    assert max(sent for sent, _ in ours) <= share * max(sent for sent, _ in ulysses)
    for here, there in [(Layout.FULL, Layout.TOKEN), (Layout.GROUP, Layout.FULL)]:
        edge = processes(4).run(cases.bytes_of_switch, Sizes(1, 1, 4, 1), grid, here, there)
        sent, held = (sum(column) for column in zip(*edge, strict=True))
        assert sent <= held * 3 / 4 * 1.001


def test_a_misfit_is_refused(processes: Group) -> None:
    ninths = processes(2).run(cases.message_of_misfit, Sizes(1, 1, 2, 1), Setting((2, 5, 7), 3, 3))
    assert "What fits: ssp 1 with ulysses 1 or 2" in ninths[0]
    dense = processes(2).run(cases.message_of_misfit, Sizes(1, 1, 2, 1), Setting((2, 5, 7), 1, 3))
    assert dense == ["", ""], "no segment of a dense model has to be whole anywhere"
    more = processes(2).run(cases.message_of_misfit, Sizes(1, 1, 4, 1))
    assert more == ["a mesh of (1, 1, 4, 1) needs 4 processes, but 2 run"] * 2


EVERY = [
    Setting(grid, ratio, heads, dense_ends, pattern)
    for grid, ratio, heads, dense_ends, pattern in product(
        [(2, 5, 7), (1, 9, 10), (3, 2, 1)], [2, 3], [3, 4, 12], [True, False], ["2d", "1d"]
    )
]


@pytest.mark.long
@pytest.mark.parametrize("cfg", [1, 2])
@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_every_mesh(world: int, cfg: int, processes: Group, tmp_path: Path) -> None:
    settings = EVERY if cfg == 1 else [setting._replace(guided=True) for setting in EVERY[::3]]
    path = tmp_path / "references.pt"
    torch.save({str(setting): reference(setting) for setting in settings}, path)
    shapes = [Sizes(world // (cfg * s * u), cfg, s, u) for s, u in product(range(1, world + 1), repeat=2)]
    for place, sizes in enumerate(shapes):
        if sizes.world == world and sizes.video > 1:
            # Many processes on few cores take their time: each mesh another seventh, which has all of every axis.
            own = settings if world <= 4 else settings[place % 7 :: 7]
            some = cases_on([sizes], own) + cases_on([sizes], own[::5], checkpointing=True)
            processes(world).run(cases.check_cases, some, path, seconds=600)
