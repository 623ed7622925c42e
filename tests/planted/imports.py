"""Faults of imports of published models."""

from tests.planted.fault import in_package as _fault

IMPORT = "convert/test_hf_import.py"
REFUSALS = "convert/test_import_refusals.py::"

CONFIGS = "families/test_hf_config.py"

FAULTS = [
    _fault(
        "keys that a config.json leaves out are nought",
        "families/base.py",
        "{**self.defaults, **config}",
        "{**config}",
        CONFIGS,
    ),
    _fault(
        "rope_scaling beside rope_parameters is not read",
        "families/rope_keys.py",
        "if newer and scaling and newer != scaling:",
        "if newer and scaling and newer == scaling:",
        CONFIGS,
    ),
    _fault(
        "rows of an imported tensor begin at the first of theirs",
        "convert/linked_weights.py",
        "source.read(link.theirs, begin, end)",
        "source.read(link.theirs, 0, end - begin)",
        "convert/test_linked_weights.py",
    ),
    _fault(
        "a later slice of a checkpoint begins at 0",
        "checkpoint/streamed.py",
        "StoredSlice(file=file, start=part.start,",
        "StoredSlice(file=file, start=0,",
        "checkpoint/test_streamed.py",
    ),
    _fault(
        "moments that are not stored are those in memory",
        "checkpoint/tensor_files.py",
        "torch.zeros(shape, dtype=like.tensor.dtype)",
        "torch.ones(shape, dtype=like.tensor.dtype)",
        "checkpoint/test_streamed.py::test_an_engine_starts_from_weights_alone",
    ),
    _fault(
        "a link out of a published folder is followed",
        "convert/foreign_folder.py",
        "if not any(real.is_relative_to(folder) for folder in allowed):",
        "if not any(real.is_absolute() for folder in allowed):",
        f"{REFUSALS}test_one_file[weights lead elsewhere]",
    ),
    _fault(
        "a tensor may be in two shards",
        "convert/safetensors_folder.py",
        "where.get(name) != file:",
        "name not in where:",
        f"{REFUSALS}test_several_files[a tensor in another shard]",
    ),
    _fault(
        "a written tensor is compared with itself",
        "convert/compare_tensors.py",
        "if not torch.equal(to_theirs(ours, part), theirs.to(ours.dtype)):",
        "if not torch.equal(to_theirs(ours, part), to_theirs(ours, part)):",
        f"{IMPORT}::test_two_tensors_exchanged_on_the_way_are_noticed",
    ),
    _fault(
        "a scale of fp8 is that of the block before",
        "convert/dequantized.py",
        "[first % self._block.rows :]",
        "[0:]",
        "convert/test_dequantized.py",
    ),
]
