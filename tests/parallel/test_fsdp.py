"""Sharded weights: sizes, reading, precision, and what stays gathered."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import fsdp_cases as cases
import pytest
import torch
from processes import Processes
from safetensors.torch import load_file, save_file
from sequence_cases import Setting
from transformers import UMT5Config, UMT5EncoderModel

from ospnext import OSPNextModel
from ospnext.checkpoints.save import save_transformer
from ospnext.parallel.apply import fit
from ospnext.parallel.fsdp import Copies, Sharding, fit_copies
from ospnext.parallel.mesh import Sizes

Group = Callable[[int], Processes]

ANY = Setting((2, 5, 7), 2, 3, dense_ends=False)
SIZES = {"dim": 52, "ffn_dim": 70, "num_heads": 2, "num_layers": 4, "text_dim": 24, "freq_dim": 32}  # odd on 4 ranks


def random_model(**sizes: int) -> OSPNextModel:
    """A sparse transformer whose every parameter is random."""
    torch.manual_seed(0)
    model = OSPNextModel(**(SIZES | sizes), skiparse_model_type="dual_end")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder in several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "osp"
    save_transformer(random_model(), folder, "osp", max_shard_size=40_000)
    return folder


@pytest.mark.parametrize("copies", [Copies(1, 4), Copies(2, 2), Copies(4, 1)], ids=str)
def test_loaded_in_shards_is_loaded_whole(copies: Copies, checkpoint: Path, processes: Group) -> None:
    processes(4).run(cases.check_loaded, checkpoint, copies, None)
    processes(4).run(cases.check_loaded, checkpoint, copies, torch.bfloat16)


def test_a_torch_file_in_shards(processes: Group, tmp_path: Path) -> None:
    torch.save(random_model().state_dict(), tmp_path / "x.pt")
    processes(2).run(cases.check_loaded, tmp_path / "x.pt", Copies(1, 2), None)


def test_a_wrong_name_is_refused_by_all(checkpoint: Path, processes: Group, tmp_path: Path) -> None:
    state = {name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()}
    state["blocks.0.ffn.9.bias"] = state.pop("blocks.0.ffn.2.bias")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    messages = processes(2).run(cases.message_of_loading, tmp_path, Copies(1, 2))
    assert len(set(messages)) == 1
    assert "1 missing: blocks.0.ffn.2.bias; 1 unexpected: blocks.0.ffn.9.bias" in messages[0]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux: reads /proc; where pages are small")
def test_a_process_reads_its_share_of_the_file(processes: Group) -> None:
    if shutil.disk_usage("/dev/shm").free < 10**8:
        pytest.skip("needs 100 MB of shared memory; a container has less by default")
    with TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "x.safetensors"
        save_file(random_model(dim=768, ffn_dim=3072, num_layers=2).state_dict(), file)
        size = file.stat().st_size
        read = processes(4).run(cases.bytes_read, file, Copies(1, 4))
    assert size > 70_000_000
    for mapped, said in read:
        assert 0.24 * size < said < 0.26 * size
        assert said <= mapped < 0.31 * size  # whole pages, and 64 KiB around each first touch


def test_the_text_encoder_in_shards(processes: Group, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=383, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3)
    UMT5EncoderModel(config).save_pretrained(tmp_path)
    ids = torch.randint(383, (2, 9))
    processes(2).run(cases.check_text_encoder, tmp_path, Copies(1, 2), ids)


@pytest.mark.parametrize("reshard", [None, True, False])
def test_changed_weights_are_seen_after_sampling(reshard: bool | None, processes: Group) -> None:
    processes(2).run(cases.check_fresh, ANY, reshard)


def test_bfloat16_computes_as_on_one_device(processes: Group) -> None:
    processes(2).run(cases.check_bfloat16, ANY)


@pytest.mark.parametrize(
    ("sharding", "forward", "backward"),
    [
        # 8 blocks. Before each: the embeddings and head, the blocks before, itself and those ahead.
        (Sharding(), [2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9, 9]),
        (Sharding(explicit_prefetching_num_blocks=2), [4, 5, 6, 7, 8, 9, 9, 9], [4, 5, 6, 7, 8, 9, 9, 9]),
        (Sharding(reshard_after_forward=False), [2, 3, 4, 5, 6, 7, 8, 9], [0] * 8),
    ],
    ids=["as FSDP2 does", "two blocks ahead", "kept"],
)
def test_weights_are_gathered_ahead(
    sharding: Sharding, forward: list[int], backward: list[int], processes: Group
) -> None:
    setting = ANY._replace(dense_ends=True)
    assert processes(2).run(cases.count_gathers, setting, sharding) == [(forward, backward)] * 2


def test_the_report_says_what_has_no_effect(processes: Group) -> None:
    for lines in processes(2).run(cases.report, ANY):
        assert lines == [
            "2 processes: one video at a time, on cfg 1 x ssp 2 x ulysses 1; weights in 2 shards",
            "blocks: not checkpointed, not compiled",
            "model_cpu_offload has no effect: the model runs on the CPU already",
        ]


def test_sizes_fit() -> None:
    assert fit_copies(8, 4) == fit_copies(8, 4, 2) == Copies(ddp=2, fsdp=4)
    assert fit_copies(1, 1) == Copies(1, 1)
    assert fit(8, 4, ssp=2, ulysses=2, fsdp=8) == (Sizes(2, 1, 2, 2), Copies(1, 8))


@pytest.mark.parametrize(("fsdp", "ddp"), [(4, None), (0, None), (-2, None), (2, 2), (6, 0), (12, None), (-2, -3)])
def test_what_fits_is_named(fsdp: int, ddp: int | None) -> None:
    with pytest.raises(ValueError, match=r"does not fit 6 processes.*: 1 x 6, 2 x 3, 3 x 2, 6 x 1$"):
        fit_copies(6, fsdp, ddp)


def test_prefetching_is_no_negative_number() -> None:
    with pytest.raises(ValueError, match="explicit_prefetching_num_blocks is -1: use 0"):
        Sharding(explicit_prefetching_num_blocks=-1)
