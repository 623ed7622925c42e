"""Faults of micro-batches that overlap: their order, their gradients, and the weights that they share."""

from tests.planted.fault import in_package

LAW = "tests/laws/test_overlap.py"
STAGES = "tests/laws/test_overlapped_stages.py"
BITS = f"{LAW}::test_a_pair_is_the_same_bits"
LEARNS = f"{STAGES}::test_stages_whose_micro_batches_overlap_learn_what_one_rank_learns"
SHARDED = f"{LAW}::test_every_layout_learns_the_same[sharded]"

FAULTS = [
    in_package(
        "two micro-batches of a pair run one after the other",
        "engine/passes.py",
        "zip(run.overlapped(pair, [None, None], self._layers), pair, strict=True)",
        "zip([run(batch, None, self._layers) for batch in pair], pair, strict=True)",
        f"{LAW}::test_rows_of_one_micro_batch_travel_while_the_other_is_computed",
    ),
    in_package(
        "experts compute the micro-batch first whose rows left last",
        "moe/layer.py",
        "return [self._compute(of_batch, experts) for of_batch in rows]",
        "return [self._compute(of_batch, experts) for of_batch in rows[::-1]][::-1]",
        f"{LAW}::test_rows_of_one_micro_batch_travel_while_the_other_is_computed",
    ),
    in_package(
        "the last of an odd number of micro-batches is left out",
        "engine/passes.py",
        "if len(batches) % 2:",
        "if len(batches) % 2 and len(batches) == 1:",
        SHARDED,
    ),
    in_package(
        "the objective of a pair is that of its first micro-batch",
        "engine/passes.py",
        "gradients.backward(torch.stack(parts).sum())",
        "gradients.backward(parts[0])",
        BITS,
    ),
    in_package(
        "sharded gradients of the last pair are not reduced",
        "engine/passes.py",
        "is_last=pair[-1] is batches[-1]",
        "is_last=pair[0] is batches[-1]",
        f"{LAW}::test_every_layout_learns_the_same[sharded, outputs compared]",
    ),
    in_package(
        "gradients of a pair are summed in bfloat16",
        "engine/passes.py",
        "self.engine.autocast(keeps_casts=False)",
        "self.engine.autocast()",
        BITS,
    ),
    in_package(
        "experts are not gathered for a pair",
        "parallel/shard.py",
        'register_fsdp_forward_method(moe, "compute")',
        'register_fsdp_forward_method(moe, "finish")',
        SHARDED,
    ),
    in_package(
        "a pair has the statistics of its first micro-batch",
        "models/blocks.py",
        "*(before[number] for before in moe), last",
        "*(before[0] for before in moe), last",
        BITS,
    ),
    in_package(
        "a layer's outputs are lost where the next block has no experts",
        "models/block.py",
        "            x, before = stream.arrived()\n",
        "            x, before = stream.arrived() if isinstance(self.ffn, MoE) else (stream.x, stream.arrived()[1])\n",
        f"{LAW}::test_every_layout_learns_the_same[documents, a tied embedding, dense layers]",
    ),
    in_package(
        "two micro-batches of a pair run through a stage one after the other",
        "engine/pipeline.py",
        "return run.overlapped(batches, before, layers)",
        "return [run(*one, layers) for one in zip(batches, before, strict=True)]",
        f"{STAGES}::test_rows_of_one_micro_batch_travel_while_the_other_of_its_pair_is_computed[gpipe]",
    ),
    in_package(
        "both micro-batches of a pair go on from the first one's residual stream",
        "engine/pipeline.py",
        "else hidden.chunk(len(batches))",
        "else [hidden.chunk(len(batches))[0]] * len(batches)",
        f"{LEARNS}[global balance-1f1b]",
    ),
    in_package(
        "a stage learns from the losses of the first micro-batch of a pair",
        "engine/pipeline.py",
        "part = torch.stack(parts).sum()",
        "part = parts[0]",
        f"{LEARNS}[global balance-zbv]",
    ),
    in_package(
        "the last of an odd number of micro-batches passes no stage",
        "engine/pipeline.py",
        "for i in range(0, len(batches), self._at_once)]",
        "for i in range(0, len(batches) - self._at_once + 1, self._at_once)]",
        f"{LEARNS}[global balance-gpipe, an odd number]",
    ),
    in_package(
        "a stage waits for as many backward passes as micro-batches before it reduces",
        "engine/pipeline.py",
        "is_last=num_backward == len(passes) * len(self.mine)",
        "is_last=num_backward == len(batches) * len(self.mine)",
        f"{LEARNS}[global balance-interleaved]",
    ),
    in_package(
        "a schedule needs as many micro-batches as it needs pairs",
        "parallel/pipeline_stages.py",
        "number = num_passes(num_micro_batches, at_once)",
        "number = num_micro_batches",
        "parallel/test_pipeline_stages.py::test_pairs_count_as_one_pass",
    ),
    in_package(
        "a short pipeline is measured with as many micro-batches as passes",
        "plan/measure_stages.py",
        "first, taken = (min(passes * own.at_once, batches) for passes in (place.first, place.taken))",
        "first, taken = (min(passes, batches) for passes in (place.first, place.taken))",
        "plan/test_measure_stages.py::test_a_pipeline_needs_what_a_shorter_one_tells[2-overrides2]",
    ),
]
