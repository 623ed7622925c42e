"""Check that a published folder has every tensor that its config.json promises, of the right shape, and no other."""

import re
from collections.abc import Iterable
from typing import Final

import torch

from trainer.config.nodes import shown, shown_path
from trainer.convert.foreign_model import ForeignModel
from trainer.convert.safetensors_folder import SafetensorsFolder
from trainer.convert.shard_file import DTYPES
from trainer.errors import CheckpointError
from trainer.families.link import Link

_TABLES: Final = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Rotary frequencies, which older checkpoints store although they follow from the config."""
_LAYER: Final = re.compile(r"model\.layers\.(\d{1,6})\..*")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS: Final = 4096  # of the embedding in memory at a time


def check_foreign_tensors(source: SafetensorsFolder, links: Iterable[Link], foreign: ForeignModel) -> list[Link]:
    """Compare names, shapes and dtypes of a folder with what the family has; return the links.

    They are taken one by one, since a hostile config.json can promise any number of them.

    Raises:
        CheckpointError: with the first difference.
    """
    where, found = shown_path(source.folder.path), list[Link]()
    for link in links:
        if link.theirs not in source.entries:
            raise CheckpointError(
                f"{where}: lacks {shown(link.theirs)}, which its config.json promises; download it again"
            )
        found.append(link)
    linked = {link.theirs for link in found}
    extra = [name for name in source.entries if name not in linked and not _is_needless(name, foreign)]
    if extra:
        raise CheckpointError(
            f"{where}: has {_listed(extra)}, for which {foreign.family.name} with its config.json has no place"
        )
    for link in found:
        entry = source.entries[link.theirs]
        if entry.shape != link.shape:
            found, expected = list(entry.shape), list(link.shape)
            raise CheckpointError(
                f"{where}: {link.theirs} is {found}, and by its config.json it is {expected}; they are of two models"
            )
        if entry.dtype not in DTYPES.values() or entry.dtype is torch.float64:
            raise CheckpointError(
                f"{where}: {link.theirs} is {str(entry.dtype).removeprefix('torch.')}; bfloat16, float16 and float32 "
                "are imported: dequantize it first"
            )
    if foreign.model.tie_embeddings and _HEAD in source.entries and not _are_equal(source):
        raise CheckpointError(
            f"{where}: {_HEAD} differs from {_EMBEDDING}, and config.json ties them (tie_word_embeddings); one is wrong"
        )
    return found


def _is_needless(name: str, foreign: ForeignModel) -> bool:
    layer = _LAYER.fullmatch(name)
    is_later = layer is not None and int(layer[1]) >= foreign.model.num_layers
    predicts_more = bool(foreign.config.get("num_nextn_predict_layers"))  # layers that predict further tokens
    return (
        _TABLES.fullmatch(name) is not None
        or (is_later and predicts_more)
        or (name == _HEAD and foreign.model.tie_embeddings)
    )


def _are_equal(source: SafetensorsFolder) -> bool:
    one, two = source.entries[_EMBEDDING], source.entries[_HEAD]
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    starts = range(0, one.shape[0], _ROWS)
    spans = [(start, min(start + _ROWS, one.shape[0])) for start in starts]
    return all(torch.equal(source.read(_EMBEDDING, *span), source.read(_HEAD, *span)) for span in spans)


def _listed(names: list[str]) -> str:
    return shown(min(names)) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
