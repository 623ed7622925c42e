"""Faults of routing records and their replay."""

from tests.planted.fault import in_package

LAW = "tests/laws/test_replay.py"
FAULTS = [
    in_package(
        "given experts are not used",
        "moe/routing.py",
        "        if self.given is None:\n            return live\n",
        "        if True:\n            return live\n",
        LAW,
    ),
    in_package(
        "every layer replays the first one",
        "moe/routing.py",
        "given=self.replayed[:, index].long()",
        "given=self.replayed[:, 0].long()",
        LAW,
    ),
    in_package(
        "given experts are compared in their order",
        "moe/stats.py",
        "(context.given[:, :, None] == routed.live_choice[:, None, :]).any(-1)",
        "context.given == routed.live_choice",
        LAW,
    ),
    in_package(
        "the mass missed is that of the given experts",
        "moe/stats.py",
        "share.gather(-1, routed.live_choice).sum(-1) - share",
        "share",
        LAW,
    ),
]
