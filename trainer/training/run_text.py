"""The text of a run, with its own tokenizer and template."""

from collections.abc import Callable

from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.run_folder import RunFolder
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.token_cache.build_cache import IngestProgress
from trainer.data.tokenizers.base import Tokenizer
from trainer.experiment import ExperimentConfig
from trainer.training.run_template import training_template


def corpus_of_run(
    config: ExperimentConfig, folder: RunFolder, tokenizer: Tokenizer, *, progress: IngestProgress | None = None
) -> Corpus:
    """Return the text of a run; see `build_corpus` and `training_template` for what it raises."""
    template, seq_len = training_template(config, folder, tokenizer), config.model.seq_len
    return build_corpus(config.data, tokenizer=tokenizer, seq_len=seq_len, template=template, progress=progress)


def warn_of_other_text(checkpoint: CheckpointHandle, corpus: Corpus, warn: Callable[[str], None]) -> None:
    """Warn if a checkpoint was trained on other text than that of the corpus, whose held-out part it may have read."""
    if checkpoint.run["data_fingerprint"] != corpus.fingerprint:
        warn("the run was trained on other text, which may contain some of what is held out now")
