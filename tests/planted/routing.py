"""Faults of balance losses, routing weights and permutation."""

from tests.planted.fault import in_package

FAULTS = [
    in_package(
        "the gradient of a token is of its first row",
        "ops/expert_order.py",
        "out += rows.index_select(0, row_of_slot[:, slot])",
        "pass",
        "ops/test_permute.py",
    ),
    in_package(
        "scores of two groups are merged",
        "ops/select.py",
        "is_first |= group[order].diff() != 0",
        "pass",
        "ops/test_select.py",
    ),
    in_package(
        "a greedy choice forgets what tokens have",
        "ops/assignment.py",
        "wants[token] -= 1",
        "wants[token] -= 0",
        "ops/test_assignment.py",
    ),
    in_package(
        "an expert's room is rounded down",
        "ops/assignment.py",
        "places = -(-n // num_experts)",
        "places = max(1, n // num_experts)",
        "ops/test_assignment.py",
    ),
    in_package(
        "a plan is even over tokens only",
        "ops/assignment.py",
        "plan = plan - plan.logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)",
        "plan = plan - 0.0",
        "ops/test_assignment.py",
        "tests/laws/test_router_oracles.py",
    ),
    in_package(
        "a variation is of a sample",
        "moe/balance.py",
        "sums.var(-1, correction=0)",
        "sums.var(-1)",
        "tests/laws/test_extra_losses.py",
    ),
    in_package(
        "every micro-batch has the whole variation",
        "moe/balance.py",
        "tokens.sum() * value.detach()",
        "routed_tokens * value.detach()",
        "tests/laws/test_extra_losses.py",
    ),
    in_package(
        "fastmoe's loss rises with processes",
        "lab/conventions.py",
        "value /= world_size**2",
        "value *= world_size**2",
        "lab/test_conventions.py",
    ),
    in_package(
        "dense layers are not counted in a convention",
        "lab/conventions.py",
        "model.num_moe_layers / model.num_layers",
        "1.0",
        "lab/test_conventions.py",
    ),
    in_package(
        "busy experts' bias rises",
        "moe/routers/bias_balanced.py",
        "torch.sign(even - counts)",
        "torch.sign(counts - even)",
        "moe/test_bias_balanced.py",
    ),
    in_package(
        "null experts are even with one expert",
        "moe/routers/bias_balanced.py",
        "share[self.num_experts :] = self.null_experts",
        "share[self.num_experts :] = 1",
        "moe/test_bias_balanced.py",
    ),
    in_package(
        "the yardstick has one place less",
        "evaluation/routing_optimum.py",
        "kept.long().cumsum(0) <= capacity",
        "kept.long().cumsum(0) < capacity",
        "evaluation/test_routing_optimum.py",
    ),
]
