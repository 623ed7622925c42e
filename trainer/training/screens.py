"""Contents of a run's first and last screen."""

from contextlib import suppress
from dataclasses import replace

from trainer.checkpoint.ancestors import ancestors, describe
from trainer.console import formatting
from trainer.console.summary import RunSummary
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.evaluation.eval_report import EvalReport
from trainer.evaluation.run_summary import summarize_evaluation
from trainer.metrics.records import loss_curve
from trainer.training.generate_text import Sample
from trainer.training.run import RunState

Line = str | tuple[str, str]
"""A heading, or a label with its text."""


def header(run: RunState) -> list[Line]:
    """Describe the run before its first step."""
    config, size, corpus, layout = run.config, run.size, run.corpus, run.mesh.layout
    moe = config.model.moe
    experts = "dense"
    if moe is not None:
        most = f"up to {moe.router.most_experts(moe.num_experts)}"
        per_token = f"{moe.experts_per_token:.3g}" if moe.has_static_flops else most
        experts = f"{moe.num_experts} experts, {per_token} for each token, router {moe.router.kind}"
    parameters = f"{size.total_parameters / 1e6:.2f}M parameters, {size.active_parameters / 1e6:.2f}M active"
    if size.learning_parameters < size.total_parameters:
        share = size.learning_parameters / size.total_parameters
        parameters += f", {size.learning_parameters / 1e6:.3g}M ({share:.2%}) learn"
    tokens = config.train.global_batch_size * config.model.seq_len
    at_most = "at most " if config.data.packing == "bfd" else ""  # some of it is padding
    steps = f"{config.train.steps} of {at_most}{tokens} tokens, {config.train.dtype}"
    lines: list[Line] = [f"turnout: training {config.name}", ("model", f"{parameters}; {experts}")]
    files = zip(corpus.domains, corpus.train, strict=True)
    lines.append(("text", ", ".join(f"{domain} {text_size(file.num_bytes)}" for domain, file in files)))
    if config.data.tokenizer.kind != "byte":
        bytes_per_token = sum(file.num_bytes for file in corpus.train) / sum(file.num_tokens for file in corpus.train)
        lines.append(("tokens", f"{corpus.tokenizer.vocab_size} kinds, {bytes_per_token:.2f} bytes each"))
    lines.append(("steps", f"{steps}, experts by {config.parallel.experts_kernel}"))
    if config.train.lr_scale:
        factors = ", ".join(f"{entry} {factor:g}" for entry, factor in config.train.lr_scale.items())
        lines.append(("rates", f"learning rate times {factors}"))
    if (ema := config.train.ema) is not None:
        copied = f"decay {ema.decay:g}: a copy of {size.learning_parameters / 1e6:.3g}M weights"
        lines.append(("average", f"of the weights (train.ema), {copied}"))
    if layout.world_size > 1:
        rows = f", rows over {layout.row_size}" if layout.row_size > 1 else ""
        rows += f", heads over {layout.tp_size}" if layout.tp_size > 1 else ""
        stages = f", layers over {layout.pp_size}" if layout.pp_size > 1 else ""
        lines.append(("ranks", f"{layout.world_size}, experts over {layout.ep_size}{rows}{stages}"))
    if isinstance(config.engine, DeepSpeedEngineConfig):
        lines.append(("engine", f"DeepSpeed, ZeRO {config.engine.zero_stage}"))
    if chain := ancestors(run.folder, run.parent):
        lines.append(("made from", describe(chain)))
    return [*lines, ("folder", str(run.folder.path))]


def _best_checkpoint(run: RunState) -> list[tuple[str, str]]:
    """Return the best checkpoint with its metric, if one is kept."""
    best = run.best.found
    if best is None:
        return []
    return [("the best", f"{run.saver.folder.of_step(best.step)}, {best.metric} {formatting.number(best.value)}")]


def _next_command(run: RunState) -> tuple[str, str]:
    """Return what to do with the model, and the command that does it."""
    if run.config.data.has_chats:
        return "answers", f"python -m trainer chat {run.folder.path}"
    return "more text", f"python -m trainer generate {run.folder.path}"


def text_size(num_bytes: int) -> str:
    """Format the size of a domain's text: 12.3 MB; 45.2 kB below one megabyte."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else formatting.size(num_bytes)


def final_summary(run: RunState, evaluation: EvalReport, sample: Sample, *, elapsed_s: float) -> RunSummary:
    """Summarize a finished run: evaluation, loss curve, sample and files."""
    logged_steps, losses = [], []
    with suppress(OSError):  # the curve is shown without earlier processes' steps
        logged_steps, losses = loss_curve(run.folder.metrics)
    steps = run.last_step
    layers, title = run.engine.model.config.moe_layers, f"{run.config.name}: {steps} steps done"
    since = f" since step {run.start_step}" if run.start_step else ""
    optional = [("profile", run.folder.profile), ("deepspeed", run.folder.deepspeed)]
    return replace(
        summarize_evaluation(evaluation, run.corpus, layers, title=title),
        facts=[("time", f"{formatting.duration(elapsed_s)}{since}"), ("tokens", formatting.rate(run.tokens))],
        steps=logged_steps,
        losses=losses,
        prompt=sample.prompt,
        sample=sample.text,
        written=[
            ("run folder", str(run.folder.path)),
            ("checkpoint", str(run.saver.folder.of_step(steps))),
            *_best_checkpoint(run),
            *run.trackers.written(),
            *((label, str(path)) for label, path in optional if path.is_dir()),
            _next_command(run),
        ],
    )
