"""What the tests of sequence parallelism run in every process: a model, its reference on one device, comparisons."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from processes import groups_forgotten
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext import OSPNextModel
from ospnext.flow.sample import BothHalves, GuidanceMode, guided
from ospnext.ops.layout import Grid, Layout
from ospnext.parallel.apply import apply_sequence_parallel
from ospnext.parallel.guidance import SplitGuidance
from ospnext.parallel.mesh import Mesh, Sizes, build_mesh
from ospnext.parallel.sequence import ShardedAttend, ShardedSwitch


class Setting(NamedTuple):
    """What is computed, on however many devices."""

    tokens: tuple[int, int, int]  # the grid
    ratio: int
    heads: int
    dense_ends: bool = True
    pattern: str = "2d"
    guided: bool = False

    @property
    def segments(self) -> int:
        """Attention segments of the sparse blocks."""
        return self.ratio**2 if self.pattern == "2d" else self.ratio

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


def outputs_and_gradients(
    model: Any, setting: Setting, halves: GuidanceMode | BothHalves = "batched"
) -> dict[str, torch.Tensor]:
    """The velocity and the gradient of every parameter and of the latents, for a loss of random weights."""
    latents, timestep, text = setting.inputs()
    latents.requires_grad_()
    model.zero_grad()

    def velocity(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, t, condition).sample

    out = guided(velocity, text, text.flip(0) / 2, 3.0 if setting.guided else 1.0, halves)(latents, timestep)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
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
    for _, alike in groupby(cases, lambda case: case.sizes):
        with float64_throughout(), groups_forgotten():
            for case in alike:
                mesh = mesh_of(case.sizes)
                model = case.setting.model()
                apply_sequence_parallel(model, mesh)
                if case.checkpointing:
                    model.enable_gradient_checkpointing()
                halves = SplitGuidance(mesh) if case.sizes.cfg == 2 else "batched"
                ours = outputs_and_gradients(model, case.setting, halves)
                sum_gradients(ours, mesh)
                compare(ours, expected[str(case.setting)], str(case))
        mesh_of.cache_clear()


@cache
def mesh_of(sizes: Sizes) -> Mesh:
    """One mesh of each shape in a process."""
    return build_mesh(sizes, "cpu")


def sum_gradients(results: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Sum all but the output over the processes of a video, in place and in one piece."""
    gradients = [value for name, value in results.items() if name != "output"]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=mesh.video.get_group())
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def compare(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str, tolerance: float = 1e-10
) -> None:
    """Equal to ``tolerance`` of each tensor's largest value."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        error = (value - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1)
        assert error < tolerance, f"{what}: {name} is off by {error:.1e}"


class Traffic(TorchDispatchMode):
    """Counts the collectives of this process and the bytes that leave it, as they happen."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name, _ = str(function).split(".")
        if "c10d" in namespace and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.collectives.append(name)
            rows, _, send, group = args  # of all_to_all_single
            leaving = sum(send) - send[dist.get_rank(_resolve_process_group(group))]
            self.sent += leaving * rows[:1].nbytes
        return function(*args, **(kwargs or {}))


def count_of_a_step(rank: int, case: Case) -> tuple[int, int]:
    """All-to-alls of a forward and of a backward pass."""
    model = case.setting.model().float()
    apply_sequence_parallel(model, mesh_of(case.sizes))
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    latents, timestep, text = (x.float() for x in case.setting.inputs())
    with Traffic() as forward:
        loss = model(latents, timestep, text).sample.square().sum()
    with Traffic() as backward:
        loss.backward()
    assert {*forward.collectives, *backward.collectives} <= {"all_to_all_single"}
    return len(forward.collectives), len(backward.collectives)


def bytes_of_switch(rank: int, sizes: Sizes, grid: Grid, here: Layout, there: Layout) -> tuple[int, int]:
    """Bytes this process sends in a switch, and those it holds before; one collective."""
    switch = ShardedSwitch(mesh_of(sizes).sharing)
    plan = switch.plan(grid, (here, there), 2, torch.device("cpu"))
    x = plan.scatter(torch.zeros(1, grid.tokens, 8), here)
    with Traffic() as traffic:
        switch(x, plan, here, there)
    assert traffic.collectives == ["all_to_all_single"]
    return traffic.sent, x.nbytes


