"""The order in which layouts are measured, and when the search ends; measurements are made up."""

from collections.abc import Callable

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.plan.find_layouts import Effort, Plan, find_layouts
from trainer.plan.gpus import gpu_named
from trainer.plan.layouts import Choices, Cluster
from trainer.plan.step_cost import Quantity, StepCost

CONFIG = load("configs/quickstart.yaml", ["model.seq_len=4096", "train.global_batch_size=64"], ExperimentConfig)
GPU = gpu_named("H100")


def found(peak_of: Callable[[ExperimentConfig], int], usable: int = GPU.usable) -> Plan:
    def measure(config: ExperimentConfig) -> StepCost:
        totals = {Quantity("moved", "others float32"): 1e12}
        return StepCost(weights=0, resident=0, peaks={("forward", None): peak_of(config)}, totals=totals)

    cluster = Cluster(16, 8, GPU, usable)
    return find_layouts(CONFIG, cluster, Choices(), measure, num_ids=256, effort=Effort(seconds=1e6), imbalance=1.25)


def test_layouts_of_every_kind_are_measured_and_one_of_each_family() -> None:
    plan = found(lambda config: 1)
    layouts = [one.layout for one in plan.fitting]
    assert len({layout.family for layout in layouts}) == len(layouts) == Effort().wanted
    assert {layout.cp_size > 1 for layout in layouts} == {layout.pp_size > 1 for layout in layouts} == {False, True}
    assert [one.time.total for one in plan.fitting] == sorted(one.time.total for one in plan.fitting)


def test_smaller_layouts_are_tried_until_one_fits() -> None:
    plan = found(lambda config: GPU.usable * config.parallel.micro_batch_size // 2)
    assert plan.fitting and plan.too_big and all(one.layout.micro_batch_size < 3 for one in plan.fitting)


def test_what_is_said_not_to_fit_was_measured() -> None:
    plan = found(lambda config: 1 << 60)
    assert not plan.fitting and 1 <= len(plan.too_big) <= Effort().most
    assert found(lambda config: 1 << 60, usable=plan.least_state).too_big, "even if none can surely fit"
