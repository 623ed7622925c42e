"""Faults of optimizer steps, initial weights and FLOP counts."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "norms, biases and embeddings are decayed",
        "optim/adamw.py",
        "(list(not_decayed), 0.0)",
        "(list(not_decayed), weight_decay)",
        "engine/test_native.py",
        "models/test_initialize.py",
    ),
    in_package(
        "the optimizer ignores betas",
        "optim/adamw.py",
        "betas=betas, ",
        "",
        "optim/test_adamw.py",
        "engine/test_native.py::test_clipping_scales_the_whole_gradient_once",
    ),
    in_package(
        "the optimizer ignores eps",
        "optim/adamw.py",
        ", eps=eps",
        "",
        "optim/test_adamw.py",
        "engine/test_native.py::test_weight_decay_goes_by_role",
    ),
    in_package(
        "the gradient's norm is added up as it is and not squared",
        "engine/reduce.py",
        ".double().square()",
        ".double()",
        "engine/test_native.py",
    ),
    in_package(
        "a spike is judged by the variance",
        "training/spikes.py",
        "self.sigmas * math.sqrt(variance)",
        "self.sigmas * variance",
        "training/test_spikes.py",
    ),
    in_package(
        "one more spike than the patience is skipped",
        "training/spikes.py",
        "self.skipped_in_a_row < self.patience",
        "self.skipped_in_a_row <= self.patience",
        "training/test_spikes.py",
    ),
    in_package(
        "experts are blamed before dense weights",
        "engine/nonfinite.py",
        "ranks = dense or [rank for rank, mine in enumerate(findings) if not mine.expert_share_is_finite]",
        "ranks = [rank for rank, mine in enumerate(findings) if not mine.expert_share_is_finite] or dense",
        "engine/test_nonfinite.py",
    ),
    in_package(
        "training is counted as two forward passes",
        "models/flops.py",
        "return 3 * self",
        "return 2 * self",
        "models/test_flops.py",
    ),
    in_package(
        "attention's values cost nothing",
        "models/flops.py",
        "sum(model.config.head_widths)",
        "model.config.head_widths[0]",
        "models/test_flops.py",
    ),
    in_package(
        "a step's balance loss is of its last micro-batch",
        "engine/reduce.py",
        "share.balance_loss + (0 if self.balance_loss is None else self.balance_loss)",
        "share.balance_loss",
        "engine/test_reduce.py",
    ),
    in_package(
        "experts of every rank start alike",
        "models/initialize.py",
        "first_expert[name] + e)",
        "e)",
        "models/test_initialize.py::test_an_expert_does_not_depend_on_the_rank_that_holds_it",
    ),
]
