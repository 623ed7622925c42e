"""Faults of optimizer steps, initial weights and FLOP counts."""

from tests.planted.fault import in_package

AVERAGE_LAW = "tests/laws/test_weight_average.py"
FAULTS = [
    in_package(
        "an evaluation of the average leaves it in the weights that are gathered",
        "parallel/accumulate.py",
        "            module.reshard()",
        "            pass",
        f"{AVERAGE_LAW}::test_on_two_ranks_it_is_torchs_is_evaluated_and_resumes_in_another_layout",
    ),
    in_package(
        "a skipped step moves the average of the weights",
        "engine/step.py",
        """        if skipped:
            self._drop_gradients()
""",
        """        if skipped:
            if self.average is not None:
                self.average.update(self.optimizer_steps)
            self._drop_gradients()
""",
        f"{AVERAGE_LAW}::test_the_average_is_torchs_in_one_process",
    ),
    in_package(
        "a resumed average forgets how often it was updated",
        "engine/base.py",
        "int(state.values.get(UPDATES, 0))",
        "0",
        f"{AVERAGE_LAW}::test_on_two_ranks_it_is_torchs_is_evaluated_and_resumes_in_another_layout",
    ),
    in_package(
        "some averages may be missing in a checkpoint",
        "checkpoint/compatible.py",
        "    if not all(averages):",
        "    if True:",
        f"{AVERAGE_LAW}::test_a_checkpoint_that_lacks_some_averages_is_refused",
    ),
    in_package(
        "some weights are read without their average",
        "checkpoint/manifest.py",
        "not learning <= averages.keys() <= self.tensors.keys()",
        "not averages.keys() <= self.tensors.keys()",
        "checkpoint/test_manifest.py",
    ),
    in_package(
        "averaged weights are found under their own names",
        "checkpoint/manifest.py",
        "        read._kept_as = name\n",
        "",
        "training/test_load_trained.py",
    ),
    in_package(
        "pieces of a partition begin at its start",
        "engine/deepspeed/partition.py",
        "            at += piece.numel()\n",
        "",
        "engine/deepspeed/test_partition.py",
    ),
    in_package(
        "DeepSpeed copies the frozen experts of rank 0 to all ranks",
        "engine/deepspeed/start.py",
        "ds_optim_param=True",
        "no_such_mark=True",
        "tests/laws/test_freeze.py::test_deepspeed_freezes_too",
    ),
    in_package(
        "the gradient of a frozen head is made",
        "ops/cross_entropy.py",
        "dtype=_wide(weight.dtype)) if needed.weight else None",
        "dtype=_wide(weight.dtype))",
        "ops/test_cross_entropy.py::test_the_gradient_of_a_frozen_input_is_not_computed",
    ),
    in_package(
        "a factor of the learning rate is ignored",
        "optim/create.py",
        "lr * group.get(RATE_FACTOR, 1.0)",
        "lr",
        "optim/test_create.py",
    ),
    in_package(
        "several factors of a weight are added",
        "models/parameter_patterns.py",
        "return prod(factor for",
        "return sum(factor for",
        "models/test_parameter_patterns.py",
    ),
    in_package(
        "weights that learn again go on with the steps of the run",
        "engine/native.py",
        "self.optimizer_steps - self.moments_since.get(name, 0)",
        "self.optimizer_steps",
        "tests/laws/test_freeze.py::test_a_resumed_run_with_another_list_begins_moments_anew",
    ),
    in_package(
        "the selection bias of a frozen router moves on",
        "engine/step.py",
        "if not is_frozen(moe.router):",
        "if moe.router:",
        "tests/laws/test_freeze.py::test_a_selection_bias_stops_with_its_router",
    ),
    in_package(
        "an exception is ignored",
        "models/parameter_patterns.py",
        "return not excepted and any(",
        "return any(",
        "models/test_parameter_patterns.py",
    ),
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
        "self.backward += flops * ((self._has_gradient or has_gradient) + learns)",
        "self.backward += flops * (self._has_gradient or has_gradient)",
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
        "numbers[name][e])",
        "e)",
        "models/test_initialize.py::test_an_expert_does_not_depend_on_the_rank_that_holds_it",
    ),
]
