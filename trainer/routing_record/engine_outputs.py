"""Read what inference engines return of their routing: JSON Lines, one sequence a line.

    prompt_token_ids or input_ids     ids that were given
    token_ids or output_ids           ids that were written; [] if none
    routed_experts                    experts, also in meta_info or sgl_ext (SGLang):
                                        a nested list (n, layers, k);
                                        base64 of a .npy file (vLLM over HTTP);
                                        base64 of flat int32 (SGLang)
    prompt_routed_experts             those of the prompt alone (vLLM 0.21); then routed_experts are of what was written
    loss_mask                         n zeros and ones; without it, what was written is learned
    sample_id                         number of the sequence; without it, its place in the files

An engine never reads the last token that it writes, so there are experts of all n tokens or of the first n - 1.

# n tokens of a sequence, k experts per token.
"""

import base64
import io
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record
from trainer.data.records.json_lines import JsonlReader
from trainer.errors import DataError
from trainer.models.config import ModelConfig
from trainer.routing_record.expert_ids import repeated_expert, unknown_expert
from trainer.routing_record.record_manifest import ModelFacts, RecordFacts, RecordManifest
from trainer.routing_record.record_writer import RecordWriter, RoutedSequence, finish_record


def import_engine_outputs(files: Sequence[Path], folder: Path, model: ModelConfig, *, made_by: str) -> RecordManifest:
    """Make a record of what an engine returned for a model, and return its manifest.

    Raises:
        DataError: naming file, line, token and layer.
    """
    facts, sequences, highest = ModelFacts.of(model), list[RoutedSequence](), 0
    reader = JsonlReader([str(file) for file in files])
    for part in reader.parts():
        for entry in reader.entries(part):
            if isinstance(entry, BadRecord):
                raise DataError(str(entry)) from None
            sequence = sequence_of_output(entry, facts, num_layers=model.num_layers, number=len(sequences))
            sequences.append(sequence)
            highest = max(highest, int(sequence.tokens.max()))
    if not sequences:
        raise DataError(f"{reader}: has no sequence; give files with some")
    writer = RecordWriter(folder, facts, vocab_size=highest + 1)
    for sequence in sequences:
        writer.add(sequence)
    writer.flush()
    return finish_record(folder, RecordFacts(origin="engine", made_by=made_by, model=facts, vocab_size=highest + 1))


def sequence_of_output(record: Record, model: ModelFacts, *, num_layers: int, number: int) -> RoutedSequence:
    """Return the sequence of a record; `num_layers` are all blocks, and `number` counts sequences.

    Raises:
        DataError: naming the record, and the token and layer in it.
    """
    where, values = record.where, record.values
    prompt = _ids(record, "prompt_token_ids", "input_ids")
    written = _ids(record, "token_ids", "output_ids")
    tokens = np.concatenate([prompt, written])
    if not len(tokens):
        raise DataError(f"{where}: has no token; remove it")
    if _find(values, "routed_experts_start_len") not in (None, 0):
        raise DataError(f"{where}: routed_experts_start_len leaves out the experts of a prefix; join the parts before")
    columns = [name for name in ("prompt_routed_experts", "routed_experts") if _find(values, name) is not None]
    if not columns:
        raise DataError(f"{where}: has no routed_experts; start the engine with --enable-return-routed-experts")
    shapes = _Shapes(len(tokens), model.top_k, len(model.moe_layers), num_layers)
    arrays = [_experts(record, name, shapes) for name in columns]
    experts = np.concatenate([_of_model(array, where, model, num_layers) for array in arrays])
    if len(tokens) - len(experts) not in (0, 1):
        raise DataError(
            f"{where}: has {len(tokens)} tokens and the experts of {len(experts)}; a sequence has those of all tokens "
            "or of all but the last; join streamed parts, and give the prompt"
        )
    if unknown := unknown_expert(experts, model):
        raise DataError(f"{where}: {unknown}")
    if repeated := repeated_expert(experts, model):
        raise DataError(f"{where}: {repeated}; ask it without prefix cache")
    learned = _find(values, "loss_mask")
    if learned is None:
        learned = [False] * len(prompt) + [True] * len(written)
    elif not (isinstance(learned, list) and len(learned) == len(tokens) and all(v in (0, 1) for v in learned)):
        raise DataError(f"{where}: loss_mask is no list of {len(tokens)} zeros and ones, one for each token")
    sample_id = values.get("sample_id", number)
    if type(sample_id) is not int or not 0 <= sample_id < 1 << 63:
        raise DataError(f"{where}: sample_id is no whole number; leave it out, or number the sequences")
    return RoutedSequence(tokens=tokens, experts=experts, is_learned=np.array(learned, bool), sample_id=sample_id)