def bytes_of_attention(rank: int, sizes: Sizes, grid: Grid, layout: Layout) -> tuple[int, int]:
    """Bytes this process sends in attention of 8 channels in 4 heads, and those it holds; two collectives or none."""
    plan = ShardedSwitch(mesh_of(sizes).sharing).plan(grid, (layout,), 2, torch.device("cpu"))
    x = plan.scatter(torch.zeros(1, grid.tokens, 8), layout).unflatten(-1, (4, 2))
    attend = ShardedAttend(lambda q, k, v, segments: v)
    with Traffic() as traffic:
        attend(x, x, x, plan.segments(layout))
    assert len(traffic.collectives) in (0, 2)
    return traffic.sent, x.nbytes


def sample_then_train(rank: int, sizes: Sizes, setting: Setting, references: Path) -> None:
    """A copy of a model made for many processes samples in inference mode; what it leaves behind serves training."""
    with float64_throughout():
        model = setting.model()
        apply_sequence_parallel(model, mesh_of(sizes))
        expected = torch.load(references, weights_only=True)[str(setting)]
        with torch.inference_mode():
            sampled = copy.deepcopy(model)(*setting.inputs()).sample
        compare({"output": sampled}, {"output": expected["output"]}, "sampled")
        ours = outputs_and_gradients(model, setting)
        sum_gradients(ours, mesh_of(sizes))
        compare(ours, expected, "trained")


def check_overlap(rank: int, sizes: Sizes, settings: list[Setting], references: Path) -> list[int]:
    """Blocks that hand over their tokens early sample what one device does, and train as ever; exchanges of a pass."""
    counts = []
    with float64_throughout():
        for setting in settings:
            model = setting.model()
            apply_sequence_parallel(model, mesh_of(sizes), overlap=True)
            expected = torch.load(references, weights_only=True)[str(setting)]
            with torch.no_grad(), Traffic() as traffic:
                sampled = model(*setting.inputs()).sample
            assert {*traffic.collectives} <= {"all_to_all_single"}
            counts.append(len(traffic.collectives))
            compare({"output": sampled}, {"output": expected["output"]}, f"{setting} on {sizes}, overlapped")
    ours = outputs_and_gradients(model, setting)
    sum_gradients(ours, mesh_of(sizes))
    compare(ours, expected, "trained", tolerance=1e-6)
    return counts


def compile_blocks(rank: int, sizes: Sizes, setting: Setting, references: Path) -> None:
    """Every block is one graph, exchanges included; its results are the eager ones of one device."""
    model = setting.model()
    apply_sequence_parallel(model, mesh_of(sizes))
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    ours = outputs_and_gradients(model, setting)
    sum_gradients(ours, mesh_of(sizes))
    compare(ours, torch.load(references, weights_only=True)[str(setting)], "compiled", tolerance=2e-6)


def error_of_bfloat16(rank: int, sizes: Sizes, setting: Setting, references: Path) -> float:
    """Relative error of a bfloat16 model's velocity."""
    model = setting.model().bfloat16()
    apply_sequence_parallel(model, mesh_of(sizes))
    exact = torch.load(references, weights_only=True)[str(setting)]["output"]
    with torch.no_grad():
        return float((model(*setting.inputs()).sample - exact).norm() / exact.norm())


def kernel_names(rank: int, sizes: Sizes, setting: Setting) -> list[str]:
    """A model's kernel before, and its blocks' after, it was chosen by name."""
    model = setting.model()
    apply_sequence_parallel(model, mesh_of(sizes))
    before = model.attention_kernel
    model.set_attention_kernel("sdpa")
    return [before, model.attention_kernel, *{b.self_attn.attend.attend.kernel for b in model.blocks}]


def message_of_misfit(rank: int, sizes: Sizes, segments_of: Setting | None = None) -> str:
    """What is said where a mesh does not fit the run or, on this run's mesh, the model."""
    try:
        mesh = build_mesh(sizes, "cpu")
        assert segments_of is not None
        apply_sequence_parallel(segments_of.model(), mesh)
    except ValueError as error:
        return str(error)
    return ""
