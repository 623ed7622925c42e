"""Faults of a pipeline: what its stages sum, count and send."""

from tests.planted.fault import in_package

LAW = "tests/laws/test_pipeline.py"
_EVALUATED = "tests/laws/test_evaluation_layouts.py::test_many_ranks_score_and_generate_the_same_as_one_process"
TASKS = f"{_EVALUATED}[2 stages-13]"
BACK = f"{_EVALUATED}[2 stages, there and back, of 2 ranks with experts, sharded-13]"

FAULTS = [
    in_package(
        "a tied embedding learns from its first use alone",
        "engine/native.py",
        "            self.mesh.tied.all_reduce_(local(self._tied.grad))",
        "            pass",
        LAW,
    ),
    in_package(
        "a tied embedding is in the norm of two stages",
        "engine/native.py",
        "if p is not self._tied or self.mesh.tied.index == 0",
        "if p is not self._tied or True",
        LAW,
    ),
    in_package(
        "the balance loss is a mean over the layers of a stage",
        "engine/step_sums.py",
        "num_moe_layers=layers.total",
        "num_moe_layers=len(layers.numbers)",
        LAW,
    ),
    in_package(
        "the balance loss of a stage teaches nothing",
        "engine/pipeline.py",
        "return grad, ctx.one, None, None",
        "return grad, 0 * ctx.one, None, None",
        LAW,
    ),
    in_package(
        "only the last stage sums the z-loss of logits",
        "models/gpt.py",
        "(coef, zeros.sum()) if coef > 0 else None",
        "None",
        LAW,
    ),
    in_package(
        "a stage clips by its own norm",
        "engine/step.py",
        "square, reduced_choices, *rest = all_reduce_packed(parts, self.mesh.world)",
        "square, reduced_choices, *rest = all_reduce_packed(parts, self.mesh.stage)",
        LAW,
    ),
    in_package(
        "every stage counts the tokens of a step",
        "engine/global_stats.py",
        "if mesh.pp.index > 0:",
        "if mesh.pp.index > 99:",
        LAW,
    ),
    in_package(
        "every stage counts the tokens of an evaluation",
        "engine/step.py",
        "batch.target_mask.sum() * self.passes.has_last",
        "batch.target_mask.sum()",
        LAW,
    ),
    in_package(
        "a stage balances by the counts of the first layers",
        "engine/step_sums.py",
        "previous_counts=layers.taken(self.previous_counts)",
        "previous_counts=self.previous_counts[: len(layers.numbers)]",
        LAW,
    ),
    in_package(
        "stages answer other questions",
        "evaluation/context.py",
        "return self.world.index % (self.world.size // self.pp.size) // self.tp.size",
        "return self.world.index // self.tp.size",
        TASKS,
    ),
    in_package(
        "each stage sends the scores of its share",
        "evaluation/context.py",
        "return self.tp.index == 0 and self.pp.index == 0",
        "return self.tp.index == 0",
        TASKS,
    ),
    in_package(
        "layers of a stage share the first place of its cache",
        "models/kv_cache.py",
        "layer=self.cache.layers.index(layer)",
        "layer=0",
        TASKS,
    ),
    in_package(
        "a rank whose stages are neighbours forgets what one hands the other",
        "parallel/stage_relay.py",
        "self._kept[stage].append(hidden)",
        "self._kept[stage].append(torch.zeros_like(hidden))",
        BACK,
    ),
    in_package(
        "each stage samples by the logits that it has",
        "parallel/stage_relay.py",
        "self.group.broadcast_(message, source=self.stages.rank_of(self.stages.number - 1))",
        "self.group.broadcast_(message.clone(), source=self.stages.rank_of(self.stages.number - 1))",
        TASKS,
    ),
    in_package(
        "ranks of a pipeline have other rows",
        "distributed/rank_layout.py",
        "return self.rank % self.stage_size // self.row_size",
        "return self.rank // self.row_size",
        "distributed/test_rank_layout.py",
    ),
]
