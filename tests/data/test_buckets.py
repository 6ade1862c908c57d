"""Which clip goes to which bucket."""

import pytest

from ospnext.data.buckets import Bucket, assign, choose_bucket
from ospnext.data.records import ClipRecord, Crop

BUCKETS = (
    Bucket(81, 720, 1280),
    Bucket(81, 480, 832),
    Bucket(33, 480, 832),
    Bucket(81, 832, 480),
    Bucket(33, 720, 720),
)


def clip(height: int, width: int, frames: int = 200, crop: Crop | None = None) -> ClipRecord:
    return ClipRecord("a.mp4", ("a",), height, width, 16, frames, crop=crop)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (clip(1080, 1920), Bucket(81, 720, 1280)),
        (clip(720, 1280), Bucket(81, 720, 1280)),
        (clip(500, 900), Bucket(81, 480, 832)),
        (clip(500, 900, 40), Bucket(33, 480, 832)),
        (clip(1920, 1080), Bucket(81, 832, 480)),
        (clip(900, 900), Bucket(33, 720, 720)),
        (clip(1080, 1920, crop=Crop(0, 1080, 0, 1080)), Bucket(33, 720, 720)),
        (clip(720, 1280, 20), None),
    ],
)
def test_choice(record: ClipRecord, expected: Bucket | None) -> None:
    place = choose_bucket(record, record.num_frames, BUCKETS)
    assert (None if place is None else BUCKETS[place]) == expected


def test_aspect_comes_before_size() -> None:
    place = choose_bucket(clip(400, 300), 200, BUCKETS)  # upright, if only enlarged
    assert place is not None
    assert BUCKETS[place] in (Bucket(33, 720, 720), Bucket(81, 832, 480))
    place = choose_bucket(clip(450, 800), 200, BUCKETS)  # two are alike, both would be enlarged
    assert place is not None
    assert BUCKETS[place] == Bucket(81, 480, 832)


def test_assignment_counts_what_is_too_short() -> None:
    groups, left_out = assign([clip(480, 832), clip(480, 832, 5), clip(832, 480)], BUCKETS, 16, None)
    assert [group.tolist() for group in groups] == [[], [0], [], [2], []]
    assert left_out == 1


def test_names() -> None:
    assert Bucket.parse("81x720x1280") == Bucket(81, 720, 1280)
    for text in ("81x720", "axbxc", "0x1x1", ""):
        with pytest.raises(ValueError, match="FRAMESxHEIGHTxWIDTH"):
            Bucket.parse(text)
    with pytest.raises(ValueError, match="once"):
        assign([], [BUCKETS[0]] * 2, 16, None)
