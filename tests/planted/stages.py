"""Faults of runs that begin with the weights of others."""

from tests.planted.fault import in_package as _fault

STARTS = "convert/test_init_weights.py"
ROWS = "convert/test_vocabulary_rows.py"
REFUSALS = "commands/test_init_from_parent.py"

FAULTS = [
    _fault(
        "a new run's optimizer counts from its own first step",
        "convert/init_plan.py",
        'return {"optimizer_steps": self.optimizer_steps}',
        'return {"optimizer_steps": 0}',
        STARTS,
    ),
    _fault(
        "weights without a source have moments as old as the others",
        "convert/init_plan.py",
        "self._since[parameter] = self.optimizer_steps",
        "self._since[parameter] = 0",
        STARTS,
    ),
    _fault(
        "pieces of both vocabularies keep their ids",
        "convert/vocabulary_rows.py",
        "[i if _has_bytes(old, i, content) else pieces[content]]",
        "[min(i, old.vocab_size - 1)]",
        ROWS,
    ),
    _fault(
        "the least used experts are taken over",
        "convert/other_experts.py",
        "(-counts[e], e)",
        "(counts[e], e)",
        STARTS,
    ),
    _fault(
        "a parent is read again after the first checkpoint",
        "commands/init_from_parent.py",
        "if config.init_from is None or CheckpointFolder(folder.checkpoints).steps():",
        "if config.init_from is None:",
        STARTS,
    ),
    _fault(
        "a tensor that nobody takes is forgotten",
        "convert/match_tensors.py",
        "if name not in found and not _is_excluded(init, name):",
        "if False:",
        REFUSALS,
    ),
]
