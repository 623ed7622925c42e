"""Generate text: from a checkpoint for `generate`, and a sample at the end of training."""

import codecs
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoint.choice import CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.console.console import Console
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import NumericsError
from trainer.experiment import ExperimentConfig
from trainer.models.generation import ReadTokens, generate
from trainer.models.sampling import SamplingOptions
from trainer.moe.causality import evaluation_warning
from trainer.routing_record.record_writer import RecordWriter, finish_record
from trainer.terminal import visible
from trainer.training.load_trained import load_trained
from trainer.training.routing_recorder import facts_of, sequence_of
from trainer.training.run import RunState

_SAMPLE_PROMPT_TOKENS, _SAMPLE_TOKENS = 48, 320
_MAX_QUESTION_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A generated continuation of held-out text."""

    prompt: str
    text: str
    error: NumericsError | None
    """Why the text ends early: the model's logits are not finite."""


def generate_text(
    config: ExperimentConfig,
    folder: RunFolder,
    *,
    prompt: str,
    max_tokens: int,
    sampling: SamplingOptions,
    seed: int,
    choice: CheckpointChoice,
    record: Path | None = None,
) -> None:
    """Generate a text with a run's checkpoint, and stream it to standard output.

    An empty prompt is the start of a document. The same seed gives the same text. `record` is a new folder for the
    tokens and their experts.
    """
    read = None if record is None else list[ReadTokens]()
    console = Console(file=sys.stderr)
    engine, tokenizer, checkpoint = load_trained(config, folder, choice, warn=console.warning)
    if warning := evaluation_warning(engine.model.moe_layers()):
        console.warning(warning)
    # Bytes of a prompt that are not UTF-8 arrive as surrogates; the model reads the replacement characters shown.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
    tokens = generate(
        engine.model,
        _document_prompt(tokenizer.encode(prompt).tolist(), config, tokenizer),
        max_new_tokens=max_tokens,
        options=sampling,
        generator=torch.Generator().manual_seed(seed),
        stop_token=tokenizer.end_of_document,
        read=read,
    )
    # A terminal shows control characters instead of obeying them; a file or pipe gets the text unchanged.
    escape = visible if sys.stdout.isatty() else str
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal without UTF-8
    print(escape(prompt), end="", flush=True)
    try:
        for token in tokens:
            print(escape(decoder.decode(tokenizer.decode([token]))), end="", flush=True)
    except NumericsError as error:
        raise NumericsError(f"{checkpoint.path}: {error}; use the checkpoint of another step (--step)") from None
    finally:
        print(escape(decoder.decode(b"", final=True)))
    if record is not None and read is not None:
        facts = facts_of(config, tokenizer, origin="generate", step=checkpoint.step, choice=choice)
        writer = RecordWriter(record, facts.model, vocab_size=facts.vocab_size)
        for number, part in enumerate(read):
            writer.add(sequence_of(part, number))
        writer.flush()
        finish_record(record, facts)


def sample_held_out(run: RunState) -> Sample:
    """Continue the beginning of the first domain's held-out text. Collective: experts are on all ranks."""
    corpus, world = run.corpus, run.mesh.world
    prompt = _document_prompt(held_out_prompt(corpus, run.config.data.packing), run.config, corpus.tokenizer)
    tokens = generate(
        run.engine.model,
        prompt,
        max_new_tokens=_SAMPLE_TOKENS,
        options=SamplingOptions(temperature=0.8),
        generator=torch.Generator().manual_seed(0),
        stop_token=corpus.tokenizer.end_of_document,
        agree=lambda token: int(world.broadcast_(torch.tensor([token], device=world.device))),
    )
    generated, failure = list[int](), None
    try:
        with run.engine.autocast():
            generated.extend(tokens)
    except NumericsError as error:
        failure = error
    prompt_text, text = (corpus.tokenizer.decode(part).decode("utf-8", "replace") for part in (prompt, generated))
    return Sample(prompt=prompt_text, text=text, error=failure)


def held_out_prompt(corpus: Corpus, packing: Packing) -> list[int]:
    """Return the question before the first held-out answer; the beginning of the text, where there is no question."""
    file = corpus.validation[0]
    answer = int(file.answer_starts[0])
    is_question = packing == "bfd" and 0 < answer < min(file.num_tokens, _MAX_QUESTION_TOKENS)
    return file.tokens[: answer if is_question else _SAMPLE_PROMPT_TOKENS].tolist()


def _document_prompt(prompt: list[int], config: ExperimentConfig, tokenizer: Tokenizer) -> list[int]:
    """Start a prompt as documents start in training: after an end-of-document token if rows hold whole documents."""
    return [tokenizer.end_of_document, *prompt] if config.data.packing == "bfd" or not prompt else prompt
