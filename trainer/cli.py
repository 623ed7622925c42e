"""The command line: one verb, one short function.

Parses, loads the config, calls; torch is imported once that went well.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer import checkpoint_verbs
from trainer.checkpoint.run_folder import RunFolder, check_belongs
from trainer.checkpoint.weight_map import WeightMapConfig
from trainer.config.dump import Change, changed_keys, diff, dump
from trainer.config.loader import load
from trainer.config.nodes import shown_path
from trainer.config.schema import schema_text
from trainer.distributed.layout import check_layout, is_first_rank, launched
from trainer.distributed.signals import StopRequest
from trainer.errors import (
    CheckpointError,
    CommError,
    ConfigError,
    ElsewhereError,
    Stopped,
    TurnoutError,
    exit_code_of,
)
from trainer.experiment import ExperimentConfig
from trainer.metrics.readable import visible
from trainer.prove.cases import ENGINES
from trainer.status import StatusFile
from trainer.supervise.launch import Launch
from trainer.supervise.lifeline import end_with_launcher
from trainer.supervise.supervisor import Supervisor


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit with its code; a `TurnoutError` is printed as it stands, one line for each problem."""
    options = _parse(arguments)
    try:
        code = options.verb(options)
    except ElsewhereError as error:  # the rank that had it says so
        _let_others_speak(0.5)
        _end_at_once(error.exit_code)
    except CommError as error:
        print(visible(str(error)), file=sys.stderr)
        _end_at_once(error.exit_code)
    except Stopped as error:
        if is_first_rank():
            print(error, file=sys.stderr)
        _end_at_once(error.exit_code)
    except TurnoutError as error:
        if error.is_this_ranks or is_first_rank() or options.verb is launch:
            print(visible(str(error)), file=sys.stderr)
        else:  # rank 0 has the same one, says so, and torchrun ends the others; unless it is this rank's alone
            _let_others_speak(10)
            print(visible(f"rank {os.environ['RANK']}: {error}"), file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, Exception) as error:  # what nobody has said anything more specific about
        code = exit_code_of(error)
        if code is None:
            raise
        _explain(error)
    sys.exit(code)


def train(options: argparse.Namespace) -> int:
    """Train a config, or go on with its run."""
    end_with_launcher()
    with StopRequest() as stop:
        config = _load(options)
        layout = launched(ep_size=config.parallel.ep_size)
        folder = _folder(config)
        warnings = check_belongs(folder, _changes(folder, config))
        status = StatusFile(folder.status, rank=layout.rank)
        try:
            from trainer.workflows import train_run

            code = train_run(config, folder, layout, warnings=warnings, stop=stop, status=status)
        except BaseException as error:
            is_plain = isinstance(error, TurnoutError | Stopped)
            code = exit_code_of(error)
            status.end(1 if code is None else code, str(error) if is_plain else f"{type(error).__name__}: {error}")
            raise
        status.end(code)
        return code


def launch(options: argparse.Namespace) -> int:
    """Train a config on one or several ranks of this machine, and start them again after a failure that may pass."""
    config = _load(options)
    ranks = Launch.of(vars(options), os.environ)
    check_layout(world_size=ranks.world_size, ep_size=config.parallel.ep_size)
    folder = _folder(config)
    check_belongs(folder, _changes(folder, config))
    ranks.check_port()
    if ranks.node_rank == 0:  # the others' ranks come after its own
        folder.check_free()
    arguments = ["train", str(options.config), *options.overrides]
    return Supervisor(ranks, arguments, folder, patience_s=config.parallel.timeout_s + 30).run()


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint on its held-out text: all of it with eval.max_tokens_per_domain=null."""
    config, folder = _existing_run(options)

    from trainer.workflows import evaluate_checkpoint

    record = evaluate_checkpoint(config, folder, step=options.step, screen=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(record))
    return 0


def generate(options: argparse.Namespace) -> int:
    """Write text with a run's newest checkpoint."""
    config, folder = _existing_run(options)
    is_sound = (
        0 <= options.temperature < float("inf")
        and 0 < options.top_p <= 1
        and (options.top_k is None or options.top_k >= 1)
        and options.max_tokens >= 1
        and 0 <= options.seed < 1 << 63
    )
    if not is_sound:
        raise ConfigError(
            "generate: use --temperature >= 0, 0 < --top-p <= 1, --top-k >= 1, --max-tokens >= 1 and 0 <= --seed < 2^63"
        )

    from trainer.workflows import GenerateOptions, generate_text

    return generate_text(
        config,
        folder,
        GenerateOptions(
            prompt=options.prompt,
            max_tokens=options.max_tokens,
            temperature=0.0 if options.greedy else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            step=options.step,
        ),
    )


