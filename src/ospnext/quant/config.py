"""What is quantised and how: the numbers of a recipe, and which of them runs on what hardware."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ospnext.quant.ascend import check_cann

Scaling = Literal["tensor", "token", "running"]
Execution = Literal["emulation", "fp8", "ascend"]
ReduceAmax = Callable[[torch.Tensor], torch.Tensor]
"""The largest of every process's numbers, element by element; ``parallel`` puts it in where processes share tokens."""

LINEARS = ("blocks.*.self_attn.[qkvo]", "blocks.*.cross_attn.[qkvo]", "blocks.*.ffn.[02]")
"""The linears of every block, dense ones too; not the embeddings, the time embedding and the head."""

_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class QuantConfig:
    """A HiF8 recipe; the defaults are OSP-Next's.

    Attributes:
        linears: name patterns (``fnmatch``) of the linears whose inputs, weights and gradients are rounded.
        attention: round queries, keys and values, after rotation, and their gradients.
        keep: name patterns of linears and attention modules that stay as they are.
        scale_max_forward: what the largest activation and weight is scaled to: 15, where HiF8 has three bits most of
            the way down.
        scale_max_backward: the same of gradients.
        scaling: ``tensor``: by the largest number of one sample's tensor, so that a batch does not change its members.
            ``token``: activations by the largest of each token, for sampling and for the forward pass of training.
            ``running``: linears by a running largest number that training keeps and saves: no pass over the tensor.
        headroom: of ``running``: how many times the running largest number may be exceeded before numbers saturate.
        decay: of ``running``: what becomes of the running largest number with each step that does not reach it.
        execution: what computes the products: see ``choose_execution``.
    """

    linears: tuple[str, ...] = LINEARS
    attention: bool = True
    keep: tuple[str, ...] = ()
    scale_max_forward: float = 15.0
    scale_max_backward: float = 224.0
    scaling: Scaling = "tensor"
    headroom: float = 1.5
    decay: float = 0.99
    execution: Execution = "emulation"

    def __post_init__(self) -> None:
        for name in ("scale_max_forward", "scale_max_backward"):
            if not 2.0**-8 <= getattr(self, name) <= 384:
                raise ValueError(f"{name} is {getattr(self, name)}: HiF8 on 8-bit hardware takes 2^-8 to 384")
        if not 1 <= self.headroom <= 16 or not 0 < self.decay <= 1:
            raise ValueError(f"headroom {self.headroom} must be 1 to 16 and decay {self.decay} above 0, 1 at most")


def choose_execution(name: Execution | Literal["auto"], device: torch.device) -> Execution:
    """What computes the products on a device.

    =============  ========================================================================================
    ``emulation``  HiF8 numbers multiplied in float32: exact, on any device, slower than plain numbers
    ``fp8``        FP8 tensor cores (``ops/fp8.py``): CUDA from compute capability 8.9 on
    ``ascend``     HiF8 of Ascend 950 through ``torch_npu``
    ``auto``       ``fp8`` or ``ascend`` where the device has it, else ``emulation``
    =============  ========================================================================================

    Raises:
        ValueError: the device cannot do what is asked for.
    """
    tensor_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    if name == "auto":
        name = "fp8" if tensor_cores else "ascend" if device.type == "npu" else "emulation"
    if name == "fp8" and device.type == "cuda" and not tensor_cores:
        raise ValueError(
            f"quant_execution fp8 needs FP8 tensor cores (compute capability 8.9): {device} has none; use emulation"
        )
    if name == "fp8" and device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"quant_execution fp8 needs an NVIDIA GPU, not {device}: use auto")
    if name == "ascend":
        if device.type != "npu":
            raise ValueError(f"quant_execution ascend needs an Ascend device (npu), not {device}: use auto")
        check_cann()
    return name
