"""Faults of runs that are made from others."""

from tests.planted.fault import in_package as _fault

UPCYCLE = "convert/test_upcycle_weights.py"

FAULTS = [
    _fault(
        "a virtual group's slices are all the first",
        "convert/upcycle_weights.py",
        "first + e % plan.granularity * size",
        "first",
        UPCYCLE,
    ),
    _fault(
        "the slices of a copy have router rows of their own",
        "convert/upcycle_weights.py",
        "expert - expert % plan.granularity",
        "expert",
        UPCYCLE,
    ),
    _fault(
        "a slice of a gate takes the rows of up",
        "convert/hidden_units.py",
        "part * len(self) for",
        "0 * len(self) for",
        UPCYCLE,
    ),
    _fault(
        "shared copies are not counted", "convert/upcycle_plan.py", "weight_sum + G * copies)", "weight_sum)", UPCYCLE
    ),
    _fault("a gate on shared experts is not undone", "convert/upcycle_plan.py", "2.0 if moe", "1.0 if moe", UPCYCLE),
]