def _find(values: dict[str, Any], name: str) -> Any:
    """Return a value of a record, or of what SGLang nests in it; None if there is none."""
    for place in (values, values.get("meta_info"), values.get("sgl_ext")):
        if isinstance(place, dict) and place.get(name) is not None:
            return place[name]
    return None


def _ids(record: Record, *names: str) -> NDArray[np.int64]:
    """Return the token ids of the first of these columns that is there."""
    for name in names:
        if (ids := record.values.get(name)) is not None:
            if isinstance(ids, list) and all(type(one) is int and 0 <= one < 1 << 24 for one in ids):
                return np.array(ids, np.int64)
            raise DataError(f"{record.where}: {name} is no list of token ids; give ids, not text")
    raise DataError(f"{record.where}: has no {' or '.join(names)}; add the ids that the engine was given or wrote")


class _Shapes(NamedTuple):
    """What an array without a shape may have."""

    num_tokens: int
    top_k: int
    moe_layers: int
    all_layers: int


def _experts(record: Record, name: str, shapes: _Shapes) -> NDArray[np.int64]:
    """Return the experts of a column (n, layers, k)."""
    value = _find(record.values, name)
    try:
        array = _decoded(value, shapes) if isinstance(value, str) else np.array(value)
    except (ValueError, EOFError) as error:  # of base64, of numpy
        raise DataError(f"{record.where}: {name} cannot be read ({error!s:.200}); give base64 or a list") from None
    if array.ndim != 3 or array.dtype.kind not in "iu":
        shape = f"{array.dtype} of shape {list(array.shape)}"
        raise DataError(f"{record.where}: {name} is {shape}, not whole numbers of (tokens, layers, experts per token)")
    return array.astype(np.int64)


def _decoded(text: str, shapes: _Shapes) -> NDArray[Any]:
    """Return the array in base64: of a .npy file, or flat int32 of one of the shapes that an engine gives."""
    content = base64.b64decode(text, validate=True)
    if content.startswith(b"\x93NUMPY"):
        _check_npy_size(content)
        return np.load(io.BytesIO(content), allow_pickle=False)
    flat = np.frombuffer(content, "<i4")
    for layers in (shapes.all_layers, shapes.moe_layers):
        for num_tokens in (shapes.num_tokens - 1, shapes.num_tokens):
            if len(flat) == num_tokens * layers * shapes.top_k:
                return flat.reshape(num_tokens, layers, shapes.top_k)
    raise ValueError(
        f"{len(flat)} numbers are not those of {shapes.num_tokens - 1} or {shapes.num_tokens} tokens in "
        f"{shapes.moe_layers} or {shapes.all_layers} layers, {shapes.top_k} each"
    )


def _check_npy_size(content: bytes) -> None:
    """Raise a ValueError if the header of a .npy file promises more than there is: numpy would allocate it first."""
    stream = io.BytesIO(content)
    is_first_version = np.lib.format.read_magic(stream) == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if is_first_version else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    promised, found = prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if promised != found:
        raise ValueError(f"its header says {promised} bytes, and there are {found}")


def _of_model(array: NDArray[np.int64], where: str, model: ModelFacts, num_layers: int) -> NDArray[np.int64]:
    """Return the layers with experts (n, L, k) of an array that has those, or all layers of the model."""
    _, layers, top_k = array.shape
    if top_k != model.top_k:
        fused = "; further ones are shared experts that the engine has fused: turn that off"
        more = fused if top_k > model.top_k else ""
        raise DataError(f"{where}: has {top_k} experts per token, and the model has {model.top_k}{more}")
    if layers == len(model.moe_layers):
        return array
    if layers == num_layers:
        return array[:, model.moe_layers]
    raise DataError(
        f"{where}: has {layers} layers, and the model has {len(model.moe_layers)} with experts, of {num_layers}; name "
        "the model that the engine ran"
    )
