"""The command `eval`: evaluate a checkpoint of a run."""

import argparse
import json
import sys
from collections.abc import Sequence

from trainer.commands.arguments import Subparsers, add_command, add_run, add_step, as_path
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.config.check_packages import check_packages
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_INT
from trainer.errors import ConfigError
from trainer.moe.config import MoEConfig


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_step(
        add_run(
            add_command(
                subparsers, "eval", evaluate_command, example="runs/smoke --json eval.max_tokens_per_domain=null"
            )
        )
    )
    sub.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    sub.add_argument("--tasks", metavar="A,B", help="evaluate only these of eval.tasks, and no held-out text")
    sub.add_argument(
        "--experts-per-token", metavar="K,L", help="evaluate held-out text with each of these instead of router.top_k"
    )
    sub.add_argument("--lm-eval", metavar="A,B", help="evaluate these tasks of lm-eval instead")
    sub.add_argument(
        "--include-path", type=as_path, metavar="DIR", help="folder with more lm-eval tasks, as YAML files"
    )
    sub.add_argument("--limit", type=int, metavar="N", help="examples per lm-eval task (all)")


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint: tasks, and held-out text (all with eval.max_tokens_per_domain=null)."""
    config, folder = existing_run(options)
    only = _tasks(options.tasks, [task.name for task in config.eval.tasks])
    _check_lm_eval(options)
    top_ks = _top_ks(options, config.model.moe)
    if top_ks is None and options.lm_eval is None:
        check_packages(config.eval, at="eval")

    from trainer.training.evaluate_run import evaluate_by_lm_eval, evaluate_checkpoint, evaluate_top_ks

    screen = sys.stderr if options.json else sys.stdout
    with suggest_prepare(config):
        if top_ks is not None:
            record = evaluate_top_ks(config, folder, top_ks, step=options.step, screen=screen)
        elif options.lm_eval is None:
            record = evaluate_checkpoint(config, folder, step=options.step, only=only, screen=screen)
        else:
            record = evaluate_by_lm_eval(
                config,
                folder,
                _names(options.lm_eval),
                include_path=options.include_path,
                limit=options.limit,
                step=options.step,
                screen=screen,
            )
    if options.json:
        print(json.dumps(record, default=float))  # lm-eval's have numpy's numbers
    return 0


def _tasks(text: str | None, names_in_config: Sequence[str]) -> list[str] | None:
    """Parse `--tasks`.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return None
    names = _names(text)
    for name in names:
        if name not in names_in_config:
            has = f"it has {', '.join(names_in_config)}" if names_in_config else "it has none"
            raise ConfigError(f"--tasks: {shown(name)} is not a task of the config (eval.tasks); {has}")
    return names


def _top_ks(options: argparse.Namespace, moe: MoEConfig | None) -> list[int] | None:
    """Parse `--experts-per-token`.

    Raises:
        ConfigError: if the router has no `top_k`, or does not allow one of the values.
    """
    if options.experts_per_token is None:
        return None
    if options.tasks is not None or options.lm_eval is not None:
        raise ConfigError("--experts-per-token: evaluates held-out text only; leave out --tasks and --lm-eval")
    if moe is None or not hasattr(moe.router, "top_k"):
        kind = "a dense model" if moe is None else moe.router.kind
        raise ConfigError(f"--experts-per-token: {kind} has no top_k to change; leave the option out")
    names = _names(options.experts_per_token)
    for name in names:
        if not name.isascii() or not name.isdigit() or len(name) > 9 or int(name) < 1:
            raise ConfigError(
                f"--experts-per-token: {shown(name)} is not a number of experts; use numbers such as 1,2,4"
            )
        router = moe.router.model_copy(update={"top_k": int(name)})
        for problem in router.problems_among(moe.num_experts):
            raise ConfigError(f"--experts-per-token: {problem.message}")
    return [int(name) for name in names]


def _check_lm_eval(options: argparse.Namespace) -> None:
    """Check the options of `--lm-eval`.

    Raises:
        ConfigError: if they do not fit together.
    """
    if options.lm_eval is None:
        if options.include_path is not None or options.limit is not None:
            raise ConfigError("eval: --include-path and --limit need --lm-eval; name its tasks with --lm-eval")
        return
    if options.tasks is not None:
        raise ConfigError("eval: --tasks selects tasks of the config, --lm-eval other ones; use one of them")
    if options.limit is not None and not 1 <= options.limit <= MAX_INT:
        raise ConfigError("eval: use --limit >= 1" if options.limit < 1 else "eval: use --limit < 2^63")
    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError(f"--include-path: {options.include_path} is not a folder; correct the path")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
