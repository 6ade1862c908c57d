"""A state comes back exactly, or not at all: half-written, damaged and foreign ones are refused by name."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ospnext.train.optim import MovingAverage, adamw
from ospnext.train.state import StateError, TrainState, latest

FILES = ("net.safetensors", "net.ema.safetensors", "optimiser.pt", "state.json")


def make_state(seed: int = 0, width: int = 4, layers: int = 1, name: str = "net", lr: float = 0.1) -> TrainState:
    torch.manual_seed(seed)
    module = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    generator = torch.Generator().manual_seed(seed)
    modules = {name: module}
    return TrainState(modules, adamw(modules, lr, (0.9, 0.99), 1e-8, 0.01), MovingAverage(modules, 0.9), generator)


def train(state: TrainState, steps: int) -> TrainState:
    """Steps that move everything a state holds."""
    (module,) = state.modules.values()
    for _ in range(steps):
        width = module[0].in_features
        module(torch.randn(2, width, generator=state.generator)).square().sum().backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.average.update()
        state.step += 1
    return state


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    moments = {
        f"{i}.{key}": value.clone()
        for i, moment in state.optimiser.state_dict()["state"].items()
        for key, value in moment.items()
    }
    (module,) = state.modules.values()
    live = {key: p.detach().clone() for key, p in module.named_parameters()}
    shadow = {f"average.{key}": t.clone() for key, t in state.average.shadow.items()}
    counts = {"counts": torch.tensor([state.step, state.average.updates]), "random": state.generator.get_state()}
    return moments | live | shadow | counts


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run's folder with the states of steps 3 and 5."""
    state = train(make_state(), 3)
    state.save(tmp_path)
    train(state, 2).save(tmp_path)
    return tmp_path


def test_a_state_comes_back_exactly_and_goes_on_alike(tmp_path):
    state = train(make_state(), 3)
    folder = state.save(tmp_path)
    assert folder == tmp_path / "iter_000000003"
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    other = make_state(seed=7)
    other.load(folder)
    assert_same(everything(state), everything(other))
    assert_same(everything(train(state, 4)), everything(train(other, 4)))


def test_the_newest_is_taken_and_drafts_are_not(saved):
    (saved / ".iter_000000009.tmp").mkdir()
    (saved / "iter_000000009.tmp").mkdir()
    (saved / "iter_last").mkdir()
    (saved / "iter_000000005_copy").mkdir()
    assert latest(saved) == saved / "iter_000000005"
    assert latest(saved / "nowhere") is None


def test_a_draft_that_was_left_is_replaced(tmp_path):
    draft = tmp_path / ".iter_000000002.tmp"
    draft.mkdir()
    (draft / "old").touch()
    folder = train(make_state(), 2).save(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert not draft.exists()


def test_the_state_of_a_step_is_written_once(saved):
    state = make_state()
    state.load(latest(saved))
    before = (saved / "iter_000000005/state.json").stat().st_mtime_ns
    assert state.save(saved) == saved / "iter_000000005"
    assert (saved / "iter_000000005/state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
def test_a_damaged_folder_is_refused_and_changes_nothing(saved, name, damage):
    folder = latest(saved)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "missing":
        kept = {"empty": b"", "truncated": content[: len(content) // 2], "garbage": b"what is this? " * 40}[damage]
        (folder / name).write_bytes(kept)
    state = make_state()
    before = everything(state)
    with pytest.raises(StateError, match="remove the folder to go on from the one before") as caught:
        state.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same(before, everything(state))
    shutil.rmtree(folder)
    state.load(latest(saved))  # the way out that the message names
    assert state.step == 3


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"width": 5}, r"net\.0\.weight: \[4, 4\] there, \[5, 5\] in this run"),
        ({"layers": 2}, "net.1.bias"),
        ({"name": "another"}, "another.0.bias"),
    ],
)
def test_a_folder_of_another_architecture_is_refused(saved, other, said):
    state = make_state(**other)
    before = everything(state)
    with pytest.raises(StateError, match=said) as caught:
        state.load(latest(saved))
    assert str(latest(saved)) in str(caught.value)
    assert "output_dir" in str(caught.value)
    assert_same(before, everything(state))


def test_a_tensor_that_would_broadcast_is_refused(saved):
    state = make_state(width=1)
    wide = make_state(width=4)
    with pytest.raises(StateError, match="differ in shape"):
        wide.load(train(state, 1).save(saved / "narrow"))


def test_random_numbers_of_another_kind_of_device_are_refused(saved):
    folder = latest(saved)
    rest = torch.load(folder / "optimiser.pt", weights_only=True)
    rest["generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA's are
    torch.save(rest, folder / "optimiser.pt")
    with pytest.raises(StateError, match=r"another run: .* state"):
        make_state().load(folder)


def test_what_the_config_says_of_the_optimiser_stays(saved):
    state = make_state(lr=0.7)
    state.optimiser.param_groups[0]["weight_decay"] = 0.2
    state.load(latest(saved))
    assert [group["lr"] for group in state.optimiser.param_groups] == [0.7, 0.7]
    assert [group["weight_decay"] for group in state.optimiser.param_groups] == [0.2, 0.0]


@pytest.mark.parametrize("room", [4096, 20_000])  # bytes a file may have: too few for the weights, for the optimiser
def test_a_full_disk_is_one_clear_line_and_older_states_stay(saved, room):
    state = make_state(width=64)
    train(state, 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(StateError, match=r"cannot save .*iter_000000009: .*output_dir") as caught:
            state.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in saved.iterdir()) == ["iter_000000003", "iter_000000005"]


def test_a_place_that_is_no_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot save"):
        make_state().save(tmp_path / "file")


def test_files_can_be_read_by_others_as_all_new_files_are(saved, tmp_path):
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (saved / "iter_000000005").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_the_record_is_plain(saved):
    record = json.loads((saved / "iter_000000005/state.json").read_text())
    assert record == {"step": 5, "ema_updates": 5, "modules": ["net"]}
