"""Faults of dispatchers by libraries: what they are asked for, and when their results are read."""

from tests.planted.fault import in_package

CONTRACT = "tests/contracts/test_library_dispatchers.py"
DEEPEP = "moe/dispatch/deepep.py"
ALONE = f"{CONTRACT}::test_it_equals_a_single_process"
SHARED, ROWS = "moe/dispatch/symmetric_memory.py", "distributed/symmetric_rows.py"
MEMORY = "tests/contracts/test_symmetric_memory.py"

FAULTS = [
    in_package(
        "rows are read before they have arrived",
        "distributed/exchange.py",
        "        pending.wait()\n",
        "",
        ALONE,
    ),
    in_package(
        "slots without an expert here go to the first one",
        DEEPEP,
        "torch.where(expert < 0, num_here, expert)",
        "torch.where(expert < 0, 0, expert)",
        ALONE,
    ),
    in_package(
        "dropped assignments are sent to the last expert",
        DEEPEP,
        "torch.where(slots.expert_index < self.num_experts, slots.expert_index, -1)",
        "slots.expert_index.clamp(max=self.num_experts - 1)",
        ALONE,
    ),
    in_package(
        "combine weights get no gradient from other ranks",
        DEEPEP,
        "return Arriving((total, of_weight), event.current_stream_wait)",
        "return Arriving((total, torch.zeros_like(of_weight)), event.current_stream_wait)",
        ALONE,
    ),
    in_package(
        "a gradient travels without the number of SMs",
        DEEPEP,
        "num_sms=self._handle.num_sms, async",
        "async",
        ALONE,
    ),
    in_package(
        "a pass may have more tokens than the buffer",
        DEEPEP,
        "if len(x) > self.tokens_per_rank:",
        "if len(x) > 2 * self.tokens_per_rank:",
        f"{CONTRACT}::test_what_it_cannot_do_is_refused_by_name",
    ),
    in_package(
        "an empty part of rows is taken to have no place",
        ROWS,
        "return torch.where(row < end[-1], (start - end + count)[part] + row, none)",
        "return torch.where(row < end[-1], row, none)",
        ALONE,
    ),
    in_package(
        "rows are taken in the order in which parts arrive",
        ROWS,
        "by_sender = arrived.view(2, self.num_parts, self.group.size).transpose(1, 2)",
        "by_sender = arrived.view(2, self.group.size, self.num_parts)",
        ALONE,
    ),
    in_package(
        "one set of buffers is used again and again",
        ROWS,
        "self._turn = 1 - self._turn",
        "self._turn = 0",
        ALONE,
    ),
    in_package(
        "rows that nobody sent are what the memory holds",
        ROWS,
        "        received[-1].zero_()\n",
        "",
        f"{MEMORY}::test_memory_grows_with_the_rows",
    ),
    in_package(
        "a gradient travels by the counts of the way there",
        SHARED,
        "start(gradients, self._flow.of, self._flow.num_sent",
        "start(gradients, self._flow.to, self._flow.num_sent",
        ALONE,
    ),
    in_package(
        "rows beyond the budget are sent",
        SHARED,
        "return table * (excess == 0)",
        "return table * (excess >= 0)",
        f"{MEMORY}::test_nobody_sends_what_has_no_place",
    ),
    in_package(
        "rows beyond the budget are not counted",
        SHARED,
        "        self.add_overflow(excess)\n",
        "",
        f"{MEMORY}::test_a_row_budget_learns_the_same",
    ),
    in_package(
        "the host reads the sizes of a budget too",
        SHARED,
        "        if budget is None:\n            table, on_host",
        "        if int(counts.sum()) and budget is None:\n            table, on_host",
        f"{MEMORY}::test_sizes_are_awaited_once_in_a_layer_and_never_with_a_budget",
    ),
]
