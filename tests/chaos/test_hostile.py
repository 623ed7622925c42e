"""Law: hostile input is never executed, never written outside the run folder, and answered with a code and a line."""

import pickle

import pytest

from tests.chaos.hostile import Case, cases, wrong
from tests.chaos.hostile_checkpoints import pickled
from tests.chaos.sandbox import Boxes

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Boxes:
    return Boxes(tmp_path_factory.mktemp("boxes"))


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(CASES) == len(cases()) >= 60


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hostile_input_does_no_harm(boxes: Boxes, case: Case) -> None:
    box = boxes.fresh()
    case.prepare(box)
    outcome = boxes.run(box, case.arguments, case.environment)
    assert wrong(case, box, outcome) == [], f"{outcome.output[-2000:]}\n{outcome.errors[-2000:]}"


def test_what_is_written_outside_is_seen(boxes: Boxes) -> None:
    """Control: an export may write where the user says, and a case may not."""
    box, case = boxes.fresh(), CASES["an export into what is there"]
    outcome = boxes.run(box, ["checkpoint", "export-dcp", "runs/tiny", "../outside/x"])
    assert outcome.code == 0 and "written outside the run folder: ['outside/x'" in "; ".join(wrong(case, box, outcome))


def test_the_canary_sings_for_who_loads_a_pickle(boxes: Boxes) -> None:
    """Control: the payloads of the cases work."""
    box = boxes.fresh()
    pickle.loads(pickled(box))
    assert box.canary.exists()
