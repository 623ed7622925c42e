"""Faults of counting: tokens, choices and steps."""

from tests.planted.fault import Fault, in_package

PARITY = "tests/laws/test_transformers_parity.py"
NATIVE = "tests/unit/engine/test_native.py"
ORACLE = "tests/laws/test_oracle.py"
STATS = "tests/unit/moe/test_stats.py"
WAITS = "tests/laws/test_waits.py"
LOOP = "tests/unit/training/test_loop.py"
SCHEDULE = "tests/unit/optim/test_schedule.py"

_STATS = "trainer/moe/stats.py"
_STEP = "trainer/engine/step.py"
_LAYER = "trainer/moe/layer.py"
_LOOP = "trainer/training/loop.py"

_PASSES_ON = """\
        out, stats = self.finish(sent._replace(rows=self._compute(sent.rows, self._with_copies(borrowed))))
        full = (out.flatten(0, 1) == 0).all(1) & context.valid
        return torch.where(full.view(*x.shape[:2], 1), x, out), stats"""


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=file, old=old, new=new, tests=tests)


_TOKENS = "trainer/engine/global_stats.py"

FAULTS = [
    # Of a step
    _fault("N_g counts targets", _TOKENS, "b.num_valid for b", "b.target_weight for b", NATIVE),
    _fault("N_g counts targets, against transformers", _TOKENS, "b.num_valid for b", "b.target_weight for b", PARITY),
    _fault("N_g counts padding", _TOKENS, "b.num_valid for b", "b.valid.numel() for b", NATIVE),
    _fault("T_g counts what is not learned", _TOKENS, "b.target_weight for b", "b.num_valid for b", PARITY),
    _fault(
        "auxiliary losses are per target",
        "trainer/moe/losses.py",
        "1 / (num_moe_layers * denominators.routed_tokens)",
        "1 / (num_moe_layers * denominators.target_tokens)",
        NATIVE,
    ),
    _fault(
        "auxiliary losses are added up over layers",
        "trainer/moe/losses.py",
        "1 / (num_moe_layers * denominators.routed_tokens)",
        "1 / denominators.routed_tokens",
        NATIVE,
    ),
    _fault(
        "the loop is a step ahead of the schedule",
        _LOOP,
        "lr, limit = run.schedule(step),",
        "lr, limit = run.schedule(step + 1),",
        LOOP,
    ),
    _fault(
        "the loop is a step behind the schedule",
        _LOOP,
        "lr, limit = run.schedule(step),",
        "lr, limit = run.schedule(max(0, step - 1)),",
        LOOP,
    ),
    _fault(
        "a step learns at another rate than it says",
        _LOOP,
        "batches,\n            lr=lr,\n",
        "batches,\n            lr=run.schedule(step + 1),\n",
        LOOP,
    ),
    _fault(
        "the metrics say the next step's rate",
        _LOOP,
        "result, lr=lr, pace=pace",
        "result, lr=run.schedule(done), pace=pace",
        LOOP,
    ),
    _fault(
        "the optimizer is not told the rate",
        "trainer/engine/native.py",
        "set_rate(self.optimizer.param_groups, lr)",
        "set_rate(self.optimizer.param_groups, 1e-3)",
        NATIVE,
    ),
    _fault(
        "warmup begins at 0",
        "trainer/optim/schedule.py",
        "    if step < warmup_steps:\n        return peak_lr * (step + 1) / warmup_steps\n    progress",
        "    if step < warmup_steps:\n        return peak_lr * step / warmup_steps\n    progress",
        SCHEDULE,
        LOOP,
    ),
    _fault(
        "the cosine ends a step late",
        "trainer/optim/schedule.py",
        "max(1, total_steps - 1 - warmup_steps)",
        "max(1, total_steps - warmup_steps)",
        SCHEDULE,
        LOOP,
    ),
    _fault(
        "a step is given the rows of the one before",
        _LOOP,
        "run.position += batch_size",
        "run.position += batch_size - 1",
        LOOP,
    ),
    # Of a layer
    _fault(
        "gshard_first_choice is counted after drops",
        _STATS,
        "counts, first_choices = _count(decision, counted, context)",
        "first_choices = _count(decision, counted & limited.kept, context)[1]\n"
        "    counts = _count(decision, counted, context)[0]",
        STATS,
    ),
    _fault(
        "gshard_first_choice counts last choices",
        _STATS,
        "[:, 0] *= 1 + _FIRST",
        "[:, -1] *= 1 + _FIRST",
        STATS,
    ),
    _fault(
        "gshard_first_choice counts later choices of a varying number",
        _STATS,
        "decision.token_index[1:] != decision.token_index[:-1]",
        "decision.token_index[1:] == decision.token_index[:-1]",
        STATS,
    ),
    _fault(
        "the load is counted after drops",
        _STATS,
        "counts=counts[:, : decision.num_experts],\n",
        "counts=_count(decision, counted & limited.kept, context)[0][:, : decision.num_experts],\n",
        STATS,
    ),
    _fault(
        "importance is counted after drops",
        _STATS,
        "_importance(decision, counted, context)",
        "_importance(decision, counted & limited.kept, context)",
        STATS,
    ),
    _fault(
        "statistics wait for the device",
        _STATS,
        "rows, columns = context.num_sequences, decision.num_experts + 1",
        "rows, columns = int(context.sequence_index[-1]) + 1, decision.num_experts + 1",
        WAITS,
    ),
    _fault(
        "each loss of a step is read by itself",
        "trainer/engine/reduce.py",
        "dict(zip(numbers, torch.stack([number.double() for number in numbers.values()]).tolist(), strict=True))",
        "{name: float(number) for name, number in numbers.items()}",
        WAITS,
    ),
    _fault(
        "a router does not know its number of rows",
        "trainer/moe/routers/top_k.py",
        "num_valid=None if self.null_experts else context.num_valid",
        "num_valid=None",
        WAITS,
    ),
    _fault(
        "null experts are rows of a known number",
        "trainer/moe/routers/top_k.py",
        "num_valid=None if self.null_experts else context.num_valid",
        "num_valid=context.num_valid",
        "tests/unit/moe/test_routing.py",
    ),
    _fault(
        "a capacity keeps the number of rows",
        "trainer/moe/capacity.py",
        "num_groups * per_group, num_rows=None)",
        "num_groups * per_group)",
        "tests/unit/moe/test_routing.py",
    ),
    _fault("what was kept counts as dropped", _STATS, "counted & ~limited.kept", "counted & limited.kept", STATS),
    _fault(
        "statistics are of all tokens",
        _STATS,
        "decision.kept if context.counted is None else decision.kept & context.counted[decision.token_index]",
        "decision.kept",
        STATS,
    ),
    _fault("z is not squared", _STATS, "else log_norm.square()", "else log_norm", STATS, ORACLE),
    _fault(
        "a token whose experts are all full passes its input on",
        _LAYER,
        "        return self.finish(sent._replace(rows=self._compute(sent.rows, self._with_copies(borrowed))))",
        _PASSES_ON,
        ORACLE,
    ),
    _fault(
        "what is dropped is computed all the same",
        _LAYER,
        "decision = limit_to_capacity(routed.decision, self.capacity, context, salt=self.layer)",
        "decision = routed.decision",
        ORACLE,
    ),
    _fault(
        "the shared experts are left out",
        _LAYER,
        "else out + computed.shared",
        "else out + 0 * computed.shared",
        PARITY,
    ),
    _fault(
        "the shared experts are averaged with the others",
        _LAYER,
        "else out + computed.shared",
        "else out + 0.5 * computed.shared",
        PARITY,
    ),
    _fault(
        "the shared experts compute padding",
        _LAYER,
        "self.shared(x) * context.valid.view(*x.shape[:2], 1)",
        "self.shared(x)",
        ORACLE,
    ),
    _fault(
        "experts get the tokens without the router's weights",
        "trainer/moe/dispatch/token_slots.py",
        "expert.view(shape), weight.view(shape)",
        "expert.view(shape), 0 * weight.view(shape) + 1",
        PARITY,
    ),
    _fault(
        "the z-loss is of biased logits",
        "trainer/moe/routers/top_k.py",
        "            logits=logits,\n",
        '            logits=logits + getattr(self, "bias", 0),\n',
        ORACLE,
    ),
    _fault(
        "a bias that selects weighs too",
        "trainer/moe/routers/top_k.py",
        "            decision=self.decide(scores,",
        "            decision=self.decide(self.selection_scores(scores),",
        PARITY,
    ),
    _fault("gate weights are not scaled", "trainer/moe/routers/top_k.py", "weight * self.scale,", "weight,", PARITY),
    _fault(
        "gate weights are always normalised",
        "trainer/moe/routers/top_k.py",
        "if self.normalize:",
        "if True:",
        PARITY,
    ),
    _fault(
        "a group is scored by its best expert alone",
        "trainer/moe/routers/group_limited.py",
        'min(2 if group_score == "best_two" else 1,',
        "min(1,",
        PARITY,
    ),
    in_package(
        "null experts weigh as one",
        "moe/balance.py",
        "alike[-1] = num_null_experts",
        "alike[-1] = 1",
        "tests/laws/test_extra_losses.py",
    ),
    in_package(
        "groups of experts do not scale their loss",
        "moe/balance.py",
        "return groups * (in_groups",
        "return (in_groups",
        "moe/test_by_hand.py",
        "tests/laws/test_extra_losses.py",
    ),
    in_package(
        "sums come back in reverse order",
        "ops/tensor_sums.py",
        "values = iter(tensors)",
        "values = iter(tensors[::-1])",
        "moe/test_loss_stats.py",
    ),
]
