"""The `data` section: sources, tokenizer, packing and the validation split. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem, Renamed
from trainer.config.numbers import Factor
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.sources.chat_options import ChatOptions
from trainer.data.sources.document_options import StreamOptions
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig
from trainer.data.token_cache.folds import FoldConfig
from trainer.data.token_cache.splits import SplitConfig
from trainer.data.tokenizers.registry import ByteTokenizerConfig, TokenizerConfig

Packing = Literal["wrapped", "bfd"]
OnTextChange = Literal["continue", "restart"]


class MixtureConfig(Config):
    """Share of each domain in the training rows."""

    by: Literal["weight", "tokens"] = "weight"
    """`weight`: each source gets its weight's share of the rows, split evenly over its domains, regardless of their
    size.

    `tokens`: a domain's share is proportional to the weight of its source times its training tokens; with equal weights
    all domains are read equally often.
    """
    temperature: Factor = 1.0
    """For `by: tokens`: shares are proportional to weight * tokens^(1 / temperature). Above 1 they are more even, so
    small domains are repeated more often than large ones."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a temperature without effect."""
        if self.by == "weight" and self.temperature != 1:
            yield Problem("temperature", f"{self.temperature} has no effect on shares by weight; set by: tokens")


class DataConfig(Config):
    """Training text."""

    old_names = {"packing": Renamed("packing", {"crossing": "wrapped", "whole": "bfd"})}  # noqa: RUF012

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(default=[InstalledSourceConfig()])
    """Sources of the training text."""
    mixture: MixtureConfig = MixtureConfig()
    """Share of each domain in the training rows."""
    packing: Packing = "wrapped"
    """Packing of text into rows, for training and for evaluation.

    `wrapped`: windows of a domain's text that ignore document boundaries. `bfd`: whole documents, packed by best-fit
    decreasing, with an end of document before and after each and padding in the rest of a row; only documents longer
    than a row are split. Conversations need `bfd`.
    """
    tokenizer: TokenizerConfig = ByteTokenizerConfig()
    """Tokenizer."""
    chat_template: ChatTemplateConfig = ChatTemplateConfig()
    """Template that writes conversations as text, for sources of chats."""
    split: SplitConfig = SplitConfig()
    """Validation split."""
    fold: FoldConfig | None = None
    """Fold of a cross-validation over documents that is held out, instead of what `split` holds out: {index: 0, of: 5}.

    Documents are assigned by a hash of their text, in each domain separately. Null: `split` decides.
    """
    changed: OnTextChange | None = None
    """Resuming a run whose text has changed since its checkpoint. Null: it is refused.

    `continue`: each domain goes on after the rows that were read of it. One whose text is the same goes on in its
    order, and each of its rows is still read once in an epoch; one whose text is another goes on in the order of the
    new text, so that in the present epoch some rows are read again and others are left out; a new one, and a stream
    that changed, begins. `restart`: the new text is read from its beginning, as by a new run. Steps, learning rate,
    counts of tokens and noise go on in both. The text only counts as changed once: a later resume goes on in the new
    one.
    """
    cache_dir: PathText = ".cache/tokens"
    """Folder of the tokenised text, built once and reused."""
    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Number of processes that tokenise text in parallel; does not affect the result. Null: one for each core."""

    @property
    def cached_split(self) -> SplitConfig:
        """Split of the token files; folds are copied from one that is the same for all of them."""
        return self.split if self.fold is None else SplitConfig()

    @property
    def has_chats(self) -> bool:
        """Whether a source holds conversations."""
        return any(isinstance(source, ChatOptions) for source in self.sources)

    def problems(self) -> Iterator[Problem]:
        """Refuse options that need the end of a stream, and windows that cut conversations."""
        for index, source in enumerate(self.sources):
            if isinstance(source, ChatOptions) and self.packing == "wrapped":
                yield Problem(
                    "packing",
                    f"wrapped, whose windows part questions from answers, but sources.{index} holds conversations; "
                    "use packing: bfd",
                )
                break
        if self.fold is not None and self.split.kind == "tail":
            yield Problem(
                "fold", "folds part no document, but split.kind: tail does; remove one of them, or use split.kind: auto"
            )
        streams = [source.kind for source in self.sources if isinstance(source, StreamOptions)]
        if not streams:
            return
        stream = f"but a source is a stream ({streams[0]}), whose"
        if self.split.kind == "tail":
            yield Problem("split.kind", f"tail, {stream} end is never seen; use hash")
        if self.fold is not None:
            yield Problem(
                "fold",
                f"holds out documents of the whole text, {stream} end is never seen; ingest it ({streams[0]} without "
                "_stream), or remove fold",
            )
        if self.mixture.by == "tokens":
            yield Problem("mixture.by", f"tokens, {stream} tokens are not known; use weight")
