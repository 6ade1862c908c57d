"""The loader on real files: right pictures, exact resumption whatever the workers and ranks, small cost of damage."""

import logging
import os
import time
from pathlib import Path

import psutil
import pytest
import torch
from corpus import Clip, Corpus, frame_number, write
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import ByT5Tokenizer

from ospnext.data.buckets import Bucket
from ospnext.data.dataset import MOST_TRIES, Batch, Collate, DataError, SampleSettings
from ospnext.data.guard import Guard, Stuck
from ospnext.data.loader import Loader, open_loader
from ospnext.data.records import ClipRecord, Crop
from ospnext.data.sampler import Steps
from ospnext.data.store import write_store
from ospnext.media import read_video

SETTINGS = SampleSettings((Bucket(5, 96, 128),), train_fps=16, seed=3, timeout=20)
NAMES = ("h264.mp4", "h265_10bit.mp4", "h264_one_keyframe.mp4", "vp9.webm", "variable.mp4", "audio.mp4", "ntsc.mp4")


def record(path: Path, clip: Clip, **changes: object) -> ClipRecord:
    values = {"height": clip.height, "width": clip.width, "fps": clip.fps, "num_frames": clip.frames}
    return ClipRecord(str(path), (f"A {clip.name} film", "another"), **(values | changes))


