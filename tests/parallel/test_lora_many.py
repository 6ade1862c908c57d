"""Adapters on two processes: what one device makes of them, with HiF8, checkpointing and compilation, too."""

import shutil
from collections.abc import Callable
from pathlib import Path

import lora_cases as cases
import pytest
import torch
from lora_cases import Case
from processes import Processes
from sequence_cases import Setting, compare

from ospnext.checkpoints.lora import adapter_of, put_adapter
from ospnext.checkpoints.lora_files import Adapter, Pair, write_adapter
from ospnext.checkpoints.save import save_transformer
from ospnext.parallel.mesh import Sizes
from ospnext.prepare.quantize import quantize_transformer
from ospnext.quant.config import QuantConfig

Group = Callable[[int], Processes]

ODD = Setting((2, 5, 7), 2, 3)
EVEN = Setting((2, 6, 8), 2, 4, dense_ends=False)
SSP, DP = Sizes(1, 1, 2, 1), Sizes(2, 1, 1, 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in files."""
    folder = tmp_path_factory.mktemp("base") / "osp"
    save_transformer(ODD.model(), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of it that changes something."""
    return save_adapter(ODD, tmp_path_factory.mktemp("adapter") / "lora")


def save_adapter(setting: Setting, folder: Path) -> Path:
    """A random adapter for a setting's model."""
    model = setting.model()
    put_adapter(model, cases.NEW)
    generator = torch.Generator().manual_seed(5)
    pairs = {
        name: Pair(pair.down, torch.randn(pair.up.shape, generator=generator) * 0.3, pair.alpha)
        for name, pair in adapter_of(model).pairs.items()
    }
    write_adapter(Adapter(pairs), folder)
    return folder


@pytest.mark.parametrize(
    ("sizes", "checkpointing", "whole"),
    [(SSP, False, False), (DP, True, False), (SSP, False, True)],
    ids=["ssp", "dp, checkpointed", "ssp, whole weights"],
)
def test_gradients_are_those_of_one_device(
    sizes: Sizes, checkpointing: bool, whole: bool, base: Path, adapter: Path, processes: Group
) -> None:
    alone = Case(ODD, base)
    expected = cases.gradients(0, alone, adapter)
    many = alone._replace(sizes=sizes, checkpointing=checkpointing, whole=whole)
    results = processes(2).run(cases.gradients, many, adapter)
    if sizes.dp > 1:
        for result in results[1:]:
            results[0]["output"] = torch.cat([results[0]["output"], result["output"]])
    compare(results[0], expected, str(many), 1e-9)
    assert any(value.abs().max() > 1e-3 for name, value in expected.items() if "lora_A" in name)


@pytest.mark.long
def test_compiled_and_checkpointed_blocks_have_the_same_gradients(base: Path, adapter: Path, processes: Group) -> None:
    alone = Case(ODD, base, dtype=torch.float32)
    expected = cases.gradients(0, alone, adapter)
    many = alone._replace(sizes=SSP, checkpointing=True, backend="aot_eager")
    compare(processes(2).run(cases.gradients, many, adapter, seconds=300)[0], expected, str(many), 1e-5)


@pytest.mark.parametrize("stored", [False, True], ids=["rounded in each pass", "stored in 8 bits"])
def test_hif8_below_an_adapter(stored: bool, tmp_path: Path, processes: Group) -> None:
    save_transformer(EVEN.model().float(), tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "base")
    if stored:
        quantize_transformer(tmp_path / "plain", tmp_path / "base", QuantConfig(), overwrite=True)
    adapter = save_adapter(EVEN, tmp_path / "lora")
    alone = Case(EVEN, tmp_path / "base", dtype=torch.float32, quant=(("quant", "hif8"), ("quant_attn", "hif8")))
    expected = cases.gradients(0, alone, adapter)
    plain = cases.gradients(0, alone._replace(path=tmp_path / "plain", quant=()), adapter)
    ours = processes(2).run(cases.gradients, alone._replace(sizes=SSP), adapter)[0]
    assert (expected["output"] - plain["output"]).norm() > 0.01 * plain["output"].norm()  # it does round
    for name, value in expected.items():
        # As without adapters: a number that falls on the other side of a midpoint costs a small tensor something.
        assert (ours[name] - value).norm() < 0.01 * value.norm(), name


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_weights_below_an_adapter_stay_in_8_bits_in_shards(half: bool, tmp_path: Path, processes: Group) -> None:
    save_transformer(ODD.model().float(), tmp_path / "base")
    quantize_transformer(tmp_path / "base", tmp_path / "small", QuantConfig())
    adapter = save_adapter(ODD, tmp_path / "lora")
    dtype = torch.bfloat16 if half else torch.float32
    quant = (("quant", "hif8"), ("quant_attn", "hif8"))
    case = Case(ODD, tmp_path / "small", DP, True, dtype=dtype, quant=quant, param_dtype=dtype if half else None)
    for found in processes(2).run(cases.errors_of_stored, case, adapter):
        assert max(found.values()) < (1e-2 if half else 1e-5), found


def test_bfloat16_weights_below_a_float32_adapter(base: Path, adapter: Path, processes: Group) -> None:
    case = Case(ODD, base, SSP, dtype=torch.bfloat16, param_dtype=torch.bfloat16)
    found = processes(2).run(cases.gradients, case, adapter)[0]
    exact = cases.gradients(0, Case(ODD, base, dtype=torch.float32), adapter)
    for name, value in found.items():
        if name != "output":
            assert value.dtype == torch.float32, name
            assert (value - exact[name]).norm() < 0.1 * exact[name].norm(), name


def test_a_new_adapter_is_the_same_on_any_number(base: Path, processes: Group) -> None:
    alone = Case(ODD, base)
    expected = cases.started(0, alone)
    for result in processes(2).run(cases.started, alone._replace(sizes=SSP)):
        assert result.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in result.items())
    assert len({float(value.sum()) for name, value in expected.items() if name.endswith("down")}) == len(expected) / 2


def test_disabled_it_is_the_base(base: Path, adapter: Path, processes: Group) -> None:
    processes(2).run(cases.check_disabled, Case(ODD, base, SSP, dtype=torch.float32), adapter)
