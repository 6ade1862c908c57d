"""Names of devices and dtypes, and what is said about wrong ones."""

import sys
from pathlib import Path

import pytest
import torch

from ospnext.device import device_label, resolve_device, resolve_dtype

HERE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def test_auto_takes_the_accelerator_or_the_cpu() -> None:
    assert resolve_device() == resolve_device("auto") == torch.device(HERE.type if HERE else "cpu")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_cpu_is_always_there(name: str) -> None:
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "", "CUDA", "cuda0", "meta"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is not known: use one of auto, cpu"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cpu:x", "cpu:", "cpu:-1", "auto:0", "cpu:0:1"])
def test_malformed_indices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}'.*write"):
        resolve_device(name)


@pytest.mark.skipif(HERE is not None, reason="this machine has an accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is not available here: this machine has no accelerator; use auto"):
        resolve_device(name)


@pytest.mark.skipif(HERE is None, reason="no accelerator")
def test_an_index_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match=":99' is not available here"):
        resolve_device(f"{HERE}:99")


@pytest.mark.parametrize("body", ["raise ImportError('no CANN')", "raise OSError('no libascendcl')"])
def test_npu_without_its_backend_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str
) -> None:
    (tmp_path / "torch_npu.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    with pytest.raises(ValueError, match=r"needs torch_npu \(pip install 'ospnext\[npu\]'\): no "):
        resolve_device("npu")


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bf16", "bfloat16"), torch.bfloat16),
        (("fp16", "float16"), torch.float16),
        (("fp32", "float32", "float"), torch.float32),
    ],
)
def test_dtypes(names: tuple[str, ...], dtype: torch.dtype) -> None:
    assert {resolve_dtype(name) for name in names} == {dtype}


@pytest.mark.parametrize("name", ["int8", "fp64", "BF16", ""])
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"dtype '{name}' is not known: use one of bf16"):
        resolve_dtype(name)


def test_labels_are_readable() -> None:
    assert device_label(torch.device("cpu")) == f"cpu ({torch.get_num_threads()} threads)"
    if HERE is not None:
        assert device_label(HERE)
