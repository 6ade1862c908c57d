"""HiF8 of Ascend 950 through torch_npu: a thin adapter, written from its documentation and **never run so far**.

Sources: op-plugin's documentation of ``npu_dtype_cast``, ``npu_quant_matmul`` and ``utils.get_cann_version``. HiF8 is
no torch dtype there: tensors are uint8, and calls name the format.
"""

import re
from importlib import import_module
from typing import Any

import torch

CANN = (8, 5)
"""The oldest CANN that is accepted: what OSP-Next's own HiF8 kernel is built for."""


def check_cann() -> str:
    """The version of CANN, once it is known to do.

    Raises:
        ValueError: torch_npu is missing or knows no HiF8, or CANN is older.
    """
    try:
        npu = import_module("torch_npu")
        version = str(import_module("torch_npu.utils").get_cann_version("CANN"))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"quant_execution ascend needs torch_npu (pip install 'ospnext[npu]'): {error}") from error
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < CANN:
        raise ValueError(f"quant_execution ascend needs CANN {CANN[0]}.{CANN[1]}, not {version or 'an unknown one'}")
    if not hasattr(npu, "hifloat8"):
        raise ValueError("quant_execution ascend: this torch_npu has no hifloat8: install a newer one")
    return version


def cast(x: torch.Tensor) -> torch.Tensor:
    """Numbers that are scaled already, as HiF8 codes."""
    npu: Any = import_module("torch_npu")
    return npu.npu_dtype_cast(x, npu.hifloat8)


def matmul(
    a: torch.Tensor, b: torch.Tensor, inverse_a: torch.Tensor, inverse_b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """``(a · inverse_a) @ (b · inverse_b).T`` of codes; arguments as in ``ops.fp8.scaled_mm``."""
    npu: Any = import_module("torch_npu")
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    scales = inverse_b.reshape(1), inverse_a.reshape(-1)
    formats = {"x1_dtype": npu.hifloat8, "x2_dtype": npu.hifloat8, "output_dtype": half}
    return npu.npu_quant_matmul(a, b.t(), scales[0], pertoken_scale=scales[1], **formats).to(dtype)
