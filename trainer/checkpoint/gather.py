"""A state whose experts are on several ranks, put together on the first one: a file knows no ranks."""

from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.layout import even_slices
from trainer.distributed.mesh import Mesh


def gather_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Return the whole state on rank 0; other ranks get what they had. Every rank must call it."""
    if mesh.ep.size == 1 or mesh.layout.edp_rank > 0:  # another copy of the experts sends to nobody
        return state
    slices = {}
    for name, part in state.slices.items():
        if part.is_whole:
            slices[name] = part
            continue
        is_first = mesh.ep.index == 0
        send = [len(part.tensor)] + [0] * (mesh.ep.size - 1)
        receive = [end - first if is_first else 0 for first, end in even_slices(part.global_shape[0], mesh.ep.size)]
        whole = mesh.ep.exchange_plain(part.tensor, send, receive)
        slices[name] = Slice.whole(whole) if is_first else part
    return TrainState(slices=slices, values=state.values)
