"""How a step changes weights: schedule, groups of AdamW, moving average, clipping."""

import math

import pytest
import torch
from torch import nn

from ospnext.models.transformer import OSPNextTransformer3DModel
from ospnext.parallel.fsdp import clip_gradients, gradient_norm, scale_gradients
from ospnext.train.optim import MovingAverage, adamw, learning_rate, moments
from ospnext.train.video_vae import VAEArchitecture


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_linear_and_never_zero(schedule):
    rates = [learning_rate(step, 0.8, schedule, 4, 100) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])


def test_constant_and_cosine_after_warm_up():
    assert learning_rate(99, 0.5, "constant", 10, 100) == 0.5
    rates = [learning_rate(step, 0.5, "cosine", 20, 120) for step in (20, 45, 70, 95, 120, 500)]
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1, 1)])
    assert rates == sorted(rates, reverse=True)


def test_a_run_without_warm_up_or_shorter_than_it():
    assert learning_rate(0, 0.5, "cosine", 0, 10) == 0.5
    assert learning_rate(4, 0.5, "cosine", 10, 5) == 0.25
    assert learning_rate(10, 0.5, "cosine", 10, 10) == 0.5  # no division by nothing


def test_decay_is_for_matrices_and_kernels_only():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 2, 1))
    module.register_parameter("frozen", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    decayed, plain = adamw({"m": module}, 0.1, (0.9, 0.99), 1e-8, 0.05).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert [p.shape for p in decayed["params"]] == [(4, 3), (2, 4, 1, 1)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]


def test_norms_and_modulations_do_not_decay_whatever_their_shape():
    vae = VAEArchitecture(base_dim=8).build()
    transformer = OSPNextTransformer3DModel(dim=24, num_heads=2, num_layers=1, ffn_dim=24, text_dim=8, freq_dim=8)
    plain = adamw({"vae": vae, "transformer": transformer}, 0.1, (0.9, 0.99), 1e-8, 0.05).param_groups[1]["params"]
    names = {id(p): name for m in (vae, transformer) for name, p in m.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in plain} >= {"gamma", "modulation", "bias"}
    decayed = set(names) - {id(p) for p in plain}
    assert all(names[key].endswith("weight") and "norm" not in names[key] for key in decayed)


def test_decay_shrinks_the_decayed_alone():
    module = nn.Linear(2, 2)
    optimiser = adamw({"m": module}, 0.1, (0.9, 0.99), 1e-8, 0.5)
    before = [p.detach().clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    assert torch.allclose(module.weight, before[0] * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, before[1])


def test_moving_average_is_its_formula():
    module = nn.Linear(3, 2).double()
    average = MovingAverage({"m": module}, decay=0.3)
    expected = module.weight.detach().float().clone()
    for n in range(8):
        with torch.no_grad():
            module.weight.normal_()
        decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 0.18, 0.25, 0.3, 0.3, ...
        expected = decay * expected + (1 - decay) * module.weight.detach().float()
        average.update()
        torch.testing.assert_close(average.shadow["m.weight"], expected)
    assert average.updates == 8
    assert average.shadow["m.weight"].dtype == torch.float32


def test_swapping_twice_changes_nothing():
    module = nn.Linear(3, 2)
    average = MovingAverage({"m": module}, decay=0.9)
    with torch.no_grad():
        module.weight.add_(1)
    live, shadow = module.weight.detach().clone(), average.shadow["m.weight"].clone()
    average.swap()
    assert torch.equal(module.weight, shadow)
    assert torch.equal(average.shadow["m.weight"], live)
    average.swap()
    assert torch.equal(module.weight, live)
    assert torch.equal(average.shadow["m.weight"], shadow)


def test_frozen_parameters_are_not_averaged():
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert list(MovingAverage({"m": module}, 0.9).shadow) == ["m.weight"]


def test_clipping_returns_the_norm_there_was():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([p], 1.0).item() == pytest.approx(5.0)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-4)
    assert clip_gradients([p], 10.0).item() == pytest.approx(1.0, rel=1e-4)
    assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-4)


def test_norm_and_scale_are_clipping_in_two_steps():
    module = nn.Linear(3, 2)
    parameters = list(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    gradients = [p.grad.clone() for p in parameters]
    norm = gradient_norm(parameters)
    scale_gradients(parameters, 0.5 / norm.item())
    halved = [p.grad.clone() for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    assert torch.equal(clip_gradients(parameters, 0.5), norm)
    for p, expected in zip(parameters, halved, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_moments_that_are_made_beforehand_change_nothing():
    states = []
    for early in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(3, 2)
        optimiser = adamw({"m": module}, 0.1, (0.9, 0.99), 1e-8, 0.5)
        if early:
            assert moments(optimiser, dict(module.named_parameters())).keys() == {"weight", "bias"}
        for _ in range(3):
            module(torch.ones(1, 3)).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        states.append([*module.parameters(), *(v for p in module.parameters() for v in optimiser.state[p].values())])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
