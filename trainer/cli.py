"""The command line: parses, calls the verb, and ends as it ended. The verbs are in trainer/verbs/."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.commands import bench, check_plugin, checkpoint, config, evaluate, generate, init, prove, train
from trainer.commands.arguments import Parser, Version
from trainer.config.nodes import shown_path
from trainer.config.old_names import OldNameWarning
from trainer.config.overrides import as_override, names_key
from trainer.distributed.rank_layout import is_first_rank
from trainer.environment import SUPERVISOR, check_process_variables
from trainer.errors import CommError, RemoteRankError, StopRequested, TurnoutError, exit_code_of, first_line
from trainer.experiment import ExperimentConfig
from trainer.terminal import print_safe, show_logs, single_line


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit with its code; a `TurnoutError` is printed as it stands, one line for each problem."""
    show_logs()
    _show_old_names()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        check_process_variables()
        code = options.verb(options)
    except RemoteRankError as error:  # the rank that had it says so
        _let_others_speak(0.5)
        _end_at_once(error.exit_code)
    except CommError as error:
        print_safe(error, file=sys.stderr)
        _end_at_once(error.exit_code)
    except StopRequested as error:
        if is_first_rank():
            print_safe(error, file=sys.stderr)
        _end_at_once(error.exit_code)
    except TurnoutError as error:
        if error.is_rank_specific or is_first_rank() or options.verb is train.launch:
            print_safe(error, file=sys.stderr)
        else:  # rank 0 has the same one, says so, and torchrun ends the others; unless it is this rank's alone
            _let_others_speak(10)
            print_safe(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, Exception) as error:  # what nobody has said anything more specific about
        code = exit_code_of(error)
        if code is None:
            raise
        _explain(error)
    sys.exit(code)


def _show_old_names() -> None:
    """Print each former name of a key as one line: on rank 0 only, and not again below `launch`, which printed it."""
    is_quiet = bool(os.environ.get(SUPERVISOR)) or not is_first_rank()
    warnings.filterwarnings("ignore" if is_quiet else "default", category=OldNameWarning)
    python_s = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, OldNameWarning):
            print_safe(f"warning: {message}", file=sys.stderr)
        else:
            python_s(message, category, *where, **more)

    warnings.showwarning = show


def _let_others_speak(seconds: float) -> None:
    """Wait for the rank that says what is wrong: torchrun ends all ranks as soon as one has ended."""
    sys.stderr.flush()
    time.sleep(seconds)


def _end_at_once(code: int) -> NoReturn:
    """End without waiting for the exchanges of a broken group, which python's own way out may do for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: BaseException) -> None:
    """Say in a line what has ended the process, for errors that are not ours and yet no bugs."""
    match error:
        case KeyboardInterrupt():  # no run, or the second Ctrl-C of one: there is nothing new to save
            print_safe("interrupted", file=sys.stderr)
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        case OSError():
            print_safe(f"{shown_path(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
        case _:
            print_safe(
                single_line(f"out of memory: {first_line(error)}; use a machine with more of it"), file=sys.stderr
            )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse, and accept overrides behind an option as well as before it; exit with 2 and a line if it is wrong."""
    parser = command_line()
    _refuse_before_verb(parser, arguments)
    options, rest = parser.parse_known_args(arguments)
    stray = [word for word in rest if word.startswith("-") or "=" not in word[1:] or not hasattr(options, "overrides")]
    if stray and hasattr(options, "overrides"):
        meant = [as_override(word, value, ExperimentConfig) for word, value in _with_values(stray)]
        parser.exit(2, "".join(f"{single_line(line)}\n" for line in meant))
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _refuse_before_verb(parser: Parser, arguments: Sequence[str]) -> None:
    """Exit with 2 and a line if an option or an override stands where the verb should."""
    first = next((word for word in arguments if not word.startswith("--local_rank=")), "")
    known = (option for action in parser._actions for option in action.option_strings)
    is_option = first.startswith("-") and not any(option.startswith(first.partition("=")[0]) for option in known)
    if not is_option and "=" not in first:
        return
    value = arguments[list(arguments).index(first) + 1 :][:1]
    [(name, given), *_] = _with_values([first, *(word for word in value if not word.startswith("-"))])
    is_key = names_key(name.lstrip("-").replace("-", "_"), ExperimentConfig)
    said = as_override(name, given, ExperimentConfig) if is_option and is_key else f"{first}: is no verb"
    where = "the verb comes first, then the config, then its overrides and options"
    parser.exit(2, f"{single_line(f'{said}; {where}')}: {parser.prog} train CONFIG a.b=c\n")


def _with_values(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each option that there is not, with the value that was given to it; of a stray value, the value alone."""
    found: list[tuple[str, str | None]] = []
    for word in words:
        name, equals, value = word.partition("=")
        if word == "=":
            continue
        if equals or word.startswith("-") or not found or found[-1][1] is not None:
            found.append((name, value if equals else None))
        else:
            found[-1] = (found[-1][0], word)
    return found


def command_line() -> Parser:
    """Return the parser of every verb."""
    parser = Parser(prog="turnout", description="Train mixture-of-experts language models.")
    parser.add_argument("--version", action=Version, help="print the versions of turnout, Python and torch")
    # DeepSpeed's launcher gives every rank its number like this too; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for group in (init, train, evaluate, generate, prove, bench, checkpoint, config, check_plugin):
        group.add(verbs)
    return parser
