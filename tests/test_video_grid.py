"""Grids of videos, read back from the file."""

from pathlib import Path

import numpy as np
import psutil
import pytest

from ospnext import media
from ospnext.media import read_video, video_grid, write_video

GREYS = (40, 90, 140, 190, 230)


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    """Five clips, each of one grey, the last one shorter and smaller."""
    paths = []
    for i, grey in enumerate(GREYS):
        side, frames = (32, 2) if i == 4 else (48, 4)
        paths.append(tmp_path / f"{i}.mp4")
        write_video(paths[-1], np.full((frames, side, 64, 3), grey, np.uint8), crf=0)
    return paths


def test_tiles_stand_in_rows_and_short_clips_hold_their_end(clips: list[Path], tmp_path: Path) -> None:
    video_grid(clips, tmp_path / "grid.mp4", fps=8)
    grid = read_video(tmp_path / "grid.mp4")
    assert grid.fps == 8
    assert grid.frames.shape == (4, 3 * 49 - 1, 2 * 65, 3)  # the odd side is padded by the codec
    for i, grey in enumerate(GREYS):
        y, x = i // 2 * 49 + 16, i % 2 * 65 + 32
        assert np.abs(grid.frames[:, y, x].astype(int) - grey).max() <= 4
    assert grid.frames[:, 2 * 49 + 40, 32].max() < 10  # below the smaller clip
    assert grid.frames[:, 2 * 49 + 16, 65 + 32].max() < 10  # no sixth clip


def test_tiles_start_no_threads_of_their_own(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    class Watched(media.VideoWriter):
        def add(self, frame: np.ndarray) -> None:
            threads.append(psutil.Process().num_threads())
            super().add(frame)

    monkeypatch.setattr(media, "VideoWriter", Watched)
    video_grid(clips[:1], tmp_path / "one.mp4")
    one = max(threads)
    threads.clear()
    video_grid(clips[:1] * 32, tmp_path / "many.mp4")
    assert max(threads) < one + 16


def test_grids_are_bounded(clips: list[Path], tmp_path: Path) -> None:
    video_grid(clips, tmp_path / "grid.mp4", limit=4, longest_side=66)
    assert max(read_video(tmp_path / "grid.mp4").frames.shape[1:3]) <= 66
    with pytest.raises(ValueError, match="at least one"):
        video_grid([], tmp_path / "none.mp4")
    with pytest.raises(OSError, match=r"gone\.mp4"):
        video_grid([tmp_path / "gone.mp4"], tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()
