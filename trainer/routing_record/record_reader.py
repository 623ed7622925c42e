"""Read a routing record as untrusted input: hashes first, then every sequence by place.

# n tokens of a sequence, m sequences of the record, L MoE layers, k experts per token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import StoredFile
from trainer.checkpoint.safetensors_file import open_tensors
from trainer.config.nodes import shown_path
from trainer.data.tokenizers.base import token_dtype
from trainer.errors import CheckpointError, DataError
from trainer.routing_record.expert_ids import repeated_expert, unknown_expert
from trainer.routing_record.record_manifest import TENSORS, read_record_manifest
from trainer.routing_record.record_writer import RoutedSequence, expert_dtype
from trainer.routing_record.trace_facts import trace_tensors

_NAMES = {"u1": "U8", "u2": "U16", "u4": "U32", "i8": "I64", "b1": "BOOL", "f4": "F32", "f8": "F64"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Index:
    """Where the sequences of a record are; every field is (m,)."""

    sample_id: NDArray[np.int64]
    domain: NDArray[np.int64]
    file: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]


class RoutingRecord:
    """A complete record, whose sequences are numbered from 0 in the order of its files."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open a record; `verify` compares the hashes of all files, which one rank of many does.

        Raises:
            DataError: naming the place, if the record is incomplete, damaged or of another form.
        """
        self.folder, self.manifest = folder, read_record_manifest(folder)
        trace, model = self.manifest.trace, self.manifest.model
        sizes = {"num_layers": len(model.moe_layers), "top_k": model.top_k}
        self._further = {} if trace is None else trace_tensors(trace, **sizes)
        self._names, self._files, parts = sorted(self.manifest.files), list[Any](), list[_Index]()
        for number, name in enumerate(self._names):
            self._files.append(self._opened(name, verify))
            parts.append(self._indexed(number))
        fields = _Index.__dataclass_fields__
        self.index = _Index(**{field: np.concatenate([getattr(part, field) for part in parts]) for field in fields})

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self.index.sample_id)

    def lengths(self) -> NDArray[np.int64]:
        """Return (m,) the number of tokens of each sequence."""
        return self.index.end - self.index.start

    def place(self, number: int) -> str:
        """Return the place of a sequence, for messages."""
        first = int(np.searchsorted(self.index.file, self.index.file[number]))
        name, row = self._names[self.index.file[number]], int(self.index.sample_id[number])
        return f"{shown_path(self.folder / name)}: sequence {number - first} (sample_id {row})"

    def sequence(self, number: int) -> RoutedSequence:
        """Return a sequence, whose experts were checked; those of a last token that was not read are left out.

        Raises:
            DataError: naming file, sequence, token and layer.
        """
        index, file = self.index, self._files[self.index.file[number]]
        here = slice(int(index.start[number]), int(index.end[number]))
        tokens = file.get_slice("token_ids")[here].astype(np.int64)
        experts = file.get_slice("expert_ids")[here]
        if tokens.max(initial=0) >= self.manifest.vocab_size:
            at = int(np.argmax(tokens >= self.manifest.vocab_size))
            self._refuse(number, f"token {at}: id {tokens[at]}, and ids are below {self.manifest.vocab_size}")
        if (experts[-1] == np.iinfo(experts.dtype).max).all():
            experts = experts[:-1]
        traced = {name: file.get_slice(name)[here] for name in self._further}
        listed = np.concatenate([experts, traced["further_experts"]], -1) if "further_experts" in traced else experts
        if wrong := unknown_expert(listed, self.manifest.model) or repeated_expert(listed, self.manifest.model):
            self._refuse(number, wrong)
        for name in {"scores", "combine_weights"} & traced.keys():
            if (bad := np.argwhere(~np.isfinite(traced[name]))).size:
                token, layer, slot = bad[0].tolist()
                where = f"token {token}, layer {self.manifest.model.moe_layers[layer]}"
                self._refuse(number, f"{where}: {name} {traced[name][token, layer, slot]}")
        return RoutedSequence(
            tokens=tokens,
            experts=experts,
            is_learned=file.get_slice("is_learned")[here],
            sample_id=int(index.sample_id[number]),
            domain=int(index.domain[number]),
            traced=traced,
        )

    def _refuse(self, number: int, what: str) -> NoReturn:
        raise DataError(f"{self.place(number)}, {what}; record again")

    def _opened(self, name: str, verify: bool) -> Any:
        """Open a file whose size, hash, and tensors are as they should be."""
        entry, path = self.manifest.files[name], self.folder / name
        try:
            stored = StoredFile(size_bytes=entry.size_bytes, sha256=entry.sha256)
            check_file(self.folder, name, stored, with_content=verify)
            file = open_tensors(path, "numpy")
        except CheckpointError as error:
            raise DataError(f"{error}; record again") from None
        model, n, m = self.manifest.model, entry.num_tokens, entry.num_sequences
        expected = {
            "token_ids": ([n], token_dtype(self.manifest.vocab_size)),
            "expert_ids": ([n, len(model.moe_layers), model.top_k], expert_dtype(model.num_choices)),
            "is_learned": ([n], np.dtype(bool)),
            "sequence_starts": ([m + 1], np.dtype("<i8")),
            "sample_id": ([m], np.dtype("<i8")),
            "domain": ([m], np.dtype("<i8")),
        }
        for tensor, (shape, dtype) in self._further.items():
            expected[tensor] = ([n, *shape], expert_dtype(model.num_choices) if dtype == "experts" else np.dtype(dtype))
        there, names = set(file.keys()), (*TENSORS, *self._further)
        for tensor in names:
            if tensor not in there:
                raise DataError(f"{shown_path(path)}: has no {tensor}; a routing record has {', '.join(names)}")
            part, (shape, dtype) = file.get_slice(tensor), expected[tensor]
            found, wanted = (part.get_shape(), part.get_dtype()), (shape, _NAMES[dtype.str[1:]])
            if found != wanted:
                raise DataError(
                    f"{shown_path(path)}: {tensor} is {found[1]} of shape {found[0]}, not {wanted[1]} of shape "
                    f"{wanted[0]}, as the manifest has it; record again"
                )
        return file

    def _indexed(self, number: int) -> _Index:
        file, name = self._files[number], self._names[number]
        starts, num_tokens = file.get_tensor("sequence_starts"), self.manifest.files[name].num_tokens
        if starts[0] != 0 or starts[-1] != num_tokens or (np.diff(starts) < 1).any():
            raise DataError(
                f"{shown_path(self.folder / name)}: sequence_starts does not ascend from 0 to {num_tokens}; record "
                "again"
            )
        sample_id, domain = file.get_tensor("sample_id"), file.get_tensor("domain")
        where = np.full(len(sample_id), number, np.int64)
        return _Index(sample_id=sample_id, domain=domain, file=where, start=starts[:-1], end=starts[1:])
