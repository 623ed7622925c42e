"""Run the verbs once the config is sound: a run from its first line to its last screen, or a text."""

import codecs
import io
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.saver import Saved
from trainer.checkpoint.tools.import_deepspeed import read_deepspeed
from trainer.checkpoint.tools.translate import translate
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.config.dump import dump
from trainer.console import formatting
from trainer.console.console import Console
from trainer.console.summary import RunSummary
from trainer.data.tokenizers.base import Tokenizer
from trainer.distributed import runtime
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.mesh import Mesh, joined
from trainer.distributed.rank_layout import Layout
from trainer.distributed.signals import StopRequest
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.errors import PREEMPTED, CommError, ConfigError, MemoryExhausted, NumericsError, TurnoutError
from trainer.evaluation.eval_report import EvalReport
from trainer.evaluation.run_summary import summarize_evaluation
from trainer.experiment import ExperimentConfig
from trainer.metrics.records import loss_curve
from trainer.models.generation import generate
from trainer.models.initialize import expert_parameters
from trainer.models.sampling import SamplingOptions
from trainer.moe.causality import evaluation_warning
from trainer.status import StatusFile, remove_others
from trainer.terminal import visible
from trainer.training.loop import announce, fit
from trainer.training.model import in_one_process, resolve_kernel, whole_model
from trainer.training.resume import load_trained
from trainer.training.run import Run
from trainer.training.setup import build_run, track

_SAMPLE_PROMPT_TOKENS, _SAMPLE_TOKENS = 48, 320


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """The options of `generate`."""

    prompt: str
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    step: int | None


def train_run(
    config: ExperimentConfig,
    folder: RunFolder,
    layout: Layout,
    *,
    warnings: Sequence[str],
    stop: StopRequest,
    status: StatusFile,
) -> int:
    """Train into a locked folder, as one of the ranks of a layout; return the exit code."""
    stop.check()
    began_s = time.monotonic()
    device = runtime.start(config.parallel.device)
    screen = None if layout.rank == 0 else io.StringIO()  # one rank speaks for all
    with (
        ExitStack() as outermost,
        joined(layout, device, timeout_s=config.parallel.timeout_s) as mesh,
        closing(Console(config.train.steps, file=screen)) as console,
    ):
        for warning in warnings:
            console.warning(warning)
        recorder = mesh.world.recorder
        recorder.enter("locking the run folder")
        with raise_together(mesh.world):
            if layout.rank == 0:
                folder.lock()
                recorder.enter("removing old status files")
                remove_others(folder.status, world_size=layout.world_size)
        status.enter("start-up")
        run = build_run(config, folder, console, mesh, device)
        recorder.enter("opening the trackers")
        outermost.enter_context(track(run))  # closed when the ranks have left each other: nobody waits for it
        console.header(_header(run))
        if run.start_step >= config.train.steps:
            console.message(f"already at step {run.start_step} of {config.train.steps}: nothing is left to train")
        try:
            examination = fit(run, stop, status)
        except Exception as error:
            # What is being saved is still worth having, where nobody that it needs has been lost.
            is_everybodys = isinstance(error, TurnoutError) and not isinstance(error, CommError | MemoryExhausted)
            if is_everybodys or mesh.world.size == 1:
                announce(run, run.saver.wait())
                run.saver.close()
            raise
        run.saver.close()  # a thread that python cuts off on its way out may abort the process
        if examination is None:
            run.engine.close()
            run.trackers.exit_code = PREEMPTED
            return PREEMPTED
        recorder.enter("sampling")
        prompt, sample, speechless = _sample(run)  # every rank takes part: it needs everyone's experts
        if layout.rank == 0:
            recorder.enter("summary")
            elapsed_s = time.monotonic() - began_s
            console.summary(_summary(run, examination, prompt, sample, elapsed_s=elapsed_s))
        run.engine.close()
        if speechless is not None:  # weights that are finite and too large for what is computed with them
            step = max(run.start_step, config.train.steps)
            raise NumericsError(f"{run.saver.folder.of_step(step)}: {speechless}") from None
    return 0


def start_from_deepspeed(
    config: ExperimentConfig, folder: RunFolder, source: Path, map_: WeightMapConfig, *, is_trusted: bool
) -> Saved:
    """Give a new run the weights of a checkpoint that DeepSpeed wrote, as its checkpoint of step 0.

    Raises:
        CheckpointError: if that cannot be read, or does not have all of the model's weights.
        ConfigError: if the run has checkpoints already.
    """
    if CheckpointFolder(folder.checkpoints).steps():
        raise ConfigError(f"{folder.checkpoints}: has checkpoints; start a new run with name=...")
    theirs = read_deepspeed(source, is_trusted=is_trusted)
    cpu, alone = torch.device("cpu"), in_one_process(config)
    model = whole_model(resolve_kernel(alone, cpu), config.data.tokenizer.build(config.data))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    of_experts = {name: shapes[name][0] for name in expert_parameters(model)}
    weights = translate(theirs, map_, shapes, of_experts)  # before anything is written
    folder.lock()
    with closing(Console(file=sys.stderr)) as console:
        run = build_run(alone, folder, console, Mesh.of_one(), cpu)
    folder.write(folder.config, dump(config))
    with torch.no_grad():
        for name, parameter in run.engine.model.named_parameters():
            parameter.copy_(weights[name])
    run.saver.start(0, run.engine.state(), run.checkpoint_info())
    saved = run.saver.wait()
    run.saver.close()
    assert saved is not None
    if saved.error is not None:
        raise saved.error
    return saved


