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
    in_package(
        "tokens of a record are not compared",
        "routing_record/replayed_rows.py",
        "np.flatnonzero(sequence.tokens != tokens)",
        "np.flatnonzero(sequence.tokens != sequence.tokens)",
        "routing_record/test_replayed_rows.py",
    ),
    in_package(
        "hashes of a record are not compared",
        "routing_record/record_reader.py",
        "with_content=verify",
        "with_content=False",
        "routing_record/test_record_reader.py",
    ),
    in_package(
        "rows of a sequence are one token late",
        "routing_record/sequence_rows.py",
        "sequence.experts[:length]",
        "sequence.experts[-length:]",
        "training/test_routing_recorder.py",
    ),
    in_package(
        "steps before a checkpoint are recorded after it",
        "training/loop.py",
        "                run.recorder.flush()\n",
        "                pass\n",
        "training/test_routing_recorder.py",
    ),
    in_package(
        "a dense layer's experts are those of the next one",
        "routing_record/engine_outputs.py",
        "array[:, model.moe_layers]",
        "array[:, : len(model.moe_layers)]",
        "tests/laws/test_replayed_engines.py",
    ),
]
