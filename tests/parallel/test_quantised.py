"""8-bit layers scale by the largest number of the whole tensor, on however many processes it lies."""

from collections.abc import Callable
from pathlib import Path

import pytest
import quantised_cases as cases
import torch
from processes import Processes
from safetensors.torch import load_file, save_file
from sequence_cases import Setting

from ospnext.checkpoints.save import save_transformer
from ospnext.cli import main
from ospnext.parallel.fsdp import Sharding
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


@pytest.mark.parametrize("sizes", MESHES[:1], ids=str)
def test_sharded_weights_train_and_load_the_same(sizes: Sizes, processes: Group, tmp_path: Path) -> None:
    for found in processes(2).run(cases.errors_of_shards, sizes, SETTING):
        assert max(found.values()) < 1e-2, found
    save_transformer(SETTING.model().bfloat16(), tmp_path / "plain")
    assert main(["quantize", str(tmp_path / "plain"), str(tmp_path / "small")]) == 0
    assert max(processes(2).run(cases.errors_of_files, sizes, SETTING, tmp_path / "small")) < 1e-2
    save_transformer(cases.measured(SETTING), tmp_path / "running", to="osp")
    assert max(processes(2).run(cases.errors_of_files, sizes, SETTING, tmp_path / "running")) < 1e-2


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint in 8 bits, sizes that divide by nothing."""
    quantised = tmp_path / "small"
    save_transformer(Setting((2, 5, 7), 2, 3).model().bfloat16(), tmp_path / "plain")
    assert main(["quantize", str(tmp_path / "plain"), str(quantised)]) == 0
    return quantised


@pytest.mark.parametrize(
    ("dtype", "sharding"),
    [
        (torch.float32, Sharding()),
        (torch.bfloat16, Sharding(reshard_after_forward=False, explicit_prefetching_num_blocks=2)),
    ],
    ids=["float32", "bfloat16, kept and gathered ahead"],
)
def test_stored_weights_stay_in_8_bits_in_shards(
    dtype: torch.dtype, sharding: Sharding, small: Path, processes: Group
) -> None:
    setting = Setting((2, 5, 7), 2, 3)
    found = processes(2).run(cases.shards_of_files, setting, small, dtype, sharding)
    assert all(shards.equal for shards in found)
    assert all(shards.dtypes == {torch.uint8} for shards in found)
    assert sum(shards.bytes for shards in found) == found[0].whole // 2


def test_a_damaged_code_is_refused_where_it_lies(small: Path, processes: Group) -> None:
    file = next(small.glob("*.safetensors"))
    tensors = load_file(file)
    name = "blocks.0.ffn.0.weight"
    tensors[name][-1, -1] = 0x80
    save_file(tensors, file)
    first, last = processes(2).run(cases.refused, Setting((2, 5, 7), 2, 3), small)
    assert (first, name in last, "damaged" in last) == ("", True, True)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_running_numbers_are_those_of_one_device(sizes: Sizes, processes: Group) -> None:
    expected = cases.running_numbers(0, None, SETTING, [1.0])
    for found in processes(2).run(cases.running_numbers, sizes, SETTING, [1.0]):
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            if name.split(".hif8")[0].endswith(("cross_attn.k", "cross_attn.v")):  # every process has a share of it
                numbers = numbers / torch.tensor([1.0, 2.0])
            if "seen" not in name:  # what the second pass sees depends on a number that fell beyond a midpoint
                assert (found[name] - numbers).norm() <= 0.02 * numbers.norm(), name


def test_running_numbers_are_everyones(processes: Group) -> None:
    """Groups that see other videos scale by the largest of all."""
    ours, theirs = processes(2).run(cases.running_numbers, Sizes(2, 1, 1, 1), SETTING, [1.0, 4.0])
    assert all(numbers.equal(theirs[name]) for name, numbers in ours.items())
    small, large = (cases.running_numbers(0, None, SETTING, [scale]) for scale in (1.0, 4.0))
    layer = "blocks.0.self_attn.hif8_amax"
    assert (ours[layer] - small[layer].maximum(large[layer])).norm() <= 0.02 * ours[layer].norm()
    assert not small[layer].equal(large[layer])
