"""The command line: parse the arguments, run a command of trainer/commands/ and exit with its code."""

import argparse
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from trainer.commands import (
    bench,
    chat,
    check_plugin,
    checkpoint,
    compare_runs,
    config,
    doctor,
    evaluate,
    export,
    generate,
    import_hf,
    init,
    list_runs,
    plan_layouts,
    prove,
    report_runs,
    routing_records,
    run_status,
    surgery,
    sweep,
    sync,
    trace,
    train,
    upcycle,
    what_if,
)
from trainer.commands.arguments import Parser, versions
from trainer.config.nodes import shown_path
from trainer.config.old_names import OldNameWarning
from trainer.config.overrides import as_override, names_key
from trainer.distributed.rank_layout import is_first_rank
from trainer.environment import SUPERVISOR, check_process_variables
from trainer.errors import CommError, RemoteRankError, StopRequested, TurnoutError, exit_code_of, first_line
from trainer.experiment import ExperimentConfig
from trainer.terminal import print_safe, show_anything, show_logs, single_line


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; print the message of a `TurnoutError` without a traceback."""
    show_logs()
    show_anything()
    _show_old_names()
    options = parse_command_line(sys.argv[1:] if arguments is None else arguments)
    try:
        check_process_variables()
        code = options.command(options)
        _flush_output()
    except RemoteRankError as error:  # reported by the rank that failed
        _wait_for_report(0.5)
        _exit_now(error.exit_code)
    except (CommError, StopRequested) as error:
        if isinstance(error, CommError) or is_first_rank():
            print_safe(error, file=sys.stderr)
        _exit_now(error.exit_code)
    except TurnoutError as error:
        if error.is_rank_specific or is_first_rank() or options.command is train.launch_command:
            print_safe(error, file=sys.stderr)
        else:  # normally rank 0 has the same error and reports it before torchrun ends this rank
            _wait_for_report(10)
            print_safe(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, Exception) as error:  # errors of the system
        _name_output(error)
        code = exit_code_of(error)
        if code is None:
            raise
        _explain(error)
    sys.exit(code)


def _show_old_names() -> None:
    """Print warnings about old key names as one line each: on rank 0 only, and not again under `launch`."""
    is_quiet = bool(os.environ.get(SUPERVISOR)) or not is_first_rank()
    warnings.filterwarnings("ignore" if is_quiet else "default", category=OldNameWarning)
    default = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, OldNameWarning):
            print_safe(f"warning: {message}", file=sys.stderr)
        else:
            default(message, category, *where, **more)

    warnings.showwarning = show


def _wait_for_report(seconds: float) -> None:
    """Give the rank that reports the error time to: torchrun ends all ranks as soon as one has exited."""
    sys.stderr.flush()
    time.sleep(seconds)


def _exit_now(code: int) -> NoReturn:
    """Exit without Python's shutdown, which may wait forever for collectives of a broken group."""
    _flush_output()
    sys.stderr.flush()
    os._exit(code)


def _flush_output() -> None:
    if sys.stdout is not None:  # it may have been closed
        sys.stdout.flush()


def _name_output(error: BaseException) -> None:
    """Name standard output in an error of it, such as of a full disk, and write nothing more there."""
    is_output = isinstance(error, OSError) and isinstance(sys.stdout, io.TextIOWrapper)
    if not is_output or exit_code_of(error) is not None:
        return
    try:
        _flush_output()
        os.write(sys.stdout.fileno(), b"\n")  # only if it fails again it was that; a traceback follows if not
    except io.UnsupportedOperation:  # no file
        return
    except OSError:
        cast("OSError", error).filename = "standard output"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: BaseException) -> None:
    """Print one line about a system error that is not a bug."""
    match error:
        case KeyboardInterrupt():  # not training, or the second Ctrl-C: nothing left to save
            print_safe("interrupted", file=sys.stderr)
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        case OSError():
            print_safe(f"{shown_path(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
        case _:
            message = f"out of memory: {first_line(error)}; use a machine with more of it"
            print_safe(single_line(message), file=sys.stderr)


def parse_command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments, with overrides before or after options; exit with code 2 and one line if they are wrong."""
    parser = command_line()
    _check_command_first(parser, arguments)
    options, rest = parser.parse_known_args(arguments)
    takes_overrides = hasattr(options, "overrides")
    unknown = [word for word in rest if word.startswith("-") or "=" not in word[1:] or not takes_overrides]
    if unknown and takes_overrides:
        hints = [as_override(word, value, ExperimentConfig) for word, value in _with_values(unknown)]
        parser.exit(2, "".join(f"{single_line(line)}\n" for line in hints))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _check_command_first(parser: Parser, arguments: Sequence[str]) -> None:
    """Exit with code 2 and one line if an option or an override precedes the command."""
    first = next((word for word in arguments if not word.startswith("--local_rank=")), "")
    options = (option for action in parser._actions for option in action.option_strings)
    is_option = first.startswith("-") and not any(option.startswith(first.partition("=")[0]) for option in options)
    if not is_option and "=" not in first:
        return
    value = arguments[list(arguments).index(first) + 1 :][:1]
    [(name, given), *_] = _with_values([first, *(word for word in value if not word.startswith("-"))])
    is_key = names_key(name.lstrip("-").replace("-", "_"), ExperimentConfig)
    problem = as_override(name, given, ExperimentConfig) if is_option and is_key else f"{first}: is not a command"
    order = "the command comes first, then the config, then its overrides and options"
    parser.exit(2, f"{single_line(f'{problem}; {order}')}: {parser.prog} train CONFIG a.b=c\n")


def _with_values(words: Sequence[str]) -> list[tuple[str, str | None]]:
    """Pair unknown options with their values; a value without an option stands alone."""
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
    """Build the parser of all commands."""
    parser = Parser(prog="turnout", description="Train mixture-of-experts language models.")
    what = "print the versions of turnout, Python and torch"
    parser.add_argument("--version", action="version", version=versions(), help=what)
    # DeepSpeed's launcher passes this option to every rank, in addition to LOCAL_RANK.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    groups = (
        init,
        import_hf,
        train,
        sweep,
        evaluate,
        generate,
        chat,
        report_runs,
        export,
        prove,
        doctor,
        bench,
        upcycle,
        surgery,
        checkpoint,
        routing_records,
        trace,
        run_status,
        list_runs,
        compare_runs,
        what_if,
        plan_layouts,
        config,
        check_plugin,
        sync,
    )
    for group in groups:
        group.add(subparsers)
    return parser
