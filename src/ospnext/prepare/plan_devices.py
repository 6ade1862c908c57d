"""What devices can do: a table of rates in ``devices.json``, each with its source.

Rates are measured where somebody measured them. What was measured on one device only is taken on the others as the same
share of their datasheet's peak, and called estimated.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ospnext.config import ConfigError

REFERENCE = "h100"  # the device whose shares of its peaks stand for others

_PEAKS = {
    "linear_bf16": "peak_bf16",
    "attention_cudnn": "peak_bf16",
    "attention_flash2": "peak_bf16",
    "bandwidth_eager": "peak_bandwidth",
    "bandwidth_fused": "peak_bandwidth",
    "bandwidth_kernels": "peak_bandwidth",
    "convolution_bf16": "peak_bf16",
    "convolution_fp32": "peak_bf16",  # TF32, which convolutions use by default
    "link_inside": "peak_link_inside",
    "linear_fp8": "peak_fp8",
    "attention_fp8": "peak_fp8",
    "bandwidth_fp8": "peak_bandwidth",
}
_ASSUMED_SHARES = {
    "linear_fp32": ("peak_fp32", 0.7),
    "attention_fp32": ("peak_fp32", 0.4),
    "link_between": ("peak_link_between", 0.75),
}
Code = Literal["eager", "compiled", "kernels"]
"""How a block's operations between products and attention run: one by one, compiled, or in the kernels of ops/fused."""

_WITHOUT_KERNELS = ("ascend910b",)
_CUDNN = ("h100", "h200")  # where ``auto`` takes cuDNN's attention
BACKWARD_SHARE = 0.8  # of an attention kernel's forward rate that its backward reaches; assumed
RESERVED_GIB = 3.0  # driver, communication buffers, libraries' workspace and fragmentation; assumed


class Rate(NamedTuple):
    """One number: TFLOP/s, GB/s, GiB or a count, and where it comes from."""

    value: float
    kind: Literal["measured", "datasheet", "estimated"]
    source: str


@dataclass(frozen=True)
class Device:
    """One kind of accelerator."""

    name: str
    title: str
    rates: Mapping[str, Rate]

    def __getitem__(self, name: str) -> float:
        """The value of a rate."""
        return self.rates[name].value

    @property
    def memory(self) -> int:
        """Bytes that tensors may take."""
        return int((self["memory_gib"] - RESERVED_GIB) * 2**30)

    @property
    def eight_bits(self) -> bool:
        """Whether HiF8 has rates here: linears and attention on FP8 tensor cores."""
        return "peak_fp8" in self.rates

    def linear(self, dtype: torch.dtype, eight_bits: bool = False) -> float:
        """FLOP/s of products in a dtype, or in HiF8."""
        if eight_bits:
            return 1e12 * self["linear_fp8"]
        return 1e12 * self["linear_fp32" if dtype is torch.float32 else "linear_bf16"]

    def kernel(self, asked: str) -> str:
        """The attention kernel whose rate is used for a name of ``ops.attention.KERNEL_NAMES``."""
        if asked in ("sdpa", "flash2"):
            return "flash2"
        return "cudnn" if asked != "auto" or self.name in _CUDNN else "flash2"

    def attention(self, asked: str, dtype: torch.dtype, eight_bits: bool = False) -> float:
        """FLOP/s of attention, forward."""
        if eight_bits:
            return 1e12 * self["attention_fp8"]
        return 1e12 * self["attention_fp32" if dtype is torch.float32 else f"attention_{self.kernel(asked)}"]

    def convolution(self, dtype: torch.dtype) -> float:
        """FLOP/s of the autoencoder's convolutions."""
        return 1e12 * self["convolution_fp32" if dtype is torch.float32 else "convolution_bf16"]

    @property
    def fuses(self) -> bool:
        """Whether sampling has kernels of its own for what stands between products and attention."""
        return self.name not in _WITHOUT_KERNELS

    def bandwidth(self, code: Code, eight_bits: bool = False) -> float:
        """Bytes a second that operations other than products and attention read and write, counted as in bf16."""
        if eight_bits and code == "kernels":
            return 1e9 * self["bandwidth_fp8"]
        return 1e9 * self[{"eager": "bandwidth_eager", "compiled": "bandwidth_fused"}.get(code, "bandwidth_kernels")]

    def link(self, processes: int) -> float:
        """Bytes a second that one process sends to others of a group of neighbouring ranks."""
        return 1e9 * self["link_inside" if processes <= self["devices_per_node"] else "link_between"]


@lru_cache(maxsize=1)
def devices() -> dict[str, Device]:
    """Every device of the table, by name."""
    table = json.loads((Path(__file__).parent / "devices.json").read_text(encoding="utf-8"))
    titles = {name: row.pop("title") for name, row in table.items()}
    given = {name: {key: Rate(**rate) for key, rate in row.items()} for name, row in table.items()}
    return {name: Device(name, titles[name], _complete(rates, given[REFERENCE])) for name, rates in given.items()}


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        ConfigError: it is not in the table; names those that are.
    """
    if name not in devices():
        raise ConfigError(f"accelerator {name!r} is not in the table: use one of {', '.join(devices())}")
    return devices()[name]


def _complete(rates: Mapping[str, Rate], reference: Mapping[str, Rate]) -> dict[str, Rate]:
    """All rates of a device: those that are not given from the peaks."""
    found = dict(rates)
    for name, peak in _PEAKS.items():
        if name not in found and peak in rates:
            share = reference[name].value / reference[peak].value
            source = f"{share:.0%} of {rates[peak].value:g}, the share measured on {REFERENCE.upper()}"
            found[name] = Rate(rates[peak].value * share, "estimated", source)
    for name, (peak, share) in _ASSUMED_SHARES.items():
        found.setdefault(name, Rate(rates[peak].value * share, "estimated", f"{share:.0%} of {rates[peak].value:g}"))
    return found
