"""Faults of the content of checkpoints and of pruning."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "the first rank writes everything",
        "checkpoint/plan.py",
        "min(ranks, key=lambda rank: (load[rank], rank))",
        "min(ranks)",
        "checkpoint/test_plan.py",
    ),
    in_package(
        "an expert that is not finite has its number on the rank",
        "checkpoint/finite.py",
        "experts[0] + part.start",
        "experts[0]",
        "checkpoint/test_finite.py",
    ),
    in_package(
        "a sum that overflows is taken for a bad number",
        "checkpoint/finite.py",
        "if not tensor.isfinite().all()]",
        "]",
        "checkpoint/test_finite.py",
    ),
    in_package(
        "an overlap of one index is whole",
        "checkpoint/coverage.py",
        "if start < end:",
        "if start < end - 1:",
        "checkpoint/test_manifest.py",
        "checkpoint/test_plan.py",
    ),
    in_package(
        "one moment of experts is enough",
        "checkpoint/coverage.py",
        "if found is None or list(found)",
        "if found is not None and list(found)",
        "checkpoint/test_manifest.py",
        "checkpoint/test_plan.py",
    ),
    in_package(
        "a manifest's hash is not compared",
        "checkpoint/manifest_file.py",
        "recorded == hash_values(values)",
        "len(recorded) == len(hash_values(values))",
        "checkpoint/test_manifest.py::test_a_manifest_with_another_hash_is_damaged",
    ),
    in_package(
        "a file has to hold its largest tensor only",
        "checkpoint/manifest.py",
        "stored_bytes[part.file] += part",
        "stored_bytes[part.file] = part",
        "checkpoint/test_manifest.py::test_a_file_has_to_hold_all_of_its_tensors_together",
    ),
    in_package(
        "a tensor of another shape fits",
        "checkpoint/compatible.py",
        "if tuple(saved.shape) != part.global_shape:",
        "if len(saved.shape) != len(part.global_shape):",
        "checkpoint/test_compatible.py",
        "checkpoint/test_save_and_load.py",
    ),
    in_package(
        "a tensor of another dtype fits",
        "checkpoint/compatible.py",
        "if saved.dtype != dtype:",
        "if saved.dtype[:5] != dtype[:5]:",
        "checkpoint/test_compatible.py",
        "checkpoint/test_save_and_load.py",
    ),
    in_package(
        "pruning counts from the oldest checkpoint",
        "checkpoint/tools/pruning.py",
        "newest=intact[-1]",
        "newest=intact[0]",
        "checkpoint/tools/test_pruning.py",
    ),
    in_package(
        "damaged checkpoints count among those that are kept",
        "checkpoint/checkpoint_folder.py",
        "num_intact += self.is_intact(step)",
        "num_intact += 1",
        "checkpoint/tools/test_pruning.py",
        "checkpoint/test_save_and_load.py",
    ),
]
