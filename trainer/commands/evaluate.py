"""The command `eval`: evaluate a checkpoint of a run."""

import argparse
import json
import sys
from collections.abc import Sequence

from trainer.commands.arguments import Verbs, as_path, takes_run, takes_step, verb
from trainer.commands.resolve import existing_run, telling_what_makes_it
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_INT
from trainer.config.packages import check_packages
from trainer.errors import ConfigError
from trainer.moe.config import MoEConfig


def add(verbs: Verbs) -> None:
    """Add the command with its arguments."""
    sub = takes_step(
        takes_run(verb(verbs, "eval", evaluate, example="runs/smoke --json eval.max_tokens_per_domain=null"))
    )
    sub.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    sub.add_argument("--tasks", metavar="A,B", help="evaluate only these of eval.tasks, and no held-out text")
    sub.add_argument(
        "--experts-per-token", metavar="K,L", help="held-out text at each of these numbers instead of router.top_k"
    )
    sub.add_argument("--lm-eval", metavar="A,B", help="evaluate by lm-eval instead, on these of its tasks")
    sub.add_argument(
        "--include-path", type=as_path, metavar="DIR", help="folder with more tasks of lm-eval, as YAML files"
    )
    sub.add_argument("--limit", type=int, metavar="N", help="only so many examples of each of lm-eval's tasks")


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint: tasks, and held-out text (all with eval.max_tokens_per_domain=null)."""
    config, folder = existing_run(options)
    only = _tasks(options.tasks, [task.name for task in config.eval.tasks])
    _check_lm_eval(options)
    top_ks = _top_ks(options, config.model.moe)
    if top_ks is None and options.lm_eval is None:
        check_packages(config.eval, at="eval")

    from trainer.training.evaluate_run import evaluate_by_lm_eval, evaluate_checkpoint, evaluate_top_ks

    screen = sys.stderr if options.json else sys.stdout
    with telling_what_makes_it(config):
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


def _tasks(text: str | None, known: Sequence[str]) -> list[str] | None:
    """Return the tasks of `--tasks`.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return None
    names = _names(text)
    for name in names:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"--tasks: {shown(name)} is no task of the config (eval.tasks); {has}")
    return names


def _top_ks(options: argparse.Namespace, moe: MoEConfig | None) -> list[int] | None:
    """Return the numbers of `--experts-per-token`.

    Raises:
        ConfigError: if the router has no such option, or cannot give so many.
    """
    if options.experts_per_token is None:
        return None
    if options.tasks is not None or options.lm_eval is not None:
        raise ConfigError("--experts-per-token: is about held-out text; leave out --tasks and --lm-eval")
    if moe is None or not hasattr(moe.router, "top_k"):
        kind = "a dense model" if moe is None else moe.router.kind
        raise ConfigError(f"--experts-per-token: {kind} has no top_k to be changed; leave it out")
    names = _names(options.experts_per_token)
    for name in names:
        if not name.isascii() or not name.isdigit() or len(name) > 9 or int(name) < 1:
            raise ConfigError(f"--experts-per-token: {shown(name)} is no number of experts; use numbers such as 1,2,4")
        router = moe.router.model_copy(update={"top_k": int(name)})
        for problem in router.problems_among(moe.num_experts):
            raise ConfigError(f"--experts-per-token: {problem.message}")
    return [int(name) for name in names]


def _check_lm_eval(options: argparse.Namespace) -> None:
    """Check what goes with `--lm-eval`.

    Raises:
        ConfigError: if something does not.
    """
    if options.lm_eval is None:
        if options.include_path is not None or options.limit is not None:
            raise ConfigError("eval: --include-path and --limit are for --lm-eval; name its tasks with it")
        return
    if options.tasks is not None:
        raise ConfigError("eval: --tasks are those of the config, --lm-eval another kind; use one of them")
    if options.limit is not None and not 1 <= options.limit <= MAX_INT:
        raise ConfigError("eval: use --limit >= 1" if options.limit < 1 else "eval: use --limit < 2^63")
    if options.include_path is not None and not options.include_path.is_dir():
        raise ConfigError(f"--include-path: {options.include_path} is no folder; correct the path")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
