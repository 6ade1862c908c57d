"""LoRAs of a pipeline, under diffusers' method names: loaded, weighed, swapped, fused and taken off.

pipe.load_lora_weights("style.safetensors", adapter_name="style")
pipe.load_lora_weights("runs/lora/adapter", adapter_name="mine")
pipe.set_adapters(["style", "mine"], [0.8, 1.0])
pipe.unload_lora_weights()
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ospnext.checkpoints.lora import fuse, loaded_adapters, put_adapter, unfuse, use_adapters
from ospnext.checkpoints.lora_files import Adapter, read_adapter, take_adapter


class LoraMethods:
    """What ``OSPNextPipeline`` knows of LoRAs; all are the transformer's."""

    transformer: Any
    sharded: frozenset[str]
    _lora_weights: dict[str, float]  # of the adapters in use
    _unfused: dict[str, Tensor] | None  # the weights as they were before they were fused

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor] | Adapter,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        alpha: float | None = None,
    ) -> None:
        """Load a LoRA of any style that ``read_adapter`` knows, beside those in use, with scale 1.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, tensors by name, or what ``read_adapter`` gave;
                never the network.
            adapter_name: for ``set_adapters``; default: ``default_0`` and so on.
            weight_name: the file in the folder.
            alpha: where the files do not say it.

        Raises:
            ValueError: no LoRA of this model, or the name is taken, or weights are fused or shared among processes.
        """
        self._check_whole("load_lora_weights")
        self._check_unfused("load another")
        source = pretrained_model_name_or_path_or_dict
        known = loaded_adapters(self.transformer)
        name = adapter_name or next(n for i in range(len(known) + 1) if (n := f"default_{i}") not in known)
        if name in known:
            raise ValueError(f"adapter_name {name!r} is taken: choose another, or delete_adapters({name!r}) first")
        if "." in name:
            raise ValueError(f"adapter_name is {name!r}: it must not hold a dot")
        if isinstance(source, Adapter):
            adapter = source
        elif isinstance(source, Mapping):
            adapter = take_adapter(source, alpha)
        else:
            adapter = read_adapter(Path(source) / weight_name if weight_name else source, alpha)
        # In the weights' own numbers: what is multiplied by them is in these.
        dtype = self.transformer.patch_embedding.weight.dtype
        put_adapter(self.transformer, adapter, dtype, name, trained=False)
        self.set_adapters([*self._lora_weights, name], [*self._lora_weights.values(), 1.0])

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use exactly these LoRAs.

        Args:
            adapter_names: one or several that are loaded; an empty list uses none.
            adapter_weights: the scale of all or of each; default: 1.

        Raises:
            ValueError: one is not loaded, the numbers differ, or weights are fused.
        """
        self._check_unfused("set_adapters")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        each = 1.0 if adapter_weights is None else adapter_weights
        weights = [float(each)] * len(names) if isinstance(each, int | float) else [float(w) for w in each]
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise ValueError(f"{len(weights)} adapter_weights for the adapters {', '.join(names)}: give each its own")
        chosen = dict(zip(names, weights, strict=True))
        use_adapters(self.transformer, chosen)
        self._lora_weights = chosen

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs in use."""
        return list(self._lora_weights)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all LoRAs that are loaded, by component."""
        return {"transformer": names} if (names := loaded_adapters(self.transformer)) else {}

    def disable_lora(self) -> None:
        """Use none, and keep them loaded."""
        self.set_adapters([])

    def enable_lora(self) -> None:
        """Use all that are loaded, those in use with their scales and the others with 1."""
        names = loaded_adapters(self.transformer)
        self.set_adapters(names, [self._lora_weights.get(name, 1.0) for name in names])

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Add LoRAs to the weights: sampling is then as fast as without them. ``unfuse_lora`` undoes it exactly.

        Meanwhile host memory holds those weights as they were. After ``unload_lora_weights`` they are fused for good.

        Args:
            lora_scale: times the scale of each.
            adapter_names: which; default: those in use.

        Raises:
            ValueError: none is in use, weights are fused already, shared among processes or in 8 bits.
        """
        self._check_whole("fuse_lora")
        self._check_unfused("fuse again")
        if adapter_names is not None:
            self.set_adapters(adapter_names, [self._lora_weights.get(name, 1.0) for name in adapter_names])
        if not self._lora_weights:
            raise ValueError("fuse_lora: no LoRA is in use: load_lora_weights first, or set_adapters")
        self._unfused = fuse(self.transformer, lora_scale)

    def unfuse_lora(self) -> None:
        """Take fused LoRAs out of the weights again, which are then exactly what they were.

        Raises:
            ValueError: nothing is fused.
        """
        if self._unfused is None:
            raise ValueError("unfuse_lora: nothing is fused")
        unfuse(self.transformer, self._unfused)
        self._unfused = None

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take some LoRAs off.

        Raises:
            ValueError: one is not loaded, or weights are fused.
        """
        self._check_unfused("delete_adapters")
        gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        known = loaded_adapters(self.transformer)
        if unknown := sorted(gone - set(known)):
            raise ValueError(f"no adapter is called {', '.join(unknown)}: loaded are {', '.join(known) or 'none'}")
        if gone == set(known):
            self.unload_lora_weights()
        elif gone:
            self.transformer.delete_adapters(sorted(gone))
            left: Mapping[str, float] = {name: w for name, w in self._lora_weights.items() if name not in gone}
            self.set_adapters(list(left), list(left.values()))

    def unload_lora_weights(self) -> None:
        """Take all LoRAs off; what is fused stays in the weights."""
        if loaded_adapters(self.transformer):
            self._check_whole("unload_lora_weights")
            self.transformer.unload_lora()
        self._lora_weights, self._unfused = {}, None

    def _check_whole(self, what: str) -> None:
        if "transformer" in self.sharded:
            raise ValueError(f"{what}: processes share the weights: name the LoRA in lora_path before they are loaded")

    def _check_unfused(self, what: str) -> None:
        if self._unfused is not None:
            raise ValueError(f"LoRAs are fused: unfuse_lora first, then {what}")
