"""The command `upcycle`: make a mixture of experts of a trained dense run."""

import argparse

from trainer.commands.arguments import Subparsers, add_command, add_config, add_step, fraction
from trainer.commands.resolve import load_named_config, resolve_best, run_to_read, suggest_prepare
from trainer.commands.shipped import as_config
from trainer.config.check_packages import check_packages
from trainer.convert.upcycle_plan import UpcycleOptions, plan_upcycle
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_command(subparsers, "upcycle", upcycle_command, example="runs/dense configs/moe.yaml name=upcycled")
    sub.add_argument("dense", type=as_config, metavar="DENSE_RUN", help="run folder or experiment file of a dense run")
    add_step(add_config(sub, "experiment file of the run to start, whose model has experts"))
    what = "Gaussian noise on the experts, in standard deviations of each matrix (0)"
    sub.add_argument("--noise", type=fraction, default=0.0, metavar="X", help=what)
    what = "fraction of each expert's hidden units that starts anew, such as 0.5 (0)"
    sub.add_argument("--drop-fraction", type=fraction, default=0.0, metavar="R", help=what)
    what = "standard deviation of the router's weights (model.init_std)"
    sub.add_argument("--router-std", type=fraction, metavar="X", help=what)
    what = "shared experts repeat the dense network, or take its first slice, which the others then lack (copies)"
    sub.add_argument("--shared", choices=["copies", "slices"], default="copies", help=what)
    what = "matrices that the factor on the experts' outputs goes to; all of them changes the model (output)"
    sub.add_argument("--scale", choices=["output", "all"], default="output", help=what)
    what = "write the run although the model computes something else than the dense one"
    sub.add_argument("--allow-change", action="store_true", help=what)


def upcycle_command(options: argparse.Namespace) -> int:
    """Start a run of a mixture of experts whose experts are copies, or slices, of a trained dense run's layers."""
    config = load_named_config(options)
    dense, folder = run_to_read(options.dense)
    resolve_best(options, folder)
    check_packages(config)
    how = UpcycleOptions(
        noise=options.noise,
        drop_fraction=options.drop_fraction,
        router_std=options.router_std,
        shared=options.shared,
        scale=options.scale,
    )
    plan_upcycle(dense.model, config.model, how)  # wrong configs are refused before torch is imported

    from trainer.convert.upcycle_run import upcycle

    with suggest_prepare(config):
        made = upcycle(dense, folder, config, how, step=options.step, allow_change=options.allow_change)
    for note in made.notes:
        print_safe(note)
    print_safe(f"loss on held-out text: {made.loss_before:.4f} of the dense run, {made.loss_after:.4f} of the new one")
    print_safe(f"saved {made.path}: train the same config to continue")
    return 0
