"""LoRA on a transformer, through PEFT; the only file that knows of it.

    y = W x + b + alpha / rank * B A x          A [rank, in], B [out, rank]; W and b are frozen

The order is that of ``assemble``: on meta, after HiF8 and before tokens and weights are shared. A new adapter is drawn
whole on every process, from a seed, and each process keeps its own rows: so it is the same on any number of them.

    names = put_adapter(model, NewAdapter(rank=32, alpha=64, targets=("self_attn.q",), seed=0))
    with adapter_disabled(model), torch.no_grad():
        reference = model(x, t, text)
    write_adapter(adapter_of(model), "out/adapter")
"""

import math
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ospnext.checkpoints.lora_files import Adapter, Pair, Size, in_words, read_adapter
from ospnext.checkpoints.read import CheckpointError, list_names
from ospnext.parallel.fsdp import shard_of, whole
from ospnext.sections import LoraConfig

DEFAULT = "default"  # PEFT's own name of an adapter
_BASE = "base_layer"


class NewAdapter(NamedTuple):
    """An adapter that changes nothing yet: A is drawn, B is zero.

    Attributes:
        rank, alpha: of every linear.
        targets: ends of the linears' names, such as ``self_attn.q``.
        seed: of A.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, config: LoraConfig, seed: int) -> Self:
        """What a configuration asks for."""
        return cls(config.rank, config.alpha, config.target_modules, seed)

    def sizes(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Size]:
        """Rank and alpha by the names of the linears that are meant.

        Raises:
            CheckpointError: a target is no linear of the model.
        """
        found = {target: [n for n in shapes if n == target or n.endswith(f".{target}")] for target in self.targets}
        if nowhere := [target for target, names in found.items() if not names]:
            known = dict.fromkeys(name.split(".", 2)[2] for name in shapes if name.startswith("blocks."))
            raise CheckpointError(
                f"lora_config.target_modules: no linear of this model is called {list_names(nowhere)}; its blocks "
                f"have {', '.join(known)}"
            )
        wanted = {name for names in found.values() for name in names}
        return {name: Size(self.rank, self.alpha) for name in shapes if name in wanted}


def asked_for(config: LoraConfig, seed: int) -> NewAdapter | Adapter:
    """The adapter to train, new or from the file that a configuration names.

    Raises:
        CheckpointError: the file cannot be used, or is of another adapter than the one that is described beside it.
    """
    if config.lora_path is None:
        return NewAdapter.of(config, seed)
    # Not model_fields_set: a run's config.yaml spells out every default.
    given = {name for name, field in LoraConfig.model_fields.items() if getattr(config, name) != field.default}
    adapter = read_adapter(config.lora_path, config.alpha if "alpha" in given else None)
    for key, values in (
        ("rank", {pair.size.rank for pair in adapter.pairs.values()}),
        ("alpha", {pair.alpha for pair in adapter.pairs.values()}),
    ):
        asked = getattr(config, key)
        if key in given and values != {asked}:
            raise CheckpointError(
                f"lora_config.{key} is {asked:g}, but {adapter.source} has {in_words(sorted(values))}: leave it out, "
                "the file decides"
            )
    ends = {target: [n for n in adapter.pairs if f".{n}".endswith(f".{target}")] for target in config.target_modules}
    meant = {name for names in ends.values() for name in names}
    odd = [*(target for target, names in ends.items() if not names), *(n for n in adapter.pairs if n not in meant)]
    if "target_modules" in given and odd:
        raise CheckpointError(
            f"lora_config.target_modules are not those of {adapter.source}, such as {odd[0]}: leave them out, the file "
            "decides"
        )
    return adapter


class WithAdapter(NamedTuple):
    """An adapter to be put on a model, as the arguments of ``put_adapter`` and ``inject``."""

    source: NewAdapter | Adapter
    dtype: torch.dtype = torch.float32
    name: str = DEFAULT
    trained: bool = True


# ── putting it on ─────────────────────────────────────────────────────────────────────────────────────────────────────


def put_adapter(
    model: Any,
    source: NewAdapter | Adapter,
    dtype: torch.dtype = torch.float32,
    name: str = DEFAULT,
    trained: bool = True,
) -> list[str]:
    """Put an adapter on a model that holds its weights already, in place.

    Args:
        model: a transformer on its device, not sharded; ``inject`` and ``start`` are the two halves for one that is.
        source: what the adapter is, or starts from.
        dtype: of A and B.
        name: of the adapter; a model may carry several.
        trained: whether A and B need gradients. The model's own weights are frozen in any case.

    Returns:
        Names of the linears that have it.

    Raises:
        CheckpointError: it is no adapter of this model.
    """
    names = inject(model, source, dtype, name, trained)
    for module_name in names:
        layer = model.get_submodule(module_name)
        for linear in _linears(layer, name):
            linear.to_empty(device=layer.get_base_layer().weight.device)
    start(model, source, name)
    return names


def inject(
    model: Any,
    source: NewAdapter | Adapter,
    dtype: torch.dtype = torch.float32,
    name: str = DEFAULT,
    trained: bool = True,
) -> list[str]:
    """The first half of ``put_adapter``: A and B without numbers, on meta; arguments and errors as there."""
    if isinstance(source, Adapter) and source.diffs:
        raise CheckpointError(
            f"{source.source}: holds {len(source.diffs)} differences beside A and B, such as "
            f"{next(iter(source.diffs))}: merge it into the model instead (ospnext merge-lora)"
        )
    sizes = source.sizes(linear_shapes(model))
    rank = Counter(size.rank for size in sizes.values()).most_common(1)[0][0]
    alpha = Counter(size.alpha for size in sizes.values()).most_common(1)[0][0]
    config = PeftConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(sizes),
        rank_pattern={n: size.rank for n, size in sizes.items() if size.rank != rank},
        alpha_pattern={n: size.alpha for n, size in sizes.items() if size.alpha != alpha},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    model._hf_peft_config_loaded = True  # what diffusers' own methods for adapters look at
    for module_name in sizes:
        for linear in _linears(model.get_submodule(module_name), name):
            linear.to(dtype).requires_grad_(trained)
    return list(sizes)


@torch.no_grad()
def start(model: nn.Module, source: NewAdapter | Adapter, name: str = DEFAULT) -> None:
    """The second half of ``put_adapter``: give A and B their numbers; each process keeps its rows of a sharded model.

    New ones are PEFT's: A uniform in ±1/√in (He et al. 2015, as torch initialises a linear), B zero.
    """
    for module_name, layer in _layers(model, name):
        down, up = _linears(layer, name)
        if isinstance(source, NewAdapter):
            generator = torch.Generator().manual_seed(_seed_of(source.seed, module_name))
            bound = 1 / math.sqrt(down.in_features)
            _fill(down.weight, torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator))
            shard_of(up.weight).values.zero_()
        else:
            pair = source.pairs[module_name]
            _fill(down.weight, pair.down)
            _fill(up.weight, pair.up)


def adapter_of(model: nn.Module, name: str = DEFAULT, values: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter of a model, whole, in host memory. Where it is sharded all processes call this together.

    Args:
        model: one that carries it.
        name: of the adapter.
        values: take A and B from here instead, by the names of the model's parameters, such as their average.

    Raises:
        CheckpointError: the model carries no adapter of that name.
    """
    alphas = alphas_of(model, name)
    if not alphas:
        raise CheckpointError(f"the model carries no adapter {name!r}")
    own = set(adapter_names(model))
    named: Mapping[str, Tensor] = values or {n: p for n, p in model.named_parameters() if n in own}
    return adapter_from({n: whole(t.detach()).to("cpu", copy=True) for n, t in named.items()}, alphas, name)


