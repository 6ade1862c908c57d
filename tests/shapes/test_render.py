"""Rendering: shapes of the promised area and reach, smooth edges, the same clip at any size, chunk or company."""

import numpy as np
import pytest
import torch

from ospnext.shapes import render as rendering
from ospnext.shapes.render import render, signed_distance
from ospnext.shapes.scene import BACKGROUNDS, COLOURS, REACH, Background, Scene, Thing, tracks
from ospnext.shapes.world import World, sample_scene


def scenes(count: int, world: World = World.full(), seed: int = 0) -> list[Scene]:  # noqa: B008
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, world) for _ in range(count)]


@pytest.mark.parametrize("shape", list(REACH))
def test_shapes_stand_on_their_centroid_and_keep_within_their_reach(shape: str) -> None:
    line = torch.linspace(-2, 2, 401)
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = signed_distance(shape, x, y) < 0
    assert 2 < inside.float().mean() * 16 < 3.5
    assert abs(x[inside].mean()) < 0.02
    assert abs(y[inside].mean()) < 0.02
    assert 0.96 * REACH[shape] < torch.hypot(x, y)[inside].max() <= REACH[shape]


def overlap(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one & two).sum() / (one | two).sum())


def test_no_shape_passes_for_another_at_any_angle_or_size() -> None:
    line = torch.linspace(-2, 2, 161)
    y, x = torch.meshgrid(line, line, indexing="ij")
    for one in REACH:
        upright = signed_distance(one, x, y) < 0
        for two in REACH:
            if one == two:
                continue
            best = 0.0
            for angle in torch.linspace(0, 2 * torch.pi, 36):
                u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
                for scale in (0.8, 0.9, 1.0, 1.1, 1.25):
                    best = max(best, overlap(upright, signed_distance(two, u * scale, v * scale) < 0))
            assert best < (0.86 if {one, two} == {"circle", "square"} else 0.78), (one, two, best)


def test_clips_are_uint8_and_the_same_alone_or_in_company() -> None:
    chosen = scenes(6)
    together = render(chosen, frames=5)
    assert together.shape == (6, 5, 128, 128, 3)
    assert together.dtype == torch.uint8
    for index in range(6):
        alone = render(chosen[index : index + 1], frames=5)[0]
        assert (alone.int() - together[index].int()).abs().max() <= 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = scenes(5, seed=1)
    whole = render(chosen, frames=3)
    monkeypatch.setattr(rendering, "CHUNK_PIXELS_CPU", 2 * 3 * 128 * 128)
    assert (render(chosen, frames=3).int() - whole.int()).abs().max() <= 1


def test_a_thing_is_where_its_path_says_in_its_colour() -> None:
    for scene in scenes(20, World.simple(), seed=2):
        thing = scene.things[0]
        clip = render([scene], frames=5)[0].float()
        path = tracks([thing], 5)
        background = torch.tensor(BACKGROUNDS[scene.background.colour]).float()
        colour = torch.tensor(COLOURS[thing.colour]).float() - background
        cover = (((clip - background) @ colour) / colour.square().sum()).clamp(0, 1)
        cover = cover * (cover > 0.5)
        y, x = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(128) + 0.5, indexing="ij")
        for t in range(5):
            centre = torch.stack([(cover[t] * x).sum(), (cover[t] * y).sum()]) / cover[t].sum()
            assert abs(centre[0] - path.x[0, t]) < 1
            assert abs(centre[1] - path.y[0, t]) < 1


def test_the_world_fills_any_frame_alike() -> None:
    chosen = scenes(3, World.simple(), seed=3)
    small = render(chosen, frames=3).float()
    large = render(chosen, frames=3, height=256, width=256).float()
    halved = torch.nn.functional.avg_pool2d(large.flatten(0, 1).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (halved - small.flatten(0, 1)).abs().mean() < 0.5
    wide = render(chosen, frames=3, height=128, width=192)
    assert (wide[:, :, :, 32:-32].int() - small.int()).abs().max() <= 1
    assert render(chosen, frames=1, height=33, width=47).shape == (3, 1, 33, 47, 3)


def test_edges_are_smooth() -> None:
    thing = Thing("circle", "red", "large", "still", 64, 64, 19)
    red = render([Scene((thing,), Background("plain", "black"))], frames=1)[0, 0, :, :, 0].int()
    between = ((red > 40) & (red < 160)).sum()
    assert 0.5 < between / (2 * torch.pi * 19) < 2  # about a pixel wide, all the way round


def test_a_pan_moves_the_background_and_a_resting_thing_together() -> None:
    thing = Thing("star", "red", "small", "still", 64, 64, 12)
    clip = render([Scene((thing,), Background("dots", "beige"), pan="right")], frames=29)[0].int()
    inner = clip[0, :, 28:], clip[-1, :, :-28]  # 28 pixels in 28 steps
    assert (inner[0] - inner[1]).abs().max() <= 2


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        render([])
    with pytest.raises(ValueError, match="nothing to draw"):
        render(scenes(1), frames=0)
