"""Rewards by name, their sum, their failures; a user's own, found by entry point; the grader as a reward."""

import math
import os
import textwrap

import numpy as np
import pytest
import torch

from ospnext.rewards.base import ATTEMPTS, RewardSet, as_parts, check_reward, find_factory
from ospnext.shapes.captions import caption
from ospnext.shapes.render import render
from ospnext.shapes.world import World, sample_scene

PLUGIN = """
    import math, os
    import torch

    calls = 0

    class Tiresome:
        def __init__(self, device, fails=0, parts=False):
            self.fails, self.parts = fails, parts

        def __call__(self, videos, prompts, metadata):
            global calls
            calls += 1
            if calls <= self.fails:
                raise KeyError("not today")
            values = [float(m["mark"]) for m in metadata]
            return {"score": values, "doubled": [2 * v for v in values]} if self.parts else values

        @staticmethod
        def check(fails=0, parts=False):
            if fails < 0:
                raise ValueError(f"fails is {fails}: it must not be negative")

    def deadly(device):
        def reward(videos, prompts, metadata):
            os._exit(3)
        return reward

    def process(device):
        return lambda videos, prompts, metadata: [float(os.getpid())] * len(prompts)

    def broken(device):
        raise RuntimeError("no weights")

    def leaving(device):
        def reward(videos, prompts, metadata):
            raise SystemExit(0)
        return reward
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package with rewards of its own, installed as pip would."""
    (tmp_path / "tiresome.py").write_text(textwrap.dedent(PLUGIN))
    about = tmp_path / "tiresome-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiresome\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[ospnext.rewards]\ntiresome = tiresome:Tiresome\ndeadly = tiresome:deadly\nprocess = tiresome:process\n"
        "broken = tiresome:broken\nleaving = tiresome:leaving\nabsent = tiresome:absent\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import tiresome

    tiresome.calls = 0
    return tiresome


def batch(count: int, frames: int = 4):
    videos = torch.rand(count, frames, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return videos, ["a prompt"] * count, [{"mark": i} for i in range(count)]


def test_a_weighted_sum_with_what_each_says(plugin):
    videos, prompts, metadata = batch(3)
    rewards = RewardSet({"brightness": 2.0, "tiresome": 0.5, "motion": 0.0}, {"tiresome": {"parts": True}})
    total, each = rewards(videos, prompts, metadata)
    assert set(each) == {"brightness", "tiresome", "tiresome.doubled", "motion"}
    torch.testing.assert_close(total, 2 * each["brightness"] + 0.5 * torch.arange(3.0, dtype=torch.float64))
    torch.testing.assert_close(each["brightness"], videos.double().mean((1, 2, 3, 4)), atol=1e-6, rtol=1e-6)
    assert each["tiresome.doubled"].tolist() == [0, 2, 4]


def test_a_failure_is_tried_again_and_counted(plugin):
    rewards = RewardSet({"tiresome": 1.0}, {"tiresome": {"fails": ATTEMPTS - 1}})
    assert rewards(*batch(2)).total.tolist() == [0, 1]
    assert rewards.failures == {"tiresome": ATTEMPTS - 1}


def test_what_fails_for_good_is_no_number_and_ends_nothing(plugin, caplog):
    rewards = RewardSet({"tiresome": 1.0, "motion": 1.0}, {"tiresome": {"fails": 99}})
    total, each = rewards(*batch(2))
    assert all(map(math.isnan, total.tolist()))
    assert each["motion"].isfinite().all()
    assert "reward tiresome failed 3 times on a batch" in caplog.text
    assert "not today" in caplog.text


def test_a_reward_that_exits_has_failed(plugin):
    rewards = RewardSet({"leaving": 1.0})
    assert all(map(math.isnan, rewards(*batch(2)).total.tolist()))
    assert rewards.failures == {"leaving": ATTEMPTS}


def test_a_reward_that_cannot_be_had_is_named(plugin):
    with pytest.raises(ValueError, match="reward 'broken' cannot be made: RuntimeError: no weights"):
        RewardSet({"broken": 1.0})
    with pytest.raises(ValueError, match="reward 'absent' cannot be imported: AttributeError"):
        check_reward("absent", {})


def test_a_reward_of_its_own_process_may_die(plugin):
    rewards = RewardSet({"deadly": 1.0, "process": 0.0}, separate=("deadly", "process"))
    try:
        total, each = rewards(*batch(2))
        assert all(map(math.isnan, total.tolist()))
        assert rewards.failures["deadly"] == ATTEMPTS
        assert set(each["process"].tolist()) != {float(os.getpid())}
    finally:
        rewards.close()


def test_names_and_options_are_checked_before_anything_is_made(plugin):
    with pytest.raises(ValueError, match="reward 'brightnes' is not known; did you mean 'brightness'"):
        check_reward("brightnes", {})
    with pytest.raises(ValueError, match="fails is -1"):
        check_reward("tiresome", {"fails": -1})
    check_reward("tiresome", {"fails": 1})
    with pytest.raises(ValueError, match=r"reward_config.options.shapes: got an unexpected keyword argument 'worker'"):
        check_reward("shapes", {"worker": 2})
    check_reward("motion", {})


def test_one_number_for_each_video():
    assert as_parts(torch.ones(2, 1), 2)["score"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"3 numbers \(score\) for 2 videos"):
        as_parts([1.0, 2.0, 3.0], 2)
    with pytest.raises(ValueError, match="must name score"):
        as_parts({"part": [1.0]}, 1)


def test_simple_rewards_say_what_they_say():
    def said(name: str, video: torch.Tensor) -> float:
        (value,) = find_factory(name)()(video[None], [""], [{}])
        return float(value)

    still = torch.rand(1, 3, 8, 8).expand(6, 3, 8, 8)
    moving = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    jumping = (torch.arange(6) % 2).float().view(6, 1, 1, 1).expand(6, 3, 8, 8)
    assert said("brightness", jumping) == 0.5
    assert said("motion", still) == 0
    assert said("motion", moving) == pytest.approx(0.2)
    assert said("flicker", still) == 1
    assert said("flicker", moving) == pytest.approx(1)
    assert said("flicker", jumping) == -1
    assert said("sharpness", moving) == 0
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert said("sharpness", checks.float().expand(6, 3, 8, 8)) == 4
    assert said("motion", still[:1]) == 0
    assert said("flicker", still[:2]) == 1


def test_the_grader_rewards_what_was_asked():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, World.large(), held_out=False) for _ in range(3)]
    prompts, metadata = [caption(s, rng) for s in scenes], [{"scene": s.to_dict()} for s in scenes]
    videos = render(scenes, 33, 128, 128).permute(0, 1, 4, 2, 3).float() / 255
    rewards = RewardSet({"shapes": 1.0}, {"shapes": {"workers": 1}})
    right = rewards(videos, prompts, metadata)
    assert right.total.tolist() == [1, 1, 1]
    assert right.each["shapes.everything"].tolist() == [1, 1, 1]
    turned = rewards(videos.roll(1, 0), prompts, metadata)
    assert turned.total.max() < 1
    assert turned.each["shapes.count"].tolist() == [1, 1, 1]
    grey = rewards(torch.full_like(videos, 0.5), prompts, metadata)
    assert grey.total.tolist() == [0, 0, 0]
    lost = rewards(videos, prompts, [{}] * 3)
    assert lost.total.isnan().all()


