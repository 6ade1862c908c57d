"""Video files, GIFs and contact sheets, written and read back."""

from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ospnext.media import animated_gif, contact_sheet, read_video, video_writer, write_video


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    clip = np.full((frames, height, width, 3), (230, 40, 30), np.uint8)
    for t in range(frames):
        clip[t, 16:32, 4 * t : 4 * t + 16] = (30, 90, 230)
    return clip


@pytest.mark.parametrize("fps", [16, 8.5, 23.976])
def test_clips_come_back_with_their_colours_and_rate(tmp_path: Path, fps: float) -> None:
    clip = moving_square()
    write_video(tmp_path / "clip.mp4", torch.from_numpy(clip), fps, crf=8)
    video = read_video(tmp_path / "clip.mp4")
    assert video.frames.shape == clip.shape
    assert video.frames.dtype == np.uint8
    assert video.fps == pytest.approx(fps, rel=1e-3)
    assert np.abs(video.frames.astype(int) - clip).mean() < 4
    assert np.abs(video.frames[4, 4, 60].astype(int) - (230, 40, 30)).max() < 5


def test_files_are_plain_bt709_h264(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_square())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_an_odd_side_grows_by_a_pixel(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_square(height=33, width=63), crf=8)
    frames = read_video(tmp_path / "clip.mp4").frames
    assert frames.shape == (9, 34, 64, 3)
    assert np.abs(frames[:, 33].astype(int) - frames[:, 32]).mean() < 4


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (2, 3, 8, 8)])
def test_frames_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "clip.mp4", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="float64"):
        write_video(tmp_path / "clip.mp4", np.zeros((2, 8, 8, 3)))
    assert not list(tmp_path.iterdir())


def test_a_broken_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="shape"), video_writer(path, 48, 64) as writer:
        writer.add(moving_square()[0, :, :, :2])
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == before


def test_files_that_are_no_video_are_named(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        read_video(tmp_path / "noise.mp4")
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(OSError):
        write_video(tmp_path / "no folder" / "clip.mp4", moving_square())


def opened(gif: bytes) -> tuple[np.ndarray, list[float]]:
    """Frames and how long each is shown, in milliseconds."""
    frames, durations = [], []
    with Image.open(BytesIO(gif)) as file:
        assert (file.format, file.info["loop"]) == ("GIF", 0)
        for i in range(file.n_frames):
            file.seek(i)
            frames.append(np.asarray(file.convert("RGB")))
            durations.append(file.info["duration"])
    return np.stack(frames), durations


def test_a_small_gif_is_the_clip_itself() -> None:
    clip = moving_square()
    frames, durations = opened(animated_gif(torch.from_numpy(clip), fps=10))
    assert np.array_equal(frames, clip)  # so few colours are kept
    assert durations == [100] * 9


@pytest.mark.parametrize(("height", "width", "small"), [(288, 512, (144, 256)), (600, 30, (256, 13))])
def test_a_large_gif_is_scaled_down_and_lasts_as_long(height: int, width: int, small: tuple[int, int]) -> None:
    clip = np.zeros((81, height, width, 3), np.uint8)
    clip[:] = (3 * np.arange(81))[:, None, None, None]
    frames, durations = opened(animated_gif(clip, fps=16))
    assert frames.shape == (24, *small, 3)
    assert (frames[0].max(), frames[-1].min()) == (0, 240)
    assert sum(durations) == pytest.approx(81 / 16 * 1000, abs=24 * 5)


def test_contact_sheets_hold_the_frames_in_rows(tmp_path: Path) -> None:
    clip = moving_square(7)
    contact_sheet(clip, tmp_path / "sheet.png", columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 50, 3 * 66, 3)
    assert (sheet[51:99, 67:131] == clip[4]).all()
    assert (sheet[100:, 66:] == 255).all()
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="column"):
        contact_sheet(clip, tmp_path / "sheet.png", columns=0)
