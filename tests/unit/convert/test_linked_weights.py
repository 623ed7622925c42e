"""Rows of our tensors, whichever are asked for, are those of the whole tensor put together from theirs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.streamed import GlobalTensor
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.link_tensors import to_ours
from trainer.convert.linked_weights import LinkedWeights, region
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.families.link import Interleaved, Link


def _link(name: str, shape: tuple[int, ...], *at: tuple[int, int], **fields: object) -> Link:
    return Link(theirs=name, shape=shape, ours="w", at=at, **fields)  # pyrefly: ignore


ROTARY = Interleaved(dim=0, block=6, within=(2, 6))
CASES = {
    "two stacked": ((7, 2), [_link("a", (3, 2), (0, 3)), _link("b", (4, 2), (3, 7))]),
    "experts": (
        (3, 4, 2),
        [_link(f"{e} {part}", (2, 2), (e, e + 1), (2 * part, 2 * part + 2)) for e in range(3) for part in range(2)],
    ),
    "all experts, transposed and interleaved": (
        (3, 4, 5),
        [_link("a", (3, 5, 4), interleaved=Interleaved(dim=-2, block=4, within=(0, 4)), transposed=True)],
    ),
    "a transposed matrix": ((4, 5), [_link("a", (5, 4), transposed=True)]),
    "rotary rows of two heads": (
        (12, 2),
        [_link("a", (12, 2), interleaved=Interleaved(dim=0, block=6, within=(2, 6)))],
    ),
    "a vector": ((5,), [_link("a", (5,))]),
}


@pytest.mark.parametrize(("shape", "links"), CASES.values(), ids=CASES.keys())
def test_any_rows_are_those_of_the_whole(tmp_path: Path, shape: tuple[int, ...], links: list[Link]) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs: dict[str, Tensor] = {
        link.theirs: torch.randn(link.shape, generator=generator).bfloat16() for link in reversed(links)
    }
    save_file(theirs, tmp_path / "model.safetensors")
    whole = torch.full(shape, torch.nan)
    for link in links:
        spans = region(link, shape)
        part = to_ours(theirs[link.theirs], link, tuple(end - start for start, end in spans))
        whole[tuple(slice(*span) for span in spans)] = part.float()
    assert whole.isfinite().all()
    tensors = {"model.w": GlobalTensor(shape=shape), "engine.n": GlobalTensor(shape=(3,), dtype="int64")}
    with SafetensorsFolder(ForeignFolder(tmp_path)) as source:
        weights = LinkedWeights(source, links, tensors, {"engine.n": torch.arange(3)})
        for start in range(shape[0]):
            for length in range(1, shape[0] - start + 1):
                assert torch.equal(weights.read("model.w", start, length), whole[start : start + length])
        assert weights.read("engine.n", 1, 2).tolist() == [1, 2]
