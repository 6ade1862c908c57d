"""What processes do in the tests of states: a small sharded model is saved, loaded, and kept from being saved."""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ospnext.parallel.launch import Launch
from ospnext.parallel.state import StateError, StateWriter, load, newest
from ospnext.train.clipping import AdaptiveClipper
from ospnext.train.optim import MovingAverage, adamw
from ospnext.train.state import TrainState


def model(seed: int, world: int) -> nn.Module:
    """Two layers whose rows divide by nothing, sharded where there are several processes."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in (*net, net):
            fully_shard(layer, mesh=mesh)
    return net


def tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return {f"live.{name}": parameter.data for name, parameter in net.named_parameters()}


def save(rank: int, world: int, folder: Path, step: int) -> None:
    """Save, and change the weights while the files are written: a state is of the moment it was asked for."""
    net = model(step, world)
    writer = StateWriter(folder)
    writer.save(step, tensors(net), {"step": step, "world": world})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    writer.finish()


def loads(rank: int, world: int, folder: Path, step: int) -> dict[str, object]:
    """Load into other weights, and compare with those that were saved."""
    found = newest(folder)
    assert found is not None
    net = model(99, world)
    record = load(found, tensors(net))
    expected = dict(model(step, 1).named_parameters())
    for name, parameter in net.named_parameters():
        value = parameter.full_tensor() if world > 1 else parameter
        assert torch.equal(value, expected[name]), name
    return record


def refused(rank: int, world: int, folder: Path) -> str:
    """The message of a load that is refused; the weights are as they were."""
    net = model(99, world)
    try:
        load(folder, tensors(net))
    except StateError as error:
        for name, parameter in net.named_parameters():
            value = parameter.full_tensor() if world > 1 else parameter
            assert torch.equal(value, dict(model(99, 1).named_parameters())[name])
        return str(error)
    return "loaded"


def blocked(rank: int, world: int, folder: Path) -> str:
    """The message of a save that one process cannot do."""
    net = model(1, world)
    writer = StateWriter(folder)
    over = threading.Event()

    def remove() -> None:  # the file system goes away under the writer
        while not over.is_set():
            shutil.rmtree(folder / ".iter_000000007.tmp", ignore_errors=True)

    remover = threading.Thread(target=remove)
    if rank == 0:
        remover.start()
    try:
        writer.save(7, tensors(net), {})
        writer.finish()
    except StateError as error:
        return str(error)
    finally:
        over.set()
        if rank == 0:
            remover.join()
    return "saved"


class Numbered:
    """Data with a number, which are others where it is another."""

    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["number"] != self.number:
            raise ValueError(f"the data are number {state['number']}, not {self.number}")


def train_state(world: int, number: int = 0) -> TrainState:
    """A run before its first step."""
    modules = {"net": model(1, world)}
    optimiser = adamw(modules, 0.1, (0.9, 0.99), 1e-8, 0.01)
    return TrainState(modules, optimiser, MovingAverage(modules, 0.9), AdaptiveClipper(1.0), Numbered(number))


def save_run(folder: Path) -> None:
    """The state of a run of one process."""
    writer = StateWriter(folder)
    train_state(1).save(writer)
    writer.finish()


def resumed(rank: int, world: int, folder: Path, last: int) -> str:
    """How a run is refused that goes on with the data of that number in its last process."""
    state = train_state(world, last if rank == world - 1 else 0)
    try:
        state.load(newest(folder) or folder, Launch(rank, world, rank))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "resumed"
