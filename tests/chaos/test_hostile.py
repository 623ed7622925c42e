"""Law: malicious input is never executed or written outside the run folder, and ends with an exit code and one line."""

import pickle

import pytest

from tests.chaos.hostile import Case, cases, wrong
from tests.chaos.hostile_checkpoints import pickled
from tests.chaos.sandbox import SandboxFactory

CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> SandboxFactory:
    return SandboxFactory(tmp_path_factory.mktemp("sandboxes"))


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(CASES) == len(cases()) >= 60


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hostile_input_does_no_harm(sandboxes: SandboxFactory, case: Case) -> None:
    box = sandboxes.fresh()
    case.prepare(box)
    outcome = sandboxes.run(box, case.arguments, case.environment)
    assert wrong(case, box, outcome) == [], f"{outcome.output[-2000:]}\n{outcome.errors[-2000:]}"


def test_what_is_written_outside_is_seen(sandboxes: SandboxFactory) -> None:
    """Control: an export may write where the user says, and a case may not."""
    box, case = sandboxes.fresh(), CASES["an export into what is there"]
    outcome = sandboxes.run(box, ["checkpoint", "export-dcp", "runs/tiny", "../outside/x"])
    assert outcome.code == 0 and "written outside the run folder: ['outside/x'" in "; ".join(wrong(case, box, outcome))


def test_the_canary_sings_for_who_loads_a_pickle(sandboxes: SandboxFactory) -> None:
    """Control: the payloads of the cases work."""
    box = sandboxes.fresh()
    pickle.loads(pickled(box))
    assert box.canary.exists()
