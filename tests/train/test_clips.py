"""Clips as training data: the same from the same seed, never held out, with the captions they should have."""

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from ospnext.data.sampler import Draw, Sampler
from ospnext.models.video_vae import encode_video
from ospnext.shapes.render import render
from ospnext.shapes.world import is_held_out
from ospnext.train.clips import ClipSize, LatentClips, random_crops, render_pool, sample_scenes, to_video
from ospnext.train.feed import RenderedFeed
from ospnext.train.settings import NoiseConfig

CPU = torch.device("cpu")
SIZE = ClipSize(5, 32, 48)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("world", ["large", "simple", "full", "both"])
def test_training_never_sees_what_is_held_out(world):
    scenes = sample_scenes(world, 150, seed=3)
    assert len(scenes) == 150
    assert not any(is_held_out(scene) for scene in scenes)
    assert scenes == sample_scenes(world, 150, seed=3)
    assert scenes != sample_scenes(world, 150, seed=4)


def test_both_worlds_by_halves():
    scenes = sample_scenes("both", 60, seed=0)
    assert all(len(scene.things) == 1 and scene.background.pattern == "plain" for scene in scenes[:30])
    assert any(len(scene.things) > 1 for scene in scenes[30:])
    assert {thing.size for scene in sample_scenes("large", 40, 0) for thing in scene.things} <= {"large", "small"}


def test_a_pool_is_its_scenes_whatever_the_chunk():
    scenes = sample_scenes("both", 7, seed=1)
    pool = render_pool(scenes, SIZE, CPU, chunk=3)
    assert pool.shape == (7, 5, 32, 48, 3)
    assert pool.dtype == torch.uint8
    assert torch.equal(pool, render(scenes, 5, 32, 48))
    assert torch.equal(pool, render_pool(scenes, SIZE, CPU, chunk=64))


def test_video_is_in_minus_one_to_one():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 5, 4, 6, 3)
    video = to_video(frames)
    assert video.shape == (2, 3, 5, 4, 6)
    assert video[0, :, 0, 0, 0].tolist() == pytest.approx([-1, -0.6, 1])


def test_crops_are_windows_of_the_pool():
    pool = torch.randint(256, (3, 5, 24, 32, 3), dtype=torch.uint8, generator=generator())
    crops = random_crops(pool, 40, 16, generator(1))
    assert crops.shape == (40, 3, 5, 16, 16)
    windows = to_video(pool).unfold(3, 16, 1).unfold(4, 16, 1)  # [clip, 3, T, y, x, 16, 16]
    seen = set()
    for crop in crops:
        same = (windows[:, :, 0, :, :, 0, 0] == crop[:, 0, 0, 0][None, :, None, None]).all(1)
        places = [place for place in same.nonzero().tolist() if torch.equal(windows[place[0], :, :, *place[1:]], crop)]
        assert len(places) == 1
        seen.add(tuple(places[0]))
    clips, ys, xs = (set(axis) for axis in zip(*seen, strict=True))
    assert clips == {0, 1, 2}
    assert (min(ys), max(ys)) == (0, 8)  # every place is possible, none leaves the frame
    assert max(xs) <= 16


def test_crops_repeat_with_their_generator_and_can_be_whole_frames():
    pool = torch.randint(256, (3, 5, 16, 16, 3), dtype=torch.uint8, generator=generator())
    assert torch.equal(random_crops(pool, 6, 8, generator(2)), random_crops(pool, 6, 8, generator(2)))
    whole = random_crops(pool, 6, 16, generator(2))
    assert all(any(torch.equal(clip, one) for one in to_video(pool)) for clip in whole)


@pytest.fixture
def data(tiny_vae) -> LatentClips:
    scenes = sample_scenes("simple", 6, seed=0)
    return LatentClips(tiny_vae, ByT5Tokenizer(), scenes, SIZE, 0, 128, 0.25, CPU, captions_per_clip=3)


def test_latents_are_those_of_the_pipelines_encoder(data, tiny_vae):
    scenes = sample_scenes("simple", 6, seed=0)
    expected = encode_video(tiny_vae, to_video(render(scenes, 5, 32, 48)))
    assert data.latents.shape == (6, 4, 2, 4, 6)
    torch.testing.assert_close(data.latents, expected, atol=1e-5, rtol=1e-4)


def test_what_is_prepared_does_not_count_as_taken(data):
    def feed() -> RenderedFeed:
        return RenderedFeed(data, Sampler([np.arange(6)], 4, seed=1), 0, NoiseConfig())

    plain, eager = feed(), feed()
    for _ in range(4):
        eager.prepare()
        eager.prepare()
        assert eager.state_dict() == plain.state_dict()
        for one, other in zip(eager.take().noisy, plain.take().noisy, strict=True):
            assert torch.equal(one, other)
        assert eager.state_dict() == plain.state_dict()
    before = plain.state_dict()
    eager.prepare()
    expected = eager.take()
    eager.prepare()
    eager.load_state_dict(before)
    assert torch.equal(eager.take().noisy.x_t, expected.noisy.x_t)


def draws(count: int, epoch: int = 0) -> list[Draw]:
    """So many draws of the six clips, epoch after epoch."""
    return [Draw(epoch + i // 6, i % 6, 0) for i in range(count)]


def test_samples_pair_a_clip_with_its_captions(data):
    latents, tokens = data.take(draws(400), 3)
    assert latents.dtype == torch.float32
    assert tokens.dtype == torch.int64
    assert tokens.shape == (400, 128)
    clips = [next(i for i, one in enumerate(data.latents) if torch.equal(one, latent)) for latent in latents]
    assert set(clips) == set(range(6))
    for clip, row in zip(clips, tokens, strict=True):
        own = [data.empty, *data.tokens[clip]]
        assert any(torch.equal(row, option.long()) for option in own)


def test_dropped_captions_are_the_empty_ones_tokens(data):
    tokenizer = ByT5Tokenizer()
    empty = tokenizer("", padding="max_length", max_length=128, return_tensors="pt").input_ids[0]
    assert torch.equal(data.empty.long(), empty)
    assert (empty != tokenizer.pad_token_id).sum() == 1  # its end mark is left to attend to
    _, tokens = data.take(draws(2000), 4)
    dropped = (tokens == empty).all(1).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.04)
    data.drop = 1.0
    assert (data.take(draws(50), 0)[1] == empty).all()
    data.drop = 0.0
    assert not (data.take(draws(50), 0)[1] == empty).all(1).any()


def test_a_sample_is_a_function_of_seed_epoch_and_clip(data):
    some = draws(30)
    latents, tokens = data.take(some, 5)
    for i in (0, 11, 29):
        one = data.take([some[i]], 5)
        assert torch.equal(one[0][0], latents[i])
        assert torch.equal(one[1][0], tokens[i])
    assert not torch.equal(data.take(some, 6)[1], tokens)
    assert not torch.equal(data.take(draws(30, 1), 5)[1], tokens)


def test_captions_that_are_cut_are_counted(tiny_vae, capsys):
    scenes = sample_scenes("simple", 6, seed=0)
    LatentClips(tiny_vae, ByT5Tokenizer(), scenes, SIZE, 0, 121, 0.1, CPU)  # 120 bytes and the end mark
    assert "note" not in capsys.readouterr().out
    LatentClips(tiny_vae, ByT5Tokenizer(), scenes, SIZE, 0, 16, 0.1, CPU)
    assert "12 of 12 captions are longer than text_len 16" in capsys.readouterr().out
