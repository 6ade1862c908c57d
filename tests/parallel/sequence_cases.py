"""What the tests of sequence parallelism run in every process: a model, its reference on one device, comparisons."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ospnext import OSPNextModel
from ospnext.parallel.apply import apply_sequence_parallel
from ospnext.parallel.mesh import Mesh, Sizes, build_mesh

TOLERANCE = 1e-10


class Setting(NamedTuple):
    """What is computed, on however many devices."""

    tokens: tuple[int, int, int]  # the grid
    ratio: int
    heads: int
    dense_ends: bool = True
    pattern: str = "2d"

    def model(self) -> Any:
        """A float64 model whose every parameter is random, in training mode."""
        torch.manual_seed(0)
        dim = self.heads * 6
        model = OSPNextModel(
            text_len=7,
            in_dim=3,
            out_dim=3,
            dim=dim,
            ffn_dim=2 * dim,
            freq_dim=8,
            text_dim=5,
            num_heads=self.heads,
            num_layers=8 if self.dense_ends else 2,
            num_full_blocks=4 if self.dense_ends else 0,
            skiparse_model_type="dual_end",
            skiparse_pattern=self.pattern,
            sparse_ratio=self.ratio,
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.train()

    def inputs(self, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, timesteps and text."""
        t, h, w = self.tokens
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(batch, 3, t, 2 * h, 2 * w, generator=generator, dtype=torch.float64)
        text = torch.randn(batch, 7, 5, generator=generator, dtype=torch.float64)
        return latents, torch.linspace(50, 950, batch), text


class Case(NamedTuple):
    """A setting on a mesh."""

    sizes: Sizes
    setting: Setting
    checkpointing: bool = False


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Where the model computes in float32 whatever its weights are, compute in float64: else rounding hides errors."""
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single


def outputs_and_gradients(model: Any, setting: Setting) -> dict[str, torch.Tensor]:
    """The velocity and the gradient of every parameter and of the latents, for a loss of random weights."""
    latents, timestep, text = setting.inputs()
    latents.requires_grad_()
    model.zero_grad()
    out = model(latents, timestep, text).sample
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weight).sum().backward()
    gradients = {"latents": latents.grad, **{name: p.grad for name, p in model.named_parameters()}}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient of {missing}"
    return {"output": out.detach(), **gradients}


def reference(setting: Setting) -> dict[str, torch.Tensor]:
    """What one device computes."""
    with float64_throughout():
        return outputs_and_gradients(setting.model(), setting)


def check_cases(rank: int, cases: list[Case], references: Path) -> None:
    """Hold outputs and summed gradients of every case to those of one device."""
    expected = torch.load(references, weights_only=True)
    with float64_throughout():
        for case in cases:
            mesh = mesh_of(case.sizes)
            model = case.setting.model()
            apply_sequence_parallel(model, mesh)
            if case.checkpointing:
                model.enable_gradient_checkpointing()
            ours = outputs_and_gradients(model, case.setting)
            sum_gradients(ours, mesh)
            compare(ours, expected[str(case.setting)], str(case))


@cache
def mesh_of(sizes: Sizes) -> Mesh:
    """One mesh of each shape in a process."""
    return build_mesh(sizes, "cpu")


def sum_gradients(results: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Sum all but the output over the processes of the sequence, in place and in one piece."""
    gradients = [value for name, value in results.items() if name != "output"]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=mesh.devices["sequence"].get_group())
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    """Equal to ``TOLERANCE`` of each tensor's largest value."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        error = (value - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1)
        assert error < TOLERANCE, f"{what}: {name} is off by {error:.1e}"
