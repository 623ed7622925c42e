"""Faults of doctor: it blames what is well, or is silent."""

from tests.planted.fault import in_package as _fault

CLUSTER = "doctor/test_cluster_checks.py"
DISPATCHERS = "doctor/test_measured_dispatchers.py"
RANKS = "doctor/test_several_ranks.py"
STEP = "doctor/test_step_checks.py"
STATIC = "doctor/test_static_checks.py"

FAULTS = [
    _fault(
        "a bias that drives the load apart is praised",
        "doctor/step/layer_checks.py",
        "elif pull < 0:",
        "elif pull > 0:",
        STEP,
    ),
    _fault(
        "the gradient of auxiliary losses counts as that of the text",
        "doctor/step/layer_checks.py",
        "if layer.lm_gradient <= _LEAST_SHARE",
        "if layer.lm_gradient <= -_LEAST_SHARE",
        STEP,
    ),
    _fault(
        "links between machines are compared with those within",
        "doctor/cluster/cluster_checks.py",
        "if one.is_inside == link.is_inside and one.ranks",
        "if one.ranks",
        CLUSTER,
    ),
    _fault(
        "a clock is wrong by the time that asking takes",
        "doctor/cluster/measure_cluster.py",
        "max(least, before - theirs)",
        "max(least, after - theirs)",
        RANKS,
    ),
    _fault(
        "the file system is that of the root",
        "doctor/host_facts.py",
        "return max(found, key=lambda pair: pair[0]",
        "return min(found, key=lambda pair: pair[0]",
        "doctor/test_host_facts.py",
    ),
    _fault(
        "a disk may be fuller than full",
        "doctor/static/storage_checks.py",
        "count * each <= _RUSHED * free",
        "each <= _RUSHED * free",
        STATIC,
    ),
    _fault(
        "doctor counts rows that fill up a batch as padding of the text",
        "doctor/step/measure_step.py",
        "int(batch.valid.any(1).sum()) *",
        "len(batch.valid) *",
        RANKS,
    ),
    _fault(
        "the bias of a frozen router is blamed for not moving",
        "doctor/step/measure_step.py",
        "None if is_frozen(router) else getattr",
        "getattr",
        STEP,
    ),
    _fault(
        "a dispatcher that loses some of many rows is recommended",
        "doctor/cluster/measure_dispatchers.py",
        "if not float((copied - expected).norm()) <=",
        "if not -float((copied - expected).norm()) <=",
        DISPATCHERS,
    ),
    _fault(
        "a dispatcher that the config's rules refuse is tried",
        "doctor/cluster/measure_dispatchers.py",
        "for one in changed.problems() if",
        "for one in changed.problems() if not",
        DISPATCHERS,
    ),
    _fault(
        "a disturbance of some rounds names a dispatcher",
        "doctor/cluster/timed_rounds.py",
        "self.best >= _CERTAIN * usual",
        "self.best >= 0 * usual",
        DISPATCHERS,
    ),
    _fault(
        "the slowest dispatcher is recommended",
        "doctor/cluster/dispatch_evidence.py",
        "in sorted(timed)]",
        "in sorted(timed, reverse=True)]",
        DISPATCHERS,
    ),
]
