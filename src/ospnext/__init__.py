"""ospnext: sparse text-to-video diffusion of the Wan2.1 family.

The public names are imported on first use, so that ``import ospnext`` and ``ospnext --help`` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "OSPNextTransformer3DModel": "ospnext.models.transformer",
    "OSPNextModel": "ospnext.models.transformer",
    "OSPNextPipeline": "ospnext.generate.pipeline",
    "load_transformer": "ospnext.checkpoints.load",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ospnext' has no attribute {name!r}")
