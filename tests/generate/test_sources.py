"""Where components are kept when memory is short, and which sizes a model can make."""

import pytest
import torch

from ospnext.checkpoints.memory import OutOfMemoryError
from ospnext.generate import memory
from ospnext.generate.size import SizeStep, VideoSize, fit_size

WAN = SizeStep(4, 16, 16)
PARTS = {
    "transformer": memory.Footprint(20, 10),
    "vae": memory.Footprint(2, 5),
    "text_encoder": memory.Footprint(20, 0),
}


@pytest.mark.parametrize(
    ("free", "asked", "offloaded"),
    [
        (52, set(), set()),
        (52, {"vae", "text_encoder"}, {"vae", "text_encoder"}),
        (52, {"transformer"}, {"transformer"}),
        (51, set(), {"vae", "text_encoder"}),
        (40, set(), {"vae", "text_encoder"}),
        (39, set(), {"vae", "text_encoder", "transformer"}),
        (30, {"transformer"}, {"vae", "text_encoder", "transformer"}),
    ],
)
def test_offloading_follows_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, asked: set[str], offloaded: set[str]
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000 if device.type == "cpu" else free)
    assert memory.choose_offload(PARTS, torch.device("cuda"), frozenset(asked)) == offloaded


def test_what_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 35)
    with pytest.raises(OutOfMemoryError, match="on cpu"):  # the device would do, but not the host beside it
        memory.choose_offload(PARTS, torch.device("cuda"), frozenset())
    with pytest.raises(OutOfMemoryError, match="on cpu"):
        memory.choose_offload(PARTS, torch.device("cpu"), frozenset(("vae",)))


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((81, 720, 1280), (81, 720, 1280)),
        ((80, 480, 832), (81, 480, 832)),
        ((82, 480, 832), (81, 480, 832)),
        ((1, 16, 16), (1, 16, 16)),
        ((33, 121, 135), (33, 128, 128)),
    ],
)
def test_sizes_go_to_the_nearest(asked: tuple[int, int, int], made: tuple[int, int, int]) -> None:
    assert fit_size(VideoSize(*asked), WAN) == made


@pytest.mark.parametrize("size", [(0, 64, 64), (5, 7, 64), (5, 64, 0), (5, -64, 64), (5, 20000, 64)])
def test_impossible_sizes_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be made"):
        fit_size(VideoSize(*size), WAN)
