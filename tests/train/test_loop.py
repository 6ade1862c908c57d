"""The loop: resumed runs equal uninterrupted ones, budgets stop, bad numbers are never saved."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ospnext.parallel.launch import Launch
from ospnext.parallel.state import COMPLETE, StateError, StateWriter, newest
from ospnext.train.log import Losses
from ospnext.train.loop import MOST_SKIPPED, DivergedError, LoopSettings, finishing, fit
from ospnext.train.state import TrainState

CPU = torch.device("cpu")


class Interrupted(Exception):  # noqa: N818 - a kill, not an error
    """What ends a run between two steps."""


class Recipe:
    """A small network learns to be the identity on random numbers; every micro-batch is recorded.

    Args:
        fails: step -> whether the run is killed before it.
        bad: step -> whether its loss is not finite.
    """

    def __init__(
        self, seed: int = 0, fails: Callable[[int], bool] | None = None, bad: Callable[[int], bool] | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.fails, self.bad = fails or (lambda step: False), bad or (lambda step: False)
        self.seen: list[float] = []

    def losses(self, generator: torch.Generator, step: int) -> Losses:
        if self.fails(step):
            raise Interrupted
        x = torch.randn(16, 4, generator=generator)
        self.seen.append(x.sum().item())
        loss = (self.net(x).float() - x).square().mean()
        return {"loss": loss * (float("nan") if self.bad(step) else 1), "extra": x.mean()}

    def fit(self, settings: LoopSettings) -> TrainState:
        return fit({"net": self.net}, self.losses, settings, CPU)


@pytest.fixture
def settings(tmp_path) -> LoopSettings:
    return LoopSettings(
        tmp_path / "run",
        iterations=12,
        lr=0.02,
        lr_schedule="cosine",
        warmup_steps=3,
        ema_decay=0.8,
        ema_update_interval=2,
        log_interval=5,
        save_interval=4,
        dtype=torch.float32,
    )


def read_log(settings: LoopSettings) -> list[dict]:
    return [json.loads(line) for line in (settings.output_dir / "train_log.jsonl").read_text().splitlines()]


def steps_of(settings: LoopSettings) -> list[int]:
    return [line["step"] for line in read_log(settings)]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("iter_*"))


def assert_same_state(one: TrainState, other: TrainState) -> None:
    assert one.record() == other.record()
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, theirs[key]), key


def test_a_run_learns_saves_and_logs(settings, capsys):
    state = Recipe().fit(settings)
    assert state.step == 12
    assert saved_steps(settings.output_dir) == [4, 8, 12]
    log = read_log(settings)
    assert [line["step"] for line in log] == [5, 10, 12]
    assert log[0].keys() == {
        *("step", "loss", "extra", "grad_norm", "grad_threshold", "lr", "skipped", "seconds_per_step", "memory_gib")
    }
    assert log[-1]["loss"] < log[0]["loss"]
    assert "stopped" not in capsys.readouterr().out


def test_the_log_holds_means(settings):
    recipe = Recipe()
    recipe.fit(settings)
    samples = torch.tensor(recipe.seen) / 64  # a sum of 16 x 4 numbers to their mean
    means = [line["extra"] for line in read_log(settings)]
    assert means == pytest.approx([some.mean().item() for some in samples.split(5)], abs=2e-6)


@pytest.mark.parametrize("killed_before", [5, 6, 8, 11])
def test_a_killed_run_goes_on_exactly(settings, killed_before, capsys):
    whole = Recipe()
    expected = whole.fit(settings)
    logged = read_log(settings)

    again = replace(settings, output_dir=settings.output_dir.with_name("killed"))
    with pytest.raises(Interrupted):
        Recipe(fails=lambda step: step == killed_before).fit(again)
    newest = 4 * (killed_before // 4)
    assert saved_steps(again.output_dir)[-1] == newest
    capsys.readouterr()
    resumed = Recipe(seed=99)  # other weights, to be replaced
    state = resumed.fit(again)
    assert f"resumed from {again.output_dir / f'iter_{newest:09d}'}: step {newest} of 12" in capsys.readouterr().out
    assert_same_state(expected, state)
    assert resumed.seen == whole.seen[newest:]
    assert steps_of(again) == [line["step"] for line in logged]  # none twice
    assert read_log(again)[-1]["loss"] == logged[-1]["loss"]


def test_lines_of_lost_steps_and_broken_ones_leave_the_log(settings):
    with pytest.raises(Interrupted):
        Recipe(fails=lambda step: step == 7).fit(replace(settings, log_interval=1))
    path = settings.output_dir / "train_log.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the power went
    Recipe().fit(replace(settings, log_interval=1))
    assert steps_of(settings) == list(range(1, 13))


def test_a_time_budget_stops_and_resumes_exactly(settings, capsys):
    expected = Recipe().fit(settings)
    pieces = replace(settings, output_dir=settings.output_dir.with_name("pieces"), time_budget_minutes=1e-6)
    state = Recipe().fit(pieces)  # spent before the first step
    assert state.step == 0
    assert "stopped at step 0 of 12" in capsys.readouterr().out

    def slow(step: int) -> bool:
        if step == 5:  # the budget ends within this step, which is finished
            time.sleep(1.6)
        return False

    state = Recipe(fails=slow).fit(replace(pieces, time_budget_minutes=1.2 / 60))
    assert 0 < state.step <= 6
    stopped = state.step
    assert saved_steps(pieces.output_dir)[-1] == stopped
    state = Recipe(seed=5).fit(replace(pieces, time_budget_minutes=10.0))
    assert_same_state(expected, state)
    assert f"step {stopped} of 12" in capsys.readouterr().out


def test_a_finished_run_does_nothing_when_started_again(settings, capsys):
    expected = Recipe().fit(settings)
    before = (settings.output_dir / "train_log.jsonl").read_bytes()
    recipe = Recipe(seed=3)
    assert_same_state(expected, recipe.fit(settings))
    assert recipe.seen == []
    assert (settings.output_dir / "train_log.jsonl").read_bytes() == before
    assert "resumed from" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(settings):
    constant = replace(settings, lr_schedule="constant")
    Recipe().fit(replace(constant, iterations=6))
    state = Recipe().fit(constant)
    expected = Recipe().fit(replace(constant, output_dir=settings.output_dir.with_name("whole")))
    assert_same_state(expected, state)


@pytest.mark.parametrize("bad", [(0,), (4, 6), (3, 4, 5, 6, 7, 8, 9)])
def test_steps_that_are_not_finite_are_left_out_and_counted(settings, bad):
    """The weights are those of a run in which these steps' gradients never were."""
    settings = replace(settings, lr_schedule="constant", warmup_steps=0, log_interval=1, ema_update_interval=1)
    state = Recipe(bad=lambda step: step in bad).fit(settings)
    assert (state.step, state.clipper.skipped, state.average.updates) == (12, len(bad), 12 - len(bad))
    lines = read_log(settings)
    assert [line["step"] for line in lines if "loss" not in line] == [step + 1 for step in bad]
    assert lines[-1]["skipped"] == len(bad)
    assert all(p.isfinite().all() for p in state.tensors().values())
    assert state.tensors()["optimiser.steps"].tolist() == [12 - len(bad)] * 4


