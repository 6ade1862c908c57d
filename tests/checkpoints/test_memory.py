"""Memory: what loading takes at its peak, and what is refused before it is tried."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ospnext.checkpoints.load import load_transformer
from ospnext.checkpoints.memory import (
    OutOfMemoryError,
    checkpoint_bytes,
    require_memory,
)
from ospnext.checkpoints.read import CheckpointError
from ospnext.checkpoints.save import save_transformer
from ospnext.models.transformer import OSPNextTransformer3DModel

MB = 10**6
MEASURE = """
import sys
from pathlib import Path
import torch
import ospnext.checkpoints.load as load

def peak():  # high-water mark of the resident set, in bytes
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
model = load.load_transformer(sys.argv[1], dtype=torch.bfloat16)
print(peak() - before, sum(t.numel() * t.element_size() for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_host_memory_is_the_model_and_one_shard(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(dim=1024, ffn_dim=3072, num_heads=8, num_layers=5, text_dim=1024)
    model.to_empty(device="cpu")  # any numbers will do
    save_transformer(model, tmp_path / "x", "osp", max_shard_size=40 * MB)
    stored = checkpoint_bytes(tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) >= 8
    del model
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    peak, loaded = map(int, out.split())
    assert loaded == stored // 2 > 120 * MB
    assert peak < loaded + 40 * MB + 25 * MB  # one shard, and 25 MB for Python and the allocator


def sparse_checkpoint(folder: Path, settings: dict) -> None:
    """A checkpoint of any size that takes no room on the disk: a true header, and a hole for the numbers."""
    with torch.device("meta"):
        model = OSPNextTransformer3DModel(**settings)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"_class_name": "OSPNextModel"} | settings))


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ospnext.checkpoints.memory.free_memory", lambda device: 64 * 2**30)  # some hosts have room
    sparse_checkpoint(tmp_path, {"dim": 65536, "ffn_dim": 262144, "num_heads": 512, "num_layers": 4})
    need = checkpoint_bytes(tmp_path, torch.bfloat16)
    assert need > 500 * 10**9
    with pytest.raises(OutOfMemoryError, match=rf"needs {need / 2**30:.1f} GiB on cpu, but \d+\.\d GiB are free"):
        load_transformer(tmp_path, dtype=torch.bfloat16)


def test_checkpoint_bytes(transformer, tmp_path: Path) -> None:
    numbers = sum(p.numel() for p in transformer.parameters())
    for name, to in (("folder", "diffusers"), ("x.pt", "pt"), ("x.safetensors", "pt")):
        save_transformer(transformer, tmp_path / name, to, max_shard_size=50_000)
        assert checkpoint_bytes(tmp_path / name) == 4 * numbers
        assert checkpoint_bytes(tmp_path / name, torch.bfloat16) == 2 * numbers
    with pytest.raises(CheckpointError, match="no such file or folder"):
        checkpoint_bytes(tmp_path / "nowhere")


def test_the_need_and_what_is_free_are_named() -> None:
    cpu = torch.device("cpu")
    require_memory(MB, cpu)
    with pytest.raises(OutOfMemoryError, match=r"a giant: needs 1048576\.0 GiB on cpu, but \d+\.\d GiB are free"):
        require_memory(2**50, cpu, "a giant")
    assert issubclass(OutOfMemoryError, ValueError)