def alphas_of(model: nn.Module, name: str = DEFAULT) -> dict[str, float]:
    """Alpha of every linear that has the adapter: what a file of its A and B does not say."""
    return {module_name: float(layer.lora_alpha[name]) for module_name, layer in _layers(model, name)}


def adapter_from(tensors: Mapping[str, Tensor], alphas: Mapping[str, float], name: str = DEFAULT) -> Adapter:
    """An adapter from parameters of a model by their names, and ``alphas_of`` it.

    Raises:
        CheckpointError: a parameter is missing.
    """
    wanted = {m: (f"{m}.lora_A.{name}.weight", f"{m}.lora_B.{name}.weight") for m in alphas}
    if missing := [key for keys in wanted.values() for key in keys if key not in tensors]:
        raise CheckpointError(f"the adapter is not all there: {list_names(missing, 3)} are missing")
    return Adapter({m: Pair(tensors[down], tensors[up], alphas[m]) for m, (down, up) in wanted.items()})


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters while the block runs: the base it was trained from, as RL's reference.

    To be used under ``torch.no_grad``: blocks that are recomputed in a backward pass have their adapter again.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    # PEFT's own switch also freezes A and B, which FSDP2 has counted among what it trains.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def leave_casting_to_autocast(model: nn.Module) -> None:
    """Have float32 adapters take half-precision inputs as they come; the model then has to run under autocast.

    PEFT makes a float32 copy of every input otherwise, and multiplies in float32: several times the base's own traffic.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


# ── several, weighed, and inside the weights ──────────────────────────────────────────────────────────────────────────


def loaded_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that a model carries, in the order they were put on."""
    return list(getattr(model, "peft_config", None) or {})