def test_many_of_them_in_a_row_stop_the_run_and_nothing_is_lost(settings):
    long = replace(settings, iterations=30)
    with pytest.raises(DivergedError, match="lower the learning rate") as caught:
        Recipe(bad=lambda step: step >= 6).fit(long)
    assert f"{MOST_SKIPPED} steps in a row, up to step {6 + MOST_SKIPPED} (there from net.2.bias" in str(caught.value)
    assert str(settings.output_dir) in str(caught.value)
    state = Recipe().fit(long)  # the way out: the newest state is sound
    assert state.step == 30
    assert all(p.isfinite().all() for p in state.modules["net"].parameters())


def test_the_layer_where_it_began_is_named(settings, capsys):
    recipe = Recipe()

    def losses(generator, step):
        found = recipe.losses(generator, step)
        # Without a gradient of the layers after it: as if the numbers had left their range on the way back.
        return found | {"loss": found["loss"] + (recipe.net[0].weight.sum() * float("inf") if step == 4 else 0)}

    fit({"net": recipe.net}, losses, settings, CPU)
    assert "step 5 is left out: gradients are not finite, from net.0.weight on backwards" in capsys.readouterr().out


def test_a_run_of_bad_steps_is_counted_over_restarts(settings):
    long = replace(settings, iterations=30)
    with pytest.raises(Interrupted):
        Recipe(bad=lambda step: step >= 2, fails=lambda step: step == 16).fit(long)
    with pytest.raises(DivergedError, match=f"up to step {2 + MOST_SKIPPED}"):
        Recipe(bad=lambda step: step >= 2).fit(long)