def generate_text(config: ExperimentConfig, folder: RunFolder, options: GenerateOptions) -> int:
    """Stream a generated text to the terminal; return the exit code."""
    console = Console(file=sys.stderr)
    engine, tokenizer, found = load_trained(config, folder, step=options.step, warn=console.warning)
    if said := evaluation_warning(engine.model.moe_layers()):
        console.warning(said)
    # A prompt that is not UTF-8 arrives as surrogates; it is shown with replacement characters, and so read.
    text = options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    prompt = _as_trained(tokenizer.encode(text).tolist(), config, tokenizer)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    tokens = generate(
        engine.model,
        prompt,
        max_new_tokens=options.max_tokens,
        options=SamplingOptions(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p),
        generator=torch.Generator().manual_seed(options.seed),
        stop_token=tokenizer.end_of_document,
    )
    # On a terminal, bytes that would steer it are shown and not obeyed; a file or pipe gets the text as it is.
    shown = visible if sys.stdout.isatty() else str
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that has no UTF-8
    print(shown(text), end="", flush=True)
    try:
        for token in tokens:
            print(shown(decoder.decode(tokenizer.decode([token]))), end="", flush=True)
    except NumericsError as error:
        raise NumericsError(f"{found.path}: {error}; use the checkpoint of another step (--step)") from None
    finally:
        print(shown(decoder.decode(b"", final=True)))
    return 0


def _header(run: Run) -> list[str | tuple[str, str]]:
    config, size, corpus = run.config, run.size, run.corpus
    moe = config.model.moe
    experts = "dense"
    if moe is not None:
        experts = f"{moe.num_experts} experts, {moe.experts_per_token:.3g} for each token, router {moe.router.kind}"
    text = ", ".join(
        f"{domain} {file.num_bytes / 1e6:.1f} MB" for domain, file in zip(corpus.domains, corpus.train, strict=True)
    )
    cut = []
    if config.data.tokenizer.kind != "byte":
        num_bytes, num_tokens = (
            sum(getattr(file, key) for file in corpus.train) for key in ("num_bytes", "num_tokens")
        )
        cut = [("tokens", f"{corpus.tokenizer.vocab_size} kinds, {num_bytes / num_tokens:.2f} bytes each")]
    tokens = config.train.global_batch_size * config.model.seq_len
    at_most = "at most " if config.data.packing == "bfd" else ""  # some of it is padding
    layout = run.mesh.layout
    ranks = [("ranks", f"{layout.world_size}, experts over {layout.ep_size}")] if layout.world_size > 1 else []
    uses = config.engine
    engine = [("engine", f"DeepSpeed, ZeRO {uses.zero_stage}")] if isinstance(uses, DeepSpeedEngineConfig) else []
    return [
        f"turnout: training {config.name}",
        (
            "model",
            f"{size.total_parameters / 1e6:.2f}M parameters, {size.active_parameters / 1e6:.2f}M active; {experts}",
        ),
        ("text", text),
        *cut,
        (
            "steps",
            f"{config.train.steps} of {at_most}{tokens} tokens, {config.train.dtype}, "
            f"experts by {config.parallel.experts_kernel}",
        ),
        *ranks,
        *engine,
        ("folder", str(run.folder.path)),
    ]


def _summary(run: Run, examination: EvalReport, prompt: str, sample: str, *, elapsed_s: float) -> RunSummary:
    logged_steps, losses = [], []
    with suppress(OSError):  # then what this process has seen is shown
        logged_steps, losses = loss_curve(run.folder.metrics)
    steps = max(run.start_step, run.config.train.steps)
    layers, title = run.engine.model.config.moe_layers, f"{run.config.name}: {steps} steps done"
    since = f" since step {run.start_step}" if run.start_step else ""
    elapsed = f"{formatting.duration(elapsed_s)}{since}"
    asked_for = [("profile", run.folder.profile), ("deepspeed", run.folder.deepspeed)]
    return replace(
        summarize_evaluation(examination, run.corpus, layers, title=title),
        facts=[("time", elapsed), ("tokens", formatting.rate(run.tokens))],
        steps=logged_steps,
        losses=losses,
        prompt=prompt,
        sample=sample,
        written=[
            ("run folder", str(run.folder.path)),
            ("checkpoint", str(run.saver.folder.of_step(steps))),
            *run.trackers.written(),
            *((label, str(path)) for label, path in asked_for if path.is_dir()),
            ("more text", f"python -m trainer generate {run.folder.path}"),
        ],
    )


def _as_trained(prompt: list[int], config: ExperimentConfig, tokenizer: Tokenizer) -> list[int]:
    """Begin a prompt as its document began in training: behind an end of document, where rows are of whole ones."""
    return [tokenizer.end_of_document, *prompt] if config.data.packing == "bfd" or not prompt else prompt


def _sample(run: Run) -> tuple[str, str, NumericsError | None]:
    """Return the first held-out bytes of a domain, what the model makes of them, and why it says no more."""
    corpus, world = run.corpus, run.mesh.world
    prompt = corpus.validation[0].tokens[:_SAMPLE_PROMPT_TOKENS].tolist()
    prompt = _as_trained(prompt, run.config, corpus.tokenizer)
    tokens = generate(
        run.engine.model,
        prompt,
        max_new_tokens=_SAMPLE_TOKENS,
        options=SamplingOptions(temperature=0.8),
        generator=torch.Generator().manual_seed(0),
        stop_token=corpus.tokenizer.end_of_document,
        agree=lambda token: int(world.broadcast_(torch.tensor([token], device=world.device))),
    )
    written, speechless = list[int](), None
    try:
        with run.engine.autocast():
            written.extend(tokens)
    except NumericsError as error:
        speechless = error
    decode = corpus.tokenizer.decode
    return decode(prompt).decode("utf-8", "replace"), decode(written).decode("utf-8", "replace"), speechless
