"""Faults of dispatchers by libraries: what they are asked for, and when their results are read."""

from tests.planted.fault import in_package

CONTRACT = "tests/contracts/test_library_dispatchers.py"
DEEPEP = "moe/dispatch/deepep.py"
ALONE = f"{CONTRACT}::test_it_equals_a_single_process"

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
]