def test_a_soft_mark_of_the_shape_tells_videos_apart_that_are_right_and_wrong_alike():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, World.large(), held_out=False) for _ in range(3)]
    metadata = [{"scene": s.to_dict()} for s in scenes]
    videos = render(scenes, 33, 128, 128).permute(0, 1, 4, 2, 3).float() / 255
    blurred = torch.nn.functional.avg_pool2d(videos.flatten(0, 1), 9, 1, 4, count_include_pad=False).view_as(videos)
    hard, soft = (
        RewardSet({"shapes": 1.0}, {"shapes": {"workers": 1, **options}})
        for options in ({}, {"shape_softness": 0.05, "all_right": 0.5})
    )
    sharp, dull = (soft(clips, [""] * 3, metadata) for clips in (videos, blurred))
    assert (dull.total < sharp.total).all()
    assert sharp.total.max() < 1
    for videos_, scored in ((videos, sharp), (blurred, dull)):
        plain = hard(videos_, [""] * 3, metadata).each
        others = plain["shapes.count"] + plain["shapes.colour"] + plain["shapes.motion"]
        shape = torch.sigmoid(scored.each["shapes.shape_margin"] / 0.05)
        assert torch.equal((shape > 0.5).double(), plain["shapes.shape"].double())
        share, everything = (others + shape) / 4, (others == 3) * shape
        assert scored.each["shapes.shape_margin"].isfinite().all()
        torch.testing.assert_close(scored.total.double(), (0.5 * share + 0.5 * everything).double())


def test_the_hardest_of_soft_marks_is_right_or_wrong():
    scene = sample_scene(np.random.default_rng(2), World.large(), held_out=False)
    right = render([scene], 33, 128, 128).permute(0, 1, 4, 2, 3).float() / 255
    rewards = RewardSet({"shapes": 1.0}, {"shapes": {"workers": 1, "shape_softness": 1e-300}})
    scored = rewards(torch.cat([right, torch.full_like(right, 0.5)]), [""] * 2, [{"scene": scene.to_dict()}] * 2)
    assert scored.total.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"all_right": 1.5}, r"all_right is 1.5: it must be a share"),
        ({"all_right": "half"}, r"all_right is 'half': it must be a share"),
        ({"shape_softness": 0}, r"shape_softness is 0: it must be an overlap above 0, such as 0\.05"),
        ({"shape_softness": math.nan}, r"shape_softness is nan"),
        ({"shape_softness": "soft"}, r"shape_softness is 'soft'"),
        ({"workers": 0}, r"workers is 0: it must be a whole number of processes"),
        ({"workers": 2.0}, r"workers is 2\.0"),
        ({"workers": "all"}, r"workers is 'all'"),
    ],
)
def test_numbers_of_the_grader_that_will_not_do_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        check_reward("shapes", options)
