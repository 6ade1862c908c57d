"""A run's state comes back exactly, or not at all; how it lies on disk is ``tests/parallel/test_state.py``'s matter."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from ospnext.parallel.state import StateError, StateWriter, load, read_record
from ospnext.train.clipping import AdaptiveClipper
from ospnext.train.export import trained_adapter
from ospnext.train.optim import MovingAverage, adamw
from ospnext.train.state import FORMAT, TrainState, latest


class Counter:
    """Data whose state is how much was taken of it."""

    def __init__(self, name: str = "clips", key: str = "name") -> None:
        self.name, self.key, self.taken = name, key, 0

    def state_dict(self) -> dict:
        return {self.key: self.name, "taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        if state[self.key] != self.name:
            raise ValueError(f"the data is {state[self.key]}, not {self.name}")
        self.taken = state["taken"]


def make_state(
    seed: int = 0, width: int = 4, layers: int = 1, name: str = "net", lr: float = 0.1, data: Counter | None = None
) -> TrainState:
    torch.manual_seed(seed)
    modules = {name: nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])}
    optimiser = adamw(modules, lr, (0.9, 0.99), 1e-8, 0.01)
    return TrainState(modules, optimiser, MovingAverage(modules, 0.9), AdaptiveClipper(1.0), data)


def train(state: TrainState, steps: int) -> TrainState:
    """Steps that move everything a state holds."""
    (module,) = state.modules.values()
    for _ in range(steps):
        width = module[0].in_features
        x = torch.randn(2, width, generator=torch.Generator().manual_seed(state.step))
        module(x).square().sum().backward()
        state.clipper.step(0.1 + state.step)
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.average.update()
        state.step += 1
        if state.data is not None:
            state.data.taken += 2
    return state


def save(state: TrainState, folder: Path) -> Path:
    writer = StateWriter(folder)
    state.save(writer)
    writer.finish()
    return folder / f"iter_{state.step:09d}"


def everything(state: TrainState) -> tuple[dict, dict]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}, state.record()


def assert_same(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for key, tensor in one[0].items():
        assert torch.equal(tensor, other[0][key]), key


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run's folder with the states of steps 3 and 5."""
    state = train(make_state(data=Counter()), 3)
    save(state, tmp_path)
    save(train(state, 2), tmp_path)
    return tmp_path


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_comes_back_exactly_and_goes_on_alike(tmp_path, steps):
    state = train(make_state(data=Counter()), steps)
    state.tracker = {"wandb": "run7"}
    folder = save(state, tmp_path)
    other = train(make_state(seed=7, data=Counter()), 1)
    other.load(folder)
    assert_same(everything(state), everything(other))
    assert_same(everything(train(state, 4)), everything(train(other, 4)))


def test_it_is_what_the_page_says(saved):
    record = read_record(latest(saved))
    assert record["format"] == FORMAT
    assert record.keys() == {"format", "step", "modules", "about", "ema_updates", "clipper", "data", "tracker"}
    live = torch.empty(4, 4)
    names = [f"{kind}.net.0.{p}" for kind in ("live", "average", "exp_avg", "exp_avg_sq") for p in ("weight", "bias")]
    tensors = {name: live if name == "live.net.0.weight" else torch.empty(4, 4) for name in names}
    tensors |= {name: torch.empty(4) for name in names if name.endswith("bias")} | {"optimiser.steps": torch.empty(2)}
    load(latest(saved), tensors)
    state = make_state(data=Counter())
    state.load(latest(saved))
    assert torch.equal(live, state.modules["net"][0].weight)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
@pytest.mark.parametrize("pattern", ["__0_*", "record.json", ".metadata"])
def test_a_damaged_folder_is_refused_and_changes_nothing(saved, damage, pattern):
    (path,) = latest(saved).glob(pattern)
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    state = make_state(data=Counter())
    before = everything(state)
    with pytest.raises(StateError, match="iter_000000005") as caught:
        state.load(saved / "iter_000000005")
    assert "\n" not in str(caught.value)
    assert_same(before, everything(state))


@pytest.mark.parametrize(
    ("before", "after"), [('"name"', '"nane"'), ('"taken": 10', '"taken": 11'), ("clips", "clops")]
)
def test_a_changed_letter_is_damage_and_no_other_run(saved, before, after):
    path = latest(saved) / "record.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    said = r"iter_000000005 is incomplete or damaged \(record\.json is not what was written\)"
    for attempt in (make_state(data=Counter()).load, trained_adapter):
        with pytest.raises(StateError, match=said):
            attempt(latest(saved))


def test_a_state_under_the_name_of_another_step_is_refused(saved):
    renamed = (saved / "iter_000000005").rename(saved / "iter_000000100")
    state = make_state(data=Counter())
    before = everything(state)
    with pytest.raises(StateError, match=r"iter_000000100 holds the state of step 5: .*\(iter_000000005\)"):
        state.load(renamed)
    assert_same(before, everything(state))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"width": 5}, r"net\.0\..*\[4.*\] there, \[5.*\] in this run"),
        ({"layers": 2}, "net.1.bias"),
        ({"name": "another"}, "another.0.bias"),
        ({"data": Counter("others")}, "the data is clips, not others"),
        ({"data": Counter(key="of another kind")}, "its data is of another kind"),
        ({"data": None}, "its data is of another kind"),
    ],
)
def test_the_state_of_another_run_is_refused(saved, other, said):
    state = make_state(**({"data": Counter()} | other))
    before = everything(state)
    with pytest.raises(StateError, match=said) as caught:
        state.load(latest(saved))
    assert str(latest(saved)) in str(caught.value)
    assert "output_dir" in str(caught.value)
    assert_same(before, everything(state))


def test_what_the_config_says_of_the_optimiser_stays(saved):
    state = make_state(lr=0.7, data=Counter())
    state.optimiser.param_groups[0]["weight_decay"] = 0.2
    state.load(latest(saved))
    assert [group["lr"] for group in state.optimiser.param_groups] == [0.7, 0.7]
    assert [group["weight_decay"] for group in state.optimiser.param_groups] == [0.2, 0.0]


def test_frozen_parameters_are_not_saved(tmp_path):
    state = make_state()
    (module,) = state.modules.values()
    module[0].bias.requires_grad_(False)
    modules = {"net": module}
    state = TrainState(modules, adamw(modules, 0.1, (0.9, 0.99), 1e-8, 0.0), MovingAverage(modules, 0.9), state.clipper)
    assert {name for name in state.tensors() if name.startswith("live")} == {"live.net.0.weight"}


def test_a_full_disk_is_one_clear_line_and_older_states_stay(saved):
    state = train(make_state(width=64, data=Counter()), 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(StateError, match=r"cannot save .*iter_000000009: .*output_dir") as caught:
            save(state, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in saved.iterdir()) == ["iter_000000003", "iter_000000005"]


@pytest.mark.parametrize("file", ["state.json", "model_state_dict.pt"])
def test_folders_of_older_trainers_are_named(tmp_path, file):
    (tmp_path / "iter_000000008").mkdir()
    (tmp_path / "iter_000000008" / file).touch()
    with pytest.raises(StateError, match="iter_000000008 was not written by this trainer"):
        latest(tmp_path)
