"""Gates: whatever is exported is compared with the checkpoint before it gets its name.

`logits` loads it in transformers and compares every tensor, the logits and the tokenizer. `tensors` compares every
tensor on disk, names, shapes, config and tokenizer, for models that do not fit into memory twice.

# B rows, S tokens in a row, V vocabulary.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final
from unicodedata import is_normalized

import torch
from torch import Tensor

from trainer.convert.exported_model import ExportedModel
from trainer.convert.foreign_folder import ForeignFolder
from trainer.convert.gate_report import LIMIT, GateError, GateReport, SplittingError
from trainer.convert.shard_file import ShardFile
from trainer.convert.shard_writer import Shard
from trainer.convert.their_model import empty_model, load_model, load_tokenizer, tensors_on_disk, their_logits
from trainer.data.batches.batch import Batch
from trainer.errors import CheckpointError, DataError, first_line
from trainer.families.expressible import inference_values
from trainer.families.link import Link
from trainer.families.registry import family_of
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.moe.routing import RoutingOptions

_SEEN_BY_ROUTERS: Final = ("router.gate.weight", "embedding.weight")
_PERTURBATIONS: Final = 8
"""Times that a row is tried for experts that score alike; each finds a tie about every second time."""


@torch.no_grad()
def logits_gate(folder: Path, model: ExportedModel, batches: Sequence[Tensor], *, tokens: str) -> GateReport:
    """Compare what transformers loads with ours: every tensor, and the logits of batches (B, S) of token ids.

    `tokens` says where the ids come from.

    Raises:
        GateError: naming the first difference.
    """
    _compare_config(folder, model)
    theirs = load_model(folder)
    num_tensors = _compare_tensors(tensors_on_disk(theirs), model)
    ours, worst, left_out = model.reference(), 0.0, 0
    rows = [row[None] for ids in batches for row in ids]
    for row in rows:
        expected, found = our_logits(ours, row), their_logits(theirs, row)
        difference = float((expected - found).abs().max())
        limit = LIMIT * max(1.0, float(expected.abs().max()))
        if difference <= limit:
            worst = max(worst, difference)
        elif 2 * left_out < len(rows) and is_tied(ours, row, limit):
            left_out += 1
        else:
            raise GateError(f"logits differ by {difference:.2g} from ours; at most {limit:.1g} is rounding")
    return GateReport(
        gate="logits",
        num_tensors=num_tensors,
        num_tokens=sum(ids.numel() for ids in batches),
        worst=worst,
        tokens=tokens,
        num_rows=len(rows),
        rows_left_out=left_out,
    )


def tensors_gate(folder: Path, model: ExportedModel, shards: Sequence[Shard]) -> GateReport:
    """Compare every tensor on disk with the checkpoint, and names, shapes and config with transformers'.

    Raises:
        GateError: naming the first difference.
    """
    _compare_config(folder, model)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors_on_disk(empty_model(folder))}
    linked = {link.theirs: link.shape for link in model.links}
    for name in sorted(wanted.keys() | linked.keys()):
        if wanted.get(name) != linked.get(name):
            raise GateError(f"{name} is {linked.get(name)}, and transformers wants {wanted.get(name)}")
    for shard in shards:
        try:
            file = ShardFile(ForeignFolder(folder), shard.file)
        except (CheckpointError, DataError) as error:
            raise GateError(f"{shard.file} cannot be read: {first_line(error):.200}") from None
        try:
            if file.entries.keys() != {link.theirs for link in shard.links}:
                raise GateError(f"{shard.file} has other tensors than the {len(shard.links)} that belong there")
            for link in shard.links:
                _compare_on_disk(file, link, model)
        finally:
            file.close()
    return GateReport(gate="tensors", num_tensors=len(model.links))


def tokenizer_gate(folder: Path, model: ExportedModel, texts: Iterable[str]) -> None:
    """Compare the ids that AutoTokenizer gives with ours, and the end of a document.

    Texts with a special token in them, or with U+2581 where that stands for a space, are left out, and for a family
    with a splitting of its own those that are not in NFC: the ids of those differ by design.

    Raises:
        GateError: naming the first difference.
    """
    theirs, ours = load_tokenizer(folder), model.tokenizer
    if theirs.eos_token_id != ours.end_of_document:
        raise GateError(f"the tokenizer ends a document with {theirs.eos_token_id}, ours with {ours.end_of_document}")
    if max(theirs.get_vocab().values()) >= model.vocab_size:
        raise GateError(f"the tokenizer has more ids than the {model.vocab_size} rows of the embedding")
    left_out = [*theirs.all_special_tokens, *ours.special_tokens(), "\u2581"]
    is_own = model.family.has_own_splitting
    for text in texts:
        if any(token in text for token in left_out) or (is_own and not is_normalized("NFC", text)):
            continue
        found, expected = theirs(text, add_special_tokens=False, verbose=False)["input_ids"], ours.encode(text).tolist()
        if found != expected:
            differs = f"the tokenizer gives {found[:8]} for {text[:20]!r}, ours {expected[:8]}"
            if is_own:
                raise SplittingError(f"{differs}: for {model.family.name} transformers splits words as Qwen2 does")
            raise GateError(differs)


def our_logits(model: GPT, ids: Tensor) -> Tensor:
    """Return the logits (B, S, V) of rows of ids (B, S), each one document, dropless and without noise."""
    zero, column = torch.zeros_like(ids), torch.arange(ids.shape[1]).expand(ids.shape)
    valid = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(
        tokens=ids,
        targets=zero,
        loss_mask=valid,
        valid=valid,
        document_id=zero,
        position=column.contiguous(),
        domain=zero,
        sample_id=zero,
    )
    logits = model(batch, RoutingOptions(dropless=True), want_logits=True).logits
    assert isinstance(logits, Tensor), "they were wanted"
    return logits


@torch.no_grad()
def is_tied(model: GPT, row: Tensor, limit: float) -> bool:
    """Return whether errors of rounding alone, in what routers see, move the logits of a row by more than `limit`.

    Then two experts score alike there, and any other order of additions may choose the other one.
    """
    expected = our_logits(model, row)
    seen = [parameter for name, parameter in model.named_parameters() if name.endswith(_SEEN_BY_ROUTERS)]
    exact = [parameter.clone() for parameter in seen]
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(_PERTURBATIONS):
            for parameter, value in zip(seen, exact, strict=True):
                parameter.copy_(value * (1 + 2**-23 * torch.randn(value.shape, generator=generator)))
            if float((our_logits(model, row) - expected).abs().max()) > limit:
                return True
        return False
    finally:
        for parameter, value in zip(seen, exact, strict=True):
            parameter.copy_(value)


def _compare_tensors(found: Iterable[tuple[str, Tensor]], model: ExportedModel) -> int:
    """Compare every tensor of theirs with ours; return their number."""
    missing = {link.theirs for link in model.links}
    for name, tensor in found:
        if name not in missing:
            raise GateError(f"transformers has {name}, and ours has no such tensor")
        missing.remove(name)
        _compare_tensor(name, tensor, model)
    if missing:
        raise GateError(f"transformers has no {sorted(missing)[0]} ({len(missing)} such)")
    return len(model.links)


def _compare_tensor(name: str, found: Tensor, model: ExportedModel) -> None:
    link = model.link(name)
    if tuple(found.shape) != link.shape:
        raise GateError(f"{name} is {list(found.shape)}, and ours {list(link.shape)}")
    for (first, last), part in model.parts(link):
        theirs = found if part.shape == link.shape else found[first:last]
        if not torch.equal(theirs.float(), part.float()):
            raise GateError(f"{name} is not the tensor of the checkpoint")


def _compare_on_disk(file: ShardFile, link: Link, model: ExportedModel) -> None:
    entry = file.entries[link.theirs]
    if (entry.dtype, entry.shape) != (model.dtype_of(link), link.shape):
        what = f"{entry.dtype} {list(entry.shape)}, and {model.dtype_of(link)} {list(link.shape)} was to be written"
        raise GateError(f"{link.theirs} is {what}")
    for (first, last), part in model.parts(link):
        theirs = file.read(link.theirs) if part.shape == link.shape else file.read(link.theirs, first, last)
        if not torch.equal(theirs, part):
            raise GateError(f"{link.theirs} is not the tensor of the checkpoint")


def _compare_config(folder: Path, model: ExportedModel) -> None:
    """Check that config.json, read again, is our model."""
    try:
        values = json.loads((folder / "config.json").read_text())
        returned = inference_values(ModelConfig.model_validate(family_of(values).from_hf(values)))
    except (OSError, ValueError, DataError) as error:
        raise GateError(f"config.json: {first_line(error):.300}") from None
    for key, value in inference_values(model.config).items():
        if returned.get(key) != value:
            raise GateError(f"config.json says {key} {returned.get(key)}, and the model has {value}")
