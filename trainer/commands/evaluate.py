"""The command `eval`: evaluate a checkpoint of a run."""

import argparse
import json
import sys

from trainer.commands.arguments import Subparsers, add_choice, add_command, add_run, as_path, choice_of, names, whole
from trainer.commands.record_option import add_record, check_record_option
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.config.check_packages import check_packages
from trainer.config.nodes import shown
from trainer.errors import ConfigError
from trainer.moe.config import MoEConfig


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --json eval.max_tokens_per_domain=null"
    sub = add_choice(add_run(add_command(subparsers, "eval", evaluate_command, example=example)))
    sub.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    what = "evaluate only these of eval.tasks, and no held-out text"
    sub.add_argument("--tasks", type=names, metavar="A,B", help=what)
    what = "evaluate held-out text with each of these instead of router.top_k"
    sub.add_argument("--experts-per-token", type=_numbers, metavar="K,L", help=what)
    sub.add_argument("--lm-eval", type=names, metavar="A,B", help="evaluate these tasks of lm-eval instead")
    what = "folder with more lm-eval tasks, as YAML files"
    sub.add_argument("--include-path", type=as_path, metavar="DIR", help=what)
    add_record(sub)
    sub.add_argument("--limit", type=whole, metavar="N", help="examples per lm-eval task (all)")


def _numbers(text: str) -> list[int]:
    return [whole(name) for name in names(text)]


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint: tasks, and held-out text (all with eval.max_tokens_per_domain=null)."""
    config, folder = existing_run(options)
    only, top_ks = options.tasks, options.experts_per_token
    in_config = [task.name for task in config.eval.tasks]
    for name in only or ():
        if name not in in_config:
            has = f"it has {', '.join(in_config)}" if in_config else "it has none"
            raise ConfigError(f"--tasks: {shown(name)} is not a task of the config (eval.tasks); {has}")
    _check_lm_eval(options)
    if options.record is not None and (only or top_ks or options.lm_eval):
        raise ConfigError("--record: records held-out text; leave out --tasks, --experts-per-token and --lm-eval")
    check_record_option(options, config)
    if top_ks is not None:
        _check_top_ks(options, config.model.moe)
    if top_ks is None and options.lm_eval is None:
        check_packages(config.eval, at="eval")

    from trainer.training.evaluate_run import evaluate_by_lm_eval, evaluate_checkpoint, evaluate_top_ks

    screen = sys.stderr if options.json else sys.stdout
    with suggest_prepare(config):
        if top_ks is not None:
            record = evaluate_top_ks(config, folder, top_ks, choice=choice_of(options), screen=screen)
        elif options.lm_eval is None:
            record = evaluate_checkpoint(
                config, folder, choice=choice_of(options), only=only, screen=screen, record=options.record
            )
        else:
            record = evaluate_by_lm_eval(
                config,
                folder,
                options.lm_eval,
                include_path=options.include_path,
                limit=options.limit,
                choice=choice_of(options),
                screen=screen,
            )
    if options.json:
        print(json.dumps(record, default=float))  # lm-eval's have numpy's numbers
    return 0


def _check_top_ks(options: argparse.Namespace, moe: MoEConfig | None) -> None:
    """Check that the router has the option `top_k` and allows the values of `--experts-per-token`."""
    if options.tasks is not None or options.lm_eval is not None:
        raise ConfigError("--experts-per-token: evaluates held-out text only; leave out --tasks and --lm-eval")
    if moe is None or not hasattr(moe.router, "top_k"):
        kind = "a dense model" if moe is None else moe.router.kind
        raise ConfigError(f"--experts-per-token: {kind} has no top_k to change; leave the option out")
    for top_k in options.experts_per_token:
        for problem in moe.router.model_copy(update={"top_k": top_k}).problems_among(moe.num_experts):
            raise ConfigError(f"--experts-per-token: {problem.message}")


def _check_lm_eval(options: argparse.Namespace) -> None:
    if options.lm_eval is None:
        if options.include_path is not None or options.limit is not None:
            raise ConfigError("eval: --include-path and --limit need --lm-eval; name its tasks with --lm-eval")
        return
    if options.tasks is not None:
        raise ConfigError("eval: --tasks selects tasks of the config, --lm-eval other ones; use one of them")
    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError(f"--include-path: {options.include_path} is not a folder; correct the path")