@pytest.fixture(scope="module")
def sound(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of sound clips, all of one shape."""
    folder = tmp_path_factory.mktemp("sound")
    write_store(folder, [record(corpus.path(name), corpus.videos[name].clip) for name in NAMES])
    return folder


def loader(store: Path | None, settings: SampleSettings = SETTINGS, batch_size: int = 2, **changes) -> Loader:
    values = {"dataset_name": "wan_t2v", "metafile_or_dir_path": store and str(store), "text_len": 24} | changes
    return open_loader(settings=settings, tokenizer=ByT5Tokenizer(), batch_size=batch_size, **values)


def take(source: Loader, steps: int) -> list[Batch]:
    batches = []
    for batch in source if steps else ():
        batches.append(batch)
        if len(batches) == steps:
            break
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.clips == y.clips and x.captions == y.captions and torch.equal(x.video, y.video) and torch.equal(x.ids, y.ids)
        for x, y in zip(a, b, strict=True)
    )


def test_batches_hold_the_right_frames_and_tokens(sound: Path, corpus: Corpus) -> None:
    firsts = set()
    for batch in take(loader(sound, batch_size=3), 12):
        assert batch.video.shape == (3, 3, 5, 96, 128)
        assert batch.video.dtype == torch.uint8
        pixels = batch.pixel_values()
        assert pixels.dtype == torch.float32
        assert -1 <= pixels.min() < -0.7 < 0.7 < pixels.max() <= 1
        for video, clip, caption in zip(batch.video, batch.clips, batch.captions, strict=True):
            numbers = [frame_number(frame.permute(1, 2, 0).numpy()) for frame in video.unbind(1)]
            interval = corpus.videos[NAMES[clip]].clip.fps / 16
            assert all(abs(n - numbers[0] - i * interval) < 1 for i, n in enumerate(numbers))
            firsts.add(numbers[0])
            assert caption in ("", "another", "a film", "a vp9.webm film", "a vp9. webm film")
        tokens = ByT5Tokenizer()(batch.captions, padding="max_length", max_length=24, truncation=True)
        assert batch.ids.tolist() == tokens.input_ids
        assert batch.mask.tolist() == tokens.attention_mask
    assert len(firsts) > 10


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_resumed_equals_uninterrupted(sound: Path, done: int) -> None:
    whole = take(loader(sound), 8)
    first = loader(sound)
    head = take(first, done)
    second = loader(sound)
    second.load_state_dict(first.state_dict())
    assert same(head + take(second, 8 - done), whole)


def test_workers_change_nothing_and_read_ahead_unseen(sound: Path) -> None:
    torch.manual_seed(0)
    whole = take(loader(sound), 7)
    first = loader(sound, num_workers=2)
    head = take(first, 3)
    second = loader(sound)
    second.load_state_dict(first.state_dict())
    assert same(head + take(second, 4), whole)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))  # none of the training's random numbers were used


def test_another_number_of_ranks_reads_the_very_next_samples(sound: Path) -> None:
    def videos(sources: list[Loader], steps: int) -> list[torch.Tensor]:
        batches = [take(source, steps) for source in sources]
        return [video for step in zip(*batches, strict=True) for batch in step for video in batch.video]

    whole = videos([loader(sound, batch_size=1)], 6)
    two = [loader(sound, batch_size=1, rank=rank, world=2) for rank in range(2)]
    head = videos(two, 2)
    assert two[0].state_dict() == two[1].state_dict()
    one = loader(sound, batch_size=1)
    one.load_state_dict(two[1].state_dict())
    tail = videos([one], 2)
    assert all(torch.equal(a, b) for a, b in zip(head + tail, whole, strict=True))


def stateful(store: Path, batch_size: int, rank: int, world: int, workers: int) -> StatefulDataLoader:
    source = loader(store, batch_size=batch_size, rank=rank, world=world)
    context = "forkserver" if workers else None
    return StatefulDataLoader(
        source.dataset,
        batch_sampler=Steps(source.sampler),
        collate_fn=Collate(ByT5Tokenizer(), 24),
        num_workers=workers,
        multiprocessing_context=context,
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_stateful_loader_resumes_too(sound: Path, workers: int) -> None:
    whole = take(loader(sound, batch_size=1), 6)
    rank = stateful(sound, 1, 0, 2, workers)
    batches = iter(rank)
    head = [next(batches) for _ in range(2)]
    assert same(head, whole[:4:2])
    one = stateful(sound, 1, 0, 1, workers)  # goes on alone from what one of two ranks saved
    one.load_state_dict(rank.state_dict())
    batches = iter(one)
    assert same([next(batches) for _ in range(2)], whole[4:])


def test_a_state_of_other_data_is_refused(sound: Path, corpus: Corpus, tmp_path: Path) -> None:
    write_store(tmp_path, [record(corpus.path("h264.mp4"), corpus.videos["h264.mp4"].clip)] * 7)
    with pytest.raises(ValueError, match="name the data of the first run"):
        loader(tmp_path).load_state_dict(loader(sound).state_dict())


def damaged_store(corpus: Corpus, folder: Path) -> Path:
    clip = corpus.videos["h264.mp4"].clip
    paths = [
        corpus.path(name) for name in ("truncated.mp4", "holes.mp4", "zero_bytes.mp4", "text.mp4", "only_audio.mp4")
    ]
    bad = [record(path, clip) for path in [*paths, folder / "nowhere.mp4"]]
    lies = [record(corpus.path("h264.mp4"), clip, height=64), record(corpus.path("h264.mp4"), clip, num_frames=480)]
    write_store(folder, [*bad, *lies, *[record(corpus.path(name), corpus.videos[name].clip) for name in NAMES]])
    return folder


def test_damaged_clips_are_counted_named_once_and_replaced_the_same_way(
    corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = damaged_store(corpus, tmp_path)
    source = loader(store, batch_size=3)
    with caplog.at_level(logging.WARNING):
        whole = take(source, 15)
    assert {clip for batch in whole for clip in batch.clips} <= {
        0,
        1,
        *range(7, 15),
    }  # some windows of 0, 1 and 7 are sound
    statistics = source.statistics
    assert statistics.samples == 45
    assert statistics.replaced == sum(statistics.reasons.values()) > 15
    assert set(statistics.reasons) <= {"missing", "unreadable", "undecodable", "no_video", "truncated"}
    named = [message for message in caplog.messages if "is replaced" in message]
    assert len(named) == len(statistics.bad) >= 6
    resumed = loader(store, batch_size=3, num_workers=1)
    resumed.load_state_dict(loader_state(store, 4))
    assert same(take(resumed, 5), whole[4:9])


def loader_state(store: Path, steps: int) -> dict:
    source = loader(store, batch_size=3)
    take(source, steps)
    return source.state_dict()


def test_a_store_of_damaged_clips_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    write_store(tmp_path, [record(tmp_path / f"{i}.mp4", corpus.videos["h264.mp4"].clip) for i in range(40)])
    for workers in (0, 1):
        with pytest.raises(DataError, match=rf"{MOST_TRIES} clips in a row") as caught:
            take(loader(tmp_path, num_workers=workers), 1)
        assert "\n" not in str(caught.value)  # no worker's traceback


def test_a_stuck_read_costs_its_timeout_and_no_more(corpus: Corpus, tmp_path: Path) -> None:
    stuck = tmp_path / "stuck.mp4"
    os.mkfifo(stuck)  # opening it waits for a writer that never comes
    clip = corpus.videos["h264.mp4"].clip
    write_store(tmp_path, [record(stuck, clip), record(corpus.path("h264.mp4"), clip)])
    settings = SampleSettings((Bucket(5, 96, 128),), timeout=4, seed=3)
    source = loader(tmp_path, settings, batch_size=1, num_workers=1)
    batches = take(source, 6)
    assert [batch.clips for batch in batches] == [[1]] * 6
    assert source.statistics.reasons["timeout"] >= 1
    os.close(os.open(stuck, os.O_RDWR | os.O_NONBLOCK))


def test_a_worker_that_is_killed_ends_the_run_in_one_line(sound: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    source = loader(sound, num_workers=1)
    batches = iter(source)
    next(batches)
    workers = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    for worker in workers:
        if not worker.children() and "forkserver" in " ".join(worker.cmdline()):
            worker.kill()
    with pytest.raises(DataError, match="a process that reads clips died") as caught:
        [next(batches) for _ in range(10)]  # it had read ahead
    assert "\n" not in str(caught.value)


def test_guard_goes_on_after_a_stuck_call() -> None:
    guard = Guard()
    with pytest.raises(Stuck):
        guard.call(lambda: time.sleep(5), 0.05)
    assert guard.call(lambda: 7, 1) == 7
    assert guard.left_behind == 1
    with pytest.raises(KeyError):
        guard.call(lambda: {}[0], 1)


def test_buckets_give_one_shape_a_batch_on_all_ranks(corpus: Corpus, tmp_path: Path) -> None:
    names = [*NAMES, "rotated_90.mp4", "rotated_270.mp4"] * 3
    write_store(
        tmp_path,
        [record(corpus.path(name), corpus.videos[name].clip, num_frames=40 - i) for i, name in enumerate(names)],
    )
    settings = SampleSettings((Bucket(5, 96, 128), Bucket(5, 128, 96), Bucket(17, 48, 64)), train_fps=16, seed=1)
    ranks = [loader(tmp_path, settings, 1, rank=rank, world=2) for rank in range(2)]
    shapes = set()
    for batches in zip(*(take(rank, 12) for rank in ranks), strict=True):
        assert len({tuple(batch.video.shape) for batch in batches}) == 1
        shapes.add(tuple(batches[0].video.shape[2:]))
    assert len(shapes) >= 2


def test_noise_is_loud_refused_beside_videos_and_the_same_every_time(
    sound: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source = loader(None, dataset_name="t2v_random")
    assert "THE DATA IS NOISE" in caplog.text
    whole = take(source, 3)
    assert whole[0].captions == ["", ""]
    assert 60 < whole[0].video.float().mean() < 190
    resumed = loader(None, dataset_name="t2v_random")
    resumed.load_state_dict(loader(None, dataset_name="t2v_random").state_dict())
    assert same(take(resumed, 3), whole)
    with pytest.raises(ValueError, match="saved with data of another kind"):
        resumed.load_state_dict({})  # rendered clips', which no store has
    with pytest.raises(ValueError, match="set dataset_name=wan_t2v"):
        loader(sound, dataset_name="t2v_random")
    with pytest.raises(ValueError, match="metafile_or_dir_path is missing"):
        loader(None)
    with pytest.raises(ValueError, match="use wan_t2v"):
        loader(None, dataset_name="else")


def test_captions_are_dropped_as_asked(sound: Path) -> None:
    every = SampleSettings((Bucket(1, 16, 16),), text_drop_ratio=1.0)
    assert {text for batch in take(loader(sound, every), 6) for text in batch.captions} == {""}
    none = SampleSettings((Bucket(1, 16, 16),), text_drop_ratio=0.0)
    assert "" not in {text for batch in take(loader(sound, none), 6) for text in batch.captions}


def test_cut_clips_and_crops(corpus: Corpus, tmp_path: Path) -> None:
    clip = write(Clip("a.mp4", options={"preset": "veryfast", "crf": "16", "g": "12"}), tmp_path / "a.mp4")
    kind = Clip("a.mp4")
    write_store(tmp_path, [record(clip, kind, start=20, num_frames=10, crop=Crop(16, 112, 8, 88), fps=16)])
    settings = SampleSettings((Bucket(10, 80, 96),), seed=0)
    video = take(loader(tmp_path, settings, 1), 1)[0].video[0]
    whole = torch.from_numpy(read_video(clip).frames)[20:30, 8:88, 16:112].permute(3, 0, 1, 2)
    assert torch.equal(video, whole)