def test_sigterm_saves_and_the_next_start_goes_on(settings, capsys):
    expected = Recipe().fit(settings)
    own = replace(settings, output_dir=settings.output_dir.with_name("ended"))
    state = Recipe(fails=lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM) is not None).fit(own)
    assert (state.step, state.terminated, saved_steps(own.output_dir)) == (7, True, [4, 7])
    assert "stopped at step 7 of 12: start again to go on" in capsys.readouterr().out
    resumed = Recipe(seed=3).fit(own)
    assert not resumed.terminated
    assert_same_state(expected, resumed)


class Held(dict):
    """A value of a record that is written only when it is let go."""

    def __init__(self, **values: int) -> None:
        super().__init__(values)
        self.free = threading.Event()

    def items(self):
        self.free.wait(60)
        return super().items()


def test_an_interrupt_while_a_state_is_waited_for_does_not_lose_it(tmp_path):
    writer, held = StateWriter(tmp_path), Held(a=1)
    writer.save(5, {"a": torch.ones(3)}, {"held": held})
    main = threading.main_thread().ident

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        threading.Timer(0.3, held.free.set).start()

    threading.Timer(0.3, interrupt).start()
    with pytest.raises(KeyboardInterrupt), finishing(writer, Launch()):
        writer.finish()
    assert newest(tmp_path) == tmp_path / "iter_000000005"


def test_only_the_newest_states_stay(settings):
    Recipe().fit(replace(settings, iterations=4, save_interval=1, keep=2))
    assert saved_steps(settings.output_dir) == [3, 4]


def test_an_incomplete_folder_is_refused_by_name(settings):
    Recipe().fit(settings)
    (settings.output_dir / "iter_000000012" / COMPLETE).unlink()
    with pytest.raises(StateError, match="iter_000000012 is not complete"):
        Recipe().fit(settings)


def test_accumulated_gradients_equal_the_larger_batch(settings):
    data = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    states = []
    for parts in (1, 3):
        recipe, calls = Recipe(), iter(range(1000))

        def losses(generator: torch.Generator, step: int, parts=parts, net=recipe.net, calls=calls) -> Losses:
            x = data.chunk(parts)[next(calls) % parts]
            return {"loss": (net(x) - x).square().mean()}

        own = replace(settings, output_dir=settings.output_dir / str(parts), accumulation_steps=parts)
        states.append(fit({"net": recipe.net}, losses, own, CPU))
    for one, other in zip(*(state.modules["net"].parameters() for state in states), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    logs = [read_log(replace(settings, output_dir=settings.output_dir / str(parts))) for parts in (1, 3)]
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_learning_rates_are_those_of_the_schedule(settings):
    Recipe().fit(replace(settings, log_interval=1))
    rates = [line["lr"] for line in read_log(settings)]
    assert rates[:4] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02])
    assert rates[-1] == pytest.approx(0.02 * 0.5 * (1 + torch.tensor(torch.pi * 8 / 9).cos().item()), rel=1e-4)


def test_the_average_keeps_its_interval(settings):
    assert Recipe().fit(settings).average.updates == 6
    other = replace(settings, output_dir=settings.output_dir.with_name("rare"), ema_update_interval=100)
    assert Recipe().fit(other).average.updates == 0


def test_bf16_is_the_arithmetic_not_the_weights(settings):
    recipe, seen = Recipe(), []

    def losses(generator: torch.Generator, step: int) -> Losses:
        y = recipe.net(torch.randn(4, 4, generator=generator))
        seen.append(y.dtype)
        return {"loss": y.float().square().mean()}

    fit({"net": recipe.net}, losses, replace(settings, dtype=torch.bfloat16), CPU)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in recipe.net.parameters()} == {torch.float32}


def test_a_damaged_state_stops_before_training(settings):
    Recipe().fit(settings)
    (data,) = (settings.output_dir / "iter_000000012").glob("__0_*")
    data.write_bytes(b"")
    recipe = Recipe()
    with pytest.raises(StateError, match="iter_000000012"):
        recipe.fit(replace(settings, iterations=20))
    assert recipe.seen == []
