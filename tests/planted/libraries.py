"""Faults of dispatchers by libraries: what they are asked for, and when their results are read."""

from tests.planted.fault import in_package

CONTRACT = "tests/contracts/test_library_dispatchers.py"
DEEPEP, TOKENS, NCCL = "moe/dispatch/deepep.py", "moe/dispatch/token_library.py", "moe/dispatch/nccl_ep.py"
ALONE = f"{CONTRACT}::test_it_equals_a_single_process"
SHARED, ROWS = "moe/dispatch/symmetric_memory.py", "distributed/symmetric_rows.py"
MEMORY, NCCL_EP = "tests/contracts/test_symmetric_memory.py", "tests/contracts/test_nccl_ep.py"

FAULTS = [
    in_package(
        "rows are read before they have arrived",
        "distributed/exchange.py",
        "        pending.wait()\n",
        "",
        f"{ALONE}[deepep-random-None]",
    ),
    in_package(
        "slots without an expert here go to the first one",
        TOKENS,
        "torch.where(expert < 0, num_here, expert)",
        "torch.where(expert < 0, 0, expert)",
        f"{ALONE}[deepep-random-None]",
    ),
    in_package(
        "dropped assignments are sent to the last expert",
        TOKENS,
        "torch.where(slots.expert_index < self.num_experts, slots.expert_index, -1)",
        "slots.expert_index.clamp(max=self.num_experts - 1)",
        f"{ALONE}[deepep-random-None]",
    ),
    in_package(
        "combine weights get no gradient from other ranks",
        DEEPEP,
        "return Arriving((total, of_weight), event.current_stream_wait)",
        "return Arriving((total, torch.zeros_like(of_weight)), event.current_stream_wait)",
        f"{ALONE}[deepep-random-None]",
    ),
    in_package(
        "a gradient travels without the number of SMs",
        DEEPEP,
        "num_sms=routing.num_sms, async",
        "async",
        f"{ALONE}[deepep-random-None]",
    ),
    in_package(
        "a pass may have more tokens than the buffer",
        TOKENS,
        "if len(x) > self.tokens_per_rank:",
        "if len(x) > 2 * self.tokens_per_rank:",
        f"{CONTRACT}::test_what_it_cannot_do_is_refused_by_name",
    ),
    in_package(
        "an empty part of rows is taken to have no place",
        ROWS,
        "return torch.where(row < end[-1], (start - end + count)[part] + row, none)",
        "return torch.where(row < end[-1], row, none)",
        f"{ALONE}[symmetric_memory-random-None]",
    ),
    in_package(
        "rows are taken in the order in which parts arrive",
        ROWS,
        "by_sender = arrived.view(2, self.num_parts, self.group.size).transpose(1, 2)",
        "by_sender = arrived.view(2, self.group.size, self.num_parts)",
        f"{ALONE}[symmetric_memory-random-None]",
    ),
    in_package(
        "one set of buffers is used again and again",
        ROWS,
        "self._turn = 1 - self._turn",
        "self._turn = 0",
        f"{ALONE}[symmetric_memory-random-None]",
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
        f"{ALONE}[symmetric_memory-random-None]",
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
    in_package(
        "a handle routes other tokens while its own need it",
        NCCL,
        "        weakref.finalize(routing, self._free.append, routing.handle).atexit = False\n",
        "        self._free.append(routing.handle)\n",
        f"{ALONE}[nccl_ep-random-None]",
        f"{NCCL_EP}::test_a_handle_routes_other_tokens_once_its_own_are_done_with",
    ),
    in_package(
        "every pass allocates another handle",
        NCCL,
        "        if self._free:\n",
        "        if self._free and not self._free:\n",
        f"{NCCL_EP}::test_a_handle_routes_other_tokens_once_its_own_are_done_with",
    ),
    in_package(
        "a gradient travels as if it were the forward pass",
        NCCL,
        "config=ep.CombineConfig(pass_direction=ep.PassDir.BWD)",
        "config=ep.CombineConfig(pass_direction=ep.PassDir.FWD)",
        f"{ALONE}[nccl_ep-random-None]",
    ),
    in_package(
        "experts have the numbers that the library likes",
        NCCL,
        "            recv_topk_idx_kind=ep.ExpertIdKind.LOCAL,\n",
        "",
        f"{ALONE}[nccl_ep-random-None]",
    ),
]