def use_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Compute with these adapters, each times its weight, and without the others; not for training.

    Raises:
        CheckpointError: the model carries no adapter of a name.
    """
    known = loaded_adapters(model)
    if unknown := [name for name in weights if name not in known]:
        raise CheckpointError(f"no adapter is called {list_names(unknown)}: loaded are {list_names(known) or 'none'}")
    for _, layer in _lora_modules(model):
        layer.set_adapter(list(weights), inference_mode=True)
        for name, weight in weights.items():
            layer.set_scale(name, weight)


@torch.no_grad()
def fuse(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """Add the adapters in use to the weights, which then compute alone, at the speed of the model without them.

    Args:
        model: whole, not sharded.
        scale: times each of them.

    Returns:
        The weights as they were, in host memory, for ``unfuse``: subtracting would not give them back exactly.

    Raises:
        CheckpointError: weights are in 8 bits. Nothing has changed.
    """
    layers = [(n, layer) for n, layer in _lora_modules(model) if any(a in layer.lora_A for a in layer.active_adapters)]
    if coded := [name for name, layer in layers if layer.get_base_layer().weight.itemsize < 2]:
        raise CheckpointError(
            f"{len(coded)} weights are in 8 bits, such as {coded[0]}, into which an adapter would be lost: leave it "
            "beside them"
        )
    before: dict[str, Tensor] = {}
    for name, layer in layers:
        weight, names = layer.get_base_layer().weight, [a for a in layer.active_adapters if a in layer.lora_A]
        before[name] = weight.detach().to("cpu", copy=True)
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in names:
            down, up = _linears(layer, adapter)
            total = total + scale * layer.scaling[adapter] * (up.weight.float() @ down.weight.float())
        weight.copy_(total)
        layer.merged_adapters = names
    return before


@torch.no_grad()
def unfuse(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo ``fuse``, exactly."""
    for name, weight in before.items():
        layer: Any = model.get_submodule(name)
        layer.get_base_layer().weight.copy_(weight)
        layer.merged_adapters = []


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every linear of a transformer, by its name without adapters."""
    others = set(adapter_names(model))
    weights = ((n, p.shape) for n, p in model.named_parameters() if n not in others and n.endswith(".weight"))
    return {base_name(n).removesuffix(".weight"): (s[0], s[1]) for n, s in weights if len(s) == 2}


def base_name(name: str) -> str:
    """A module's or parameter's name as it would be without adapters."""
    return ".".join(part for part in name.split(".") if part != _BASE)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of all adapters, which no file of the model's holds."""
    prefixes = tuple(f"{name}.{part}." for name, module in _lora_modules(model) for part in ("lora_A", "lora_B"))
    return [name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)]


def describe_adapter(model: nn.Module, name: str = DEFAULT) -> str:
    """An adapter in a line, for a report."""
    layers = list(_layers(model, name))
    ranks = sorted({layer.r[name] for _, layer in layers})
    alphas = sorted({float(layer.lora_alpha[name]) for _, layer in layers})
    numbers = sum(p.numel() for _, layer in layers for linear in _linears(layer, name) for p in linear.parameters())
    return (
        f"lora on {len(layers)} linears: rank {in_words(ranks)}, alpha {in_words(alphas)}, {numbers / 1e6:.2f}M numbers"
    )


def _lora_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Every linear that has an adapter of that name, with the linear's own name."""
    return ((module_name, layer) for module_name, layer in _lora_modules(model) if name in layer.lora_A)


def _linears(layer: Any, name: str) -> tuple[Any, Any]:
    """A and B as modules."""
    return layer.lora_A[name], layer.lora_B[name]


def _fill(parameter: Tensor, values: Tensor) -> None:
    rows, own = shard_of(parameter)
    own.copy_(values if rows is None else values[rows])


def _seed_of(seed: int, name: str) -> int:
    """A seed of its own for each linear, whatever else has an adapter."""
    words = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
