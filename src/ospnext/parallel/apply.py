"""Put the seams of many processes on a finished model, from outside."""

from typing import Any

from ospnext.parallel.mesh import Mesh, check_segments
from ospnext.parallel.ownership import segment_count
from ospnext.parallel.sequence import ShardedAttend, ShardedSwitch


def apply_sequence_parallel(model: Any, mesh: Mesh) -> None:
    """Share every video's tokens among the processes of a sequence, in place.

    The model takes and gives what it did before, the same on all processes of a sequence. The gradient of a parameter
    becomes the sum over them.

    Args:
        model: a transformer with ``layouts``, ``config.sparse_ratio`` and the seams ``switch`` and, in each of its
            ``blocks``, ``self_attn.attend``. Cross-attention stays: every process has the whole text.
        mesh: of ``build_mesh``.

    Raises:
        ValueError: ``ssp`` does not divide the attention segments of the model.
    """
    assert not isinstance(model.switch, ShardedSwitch), "the model's tokens are shared already"
    check_segments(mesh.sizes, segment_count(model.layouts, model.config.sparse_ratio))
    if mesh.sizes.ssp * mesh.sizes.ulysses == 1:
        return
    model.switch = ShardedSwitch(mesh.sharing)
    for block in model.blocks:
        block.self_attn.attend = ShardedAttend(block.self_attn.attend)