def prove(options: argparse.Namespace) -> int:
    """Prove that every layout up to four ranks learns what one process learns from this config."""
    config = _load(options)
    if options.steps < 1 or options.timeout <= 0:
        raise ConfigError("prove: use --steps >= 1 and --timeout > 0")

    from trainer.prove.proof import prove

    return prove(
        config,
        steps=options.steps,
        dtype=options.dtype,
        is_small=options.scale == "small",
        only=options.layouts,
        engines=_engines(options.engines),
        json_path=options.json,
        timeout_s=options.timeout,
    )


def _engines(text: str | None) -> list[str] | None:
    """Return the engines of `--engines`.

    Raises:
        ConfigError: if one is unknown.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ENGINES:
            raise ConfigError(f"--engines: {name!r} is not an engine; use some of {', '.join(ENGINES)}, by commas")
    return names


def checkpoint_list(options: argparse.Namespace) -> int:
    """List a run's checkpoints: step, size, time, layout, and whether manifest and sizes agree."""
    return checkpoint_verbs.show_list(_named_run(options), with_content=options.full, as_json=options.json)


def checkpoint_verify(options: argparse.Namespace) -> int:
    """Read every byte of a run's checkpoints and look for what makes no sense; exit code 4 if there is anything."""
    return checkpoint_verbs.verify(_named_run(options), step=options.step, as_json=options.json)


def checkpoint_prune(options: argparse.Namespace) -> int:
    """Remove a run's old checkpoints and what killed runs left, while nobody trains into it."""
    config, folder = _existing_run(options)
    keep = config.checkpoint.keep if options.keep is None else options.keep
    keep_every = config.checkpoint.keep_every if options.keep_every is None else options.keep_every
    if keep < 1 or (keep_every is not None and keep_every < 1):
        raise ConfigError("checkpoint prune: use --keep >= 1 and --keep-every >= 1")
    return checkpoint_verbs.prune(
        folder, keep=keep, keep_every=keep_every, with_damaged=options.damaged, is_dry=options.dry_run
    )


def checkpoint_export_dcp(options: argparse.Namespace) -> int:
    """Write a checkpoint as files of torch.distributed.checkpoint into a new folder."""
    return checkpoint_verbs.export_dcp(_named_run(options), options.out, step=options.step)


def checkpoint_import_deepspeed(options: argparse.Namespace) -> int:
    """Start a run from the weights of a checkpoint that DeepSpeed wrote for a model with its own MoE layers."""
    config = _load(options)
    map_ = load(options.map, [], WeightMapConfig)
    return checkpoint_verbs.import_deepspeed(
        config, _folder(config), options.folder, map_, is_trusted=options.trust_checkpoint
    )


def config_show(options: argparse.Namespace) -> int:
    """Print a config with every default."""
    print(dump(_load(options)), end="")
    return 0


def config_schema(options: argparse.Namespace) -> int:
    """Print the JSON schema that editors complete and check experiment files with."""
    print(schema_text(ExperimentConfig), end="")
    return 0


def config_diff(options: argparse.Namespace) -> int:
    """Print the keys in which two configs differ."""
    print("\n".join(diff(_load_file(options.a), _load_file(options.b))))
    return 0


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
            print("interrupted", file=sys.stderr)
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        case OSError():
            print(f"{shown_path(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
        case _:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"out of memory: {reason}; lower parallel.micro_batch_size", file=sys.stderr)


def _load(options: argparse.Namespace) -> ExperimentConfig:
    return load(options.config, options.overrides, ExperimentConfig)


def _load_file(path: Path) -> ExperimentConfig:
    return load(path, [], ExperimentConfig)


def _folder(config: ExperimentConfig) -> RunFolder:
    return RunFolder(Path(config.runs_dir) / config.name)


def _changes(folder: RunFolder, config: ExperimentConfig) -> list[Change]:
    """Return what differs between the config a run folder keeps and the one given now; nothing if it keeps none."""
    if not folder.config.is_file():
        return []
    try:
        return changed_keys(_load_file(folder.config), config)
    except ConfigError as error:
        advice = (
            f"{folder.config}: is the run's own record; remove it if it is damaged, its checkpoints know their model"
        )
        raise ConfigError(f"{error}\n{advice}") from None


def _named_run(options: argparse.Namespace) -> RunFolder:
    """Return a run folder that is named by itself, whatever its config, or by a config file."""
    if not options.config.is_dir():
        return _folder(_load(options))
    if options.overrides:
        raise ConfigError(
            f"{options.config}: is a folder, and overrides change a config file; name that, or leave them"
        )
    return RunFolder(options.config)


