"""The checks that need no step: a new one is a function and an entry in the list of its file. Imports no torch."""

from trainer.doctor.static.balance_checks import BALANCE_CHECKS
from trainer.doctor.static.choice_checks import CHOICE_CHECKS
from trainer.doctor.static.config_on_host import ConfigCheck
from trainer.doctor.static.launch_checks import LAUNCH_CHECKS
from trainer.doctor.static.optimization_checks import OPTIMIZATION_CHECKS
from trainer.doctor.static.size_checks import SIZE_CHECKS
from trainer.doctor.static.storage_checks import STORAGE_CHECKS

STATIC_CHECKS: tuple[ConfigCheck, ...] = (
    *BALANCE_CHECKS,
    *CHOICE_CHECKS,
    *OPTIMIZATION_CHECKS,
    *SIZE_CHECKS,
    *STORAGE_CHECKS,
    *LAUNCH_CHECKS,
)