def _existing_run(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder]:
    """Return config and folder of a run that is named by its folder or by its config file."""
    if options.config.is_dir():
        folder = RunFolder(options.config)
        if not folder.config.is_file():
            raise CheckpointError(f"{folder.path}: has no config.yaml, so it is not a run folder; train first")
        config = load(folder.config, options.overrides, ExperimentConfig)
    else:
        config = _load(options)
        folder = _folder(config)
    check_belongs(folder, _changes(folder, config))
    return config, folder


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and accept overrides behind an option as well as before it."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    stray = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="turnout", description="Train mixture-of-experts language models.")
    # DeepSpeed's launcher gives every rank its number like this too; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: object, parent: argparse._SubParsersAction = verbs) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        sub = parent.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=function)
        return sub

    def takes_config(sub: argparse.ArgumentParser, what: str) -> argparse.ArgumentParser:
        sub.add_argument("config", type=Path, help=what)
        sub.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, such as train.steps=40")
        return sub

    def takes_step(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--step", type=int, help="use the checkpoint of this step instead of the newest")
        return sub

    takes_config(verb("train", train), "experiment file")
    sub = takes_config(verb("launch", launch), "experiment file")
    sub.add_argument("--nproc", metavar="N", help="ranks on this machine (NPROC, else 1)")
    sub.add_argument("--nnodes", metavar="N", help="machines; the same command on each (NNODES, else 1)")
    sub.add_argument("--node-rank", metavar="N", help="this machine's number, from 0 (NODE_RANK)")
    sub.add_argument("--master-addr", metavar="A", help="address of the first machine (MASTER_ADDR)")
    sub.add_argument("--master-port", metavar="P", help="port there (MASTER_PORT, else 29500)")
    sub = takes_step(takes_config(verb("eval", evaluate), "run folder or experiment file"))
    sub.add_argument("--json", action="store_true", help="print the numbers as one JSON object")
    sub = takes_step(takes_config(verb("generate", generate), "run folder or experiment file"))
    sub.add_argument("--prompt", default="", help="text to go on from; default: the start of a document")
    sub.add_argument("--max-tokens", type=int, default=400, help="how many tokens to write at the most (400)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    sub.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    sub.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total mass (1)")
    sub.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    sub.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (0)")

    sub = takes_config(verb("prove", prove), "experiment file")
    sub.add_argument("--steps", type=int, default=10, help="optimizer steps of each layout (10)")
    what = "(float64; float32 if deepspeed, which has no float64, is among the engines)"
    sub.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], help=what)
    sub.add_argument("--engines", metavar="A,B", help="native, deepspeed (ZeRO 1 and 2) or both; default: the config's")
    sub.add_argument("--scale", choices=["full", "small"], default="full", help="small: shrink model and batch first")
    sub.add_argument("--layouts", metavar="TEXT", help="only layouts whose name has this text, such as 'ep 2'")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON as well")
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds that ranks wait for each other (120)")

    checkpoint = verbs.add_parser("checkpoint", help="List, examine, remove and convert a run's checkpoints.")
    actions = checkpoint.add_subparsers(required=True, metavar="ACTION")
    run = "run folder or experiment file"
    sub = takes_config(verb("list", checkpoint_list, actions), run)
    sub.add_argument("--full", action="store_true", help="hash every byte instead of comparing sizes")
    sub.add_argument("--json", action="store_true", help="print one JSON list")
    sub = takes_config(verb("verify", checkpoint_verify, actions), run)
    sub.add_argument("--step", type=int, help="only the checkpoint of this step")
    sub.add_argument("--json", action="store_true", help="print one JSON list")
    sub = takes_config(verb("prune", checkpoint_prune, actions), run)
    sub.add_argument("--keep", type=int, help="newest sound ones to keep (checkpoint.keep of the run's config)")
    sub.add_argument("--keep-every", type=int, help="keep those of steps that are a multiple of this as well")
    sub.add_argument("--damaged", action="store_true", help="remove those that are not sound, too")
    sub.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    sub = verb("export-dcp", checkpoint_export_dcp, actions)
    sub.add_argument("config", type=Path, help=run)
    sub.add_argument("out", type=Path, help="folder to make")
    sub.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, such as name=other")
    takes_step(sub)

    sub = verb("import-deepspeed", checkpoint_import_deepspeed, actions)
    sub.add_argument("config", type=Path, help="experiment file of the run to start")
    sub.add_argument("folder", type=Path, help="what save_checkpoint was given, or the folder of a tag in it")
    sub.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change, such as name=other")
    sub.add_argument(
        "--map", type=Path, required=True, metavar="FILE", help="which weights become which (docs/deepspeed.md)"
    )
    sub.add_argument("--trust-checkpoint", action="store_true", help="read its pickles, which can run code")

    config = verbs.add_parser("config", help="Show, compare and describe experiment files.")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    takes_config(verb("show", config_show, actions), "experiment file")
    verb("schema", config_schema, actions)
    sub = verb("diff", config_diff, actions)
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)
    return parser
