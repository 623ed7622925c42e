"""Options of sources of conversations. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from trainer.config.base import Problem, repeated
from trainer.config.nodes import shown
from trainer.data.chat.chat_rows import ChatFormat
from trainer.data.chat.messages import Learn, Truncate
from trainer.data.records.registry import DatasetConfig, JsonlRecordsConfig, Name, RecordsOptions
from trainer.data.sources.document_options import DocumentsOptions, Domain, StreamOptions

if TYPE_CHECKING:
    from trainer.data.records.base import RecordReader
    from trainer.data.sources.base import Source


class ConversationOptions(RecordsOptions):
    """Options that find a conversation in a record, and what of it is learned."""

    format: ChatFormat | None = None
    """Columns of the conversation. `messages`: turns of role and content (OpenAI) or from and value (ShareGPT), in
    messages, conversations or conversation; `prompt_completion`, `preference` (chosen, of which rejected is not read),
    `alpaca` (instruction, input, output, history). Null: whichever of these a record has."""
    turns_key: Name | None = None
    """Column with the turns, where its name is another one; a.b is key b of a."""
    learn: Learn = "assistant"
    """Text to learn: what the `assistant` says, what it says after the last question (`last_turn`), `all` that the
    template writes, or a list of roles. A message with `weight: 0` or `train: false` is not learned, nor is a
    prompt."""
    truncate: Truncate = "error"
    """Action on a conversation that does not fit into a row of model.seq_len: `error` ends the run (or skips it, as
    `on_bad_row` says), `drop` leaves it out and counts it, `left` leaves out its first exchanges but not the system
    prompt, `right` cuts it where the row ends."""

    def problems(self) -> Iterator[Problem]:
        """Refuse roles that are listed twice."""
        yield from super().problems()
        for role in repeated(self.learn) if isinstance(self.learn, list) else ():
            yield Problem("learn", f"{role} is named twice; name each role once")
        if self.turns_key is not None and self.format not in (None, "messages"):
            yield Problem(
                "turns_key", f"{shown(self.turns_key)}, but format {self.format} has columns of its own; remove one"
            )


class ChatOptions(DocumentsOptions, ConversationOptions):
    """Options for turning records into conversations, which `data.chat_template` writes as text."""

    def build(self) -> Source:
        """Create the source."""
        from trainer.data.sources.chat_source import ChatSource

        return ChatSource(self.reader(), self.rules(), format=self.format, turns_key=self.turns_key)


class ChatSourceConfig(ChatOptions, JsonlRecordsConfig):
    """Conversations in files with one JSON object a line, plain, .gz or .zst; each line is one conversation."""

    kind: Literal["chat"] = "chat"  # type: ignore[assignment]
    domain: Domain = "chat"
    """Name of the domain in per-domain losses."""

    def reader(self) -> RecordReader:
        """Create the reader."""
        from trainer.data.records.json_lines import JsonlReader

        return JsonlReader(self.path, unique_keys=True)


class HfChatSourceConfig(ChatOptions, DatasetConfig):
    """Conversations in whatever Hugging Face `datasets` reads; each record is one conversation."""

    kind: Literal["hf_chat"] = "hf_chat"
    domain: Domain = "hf_chat"
    """Name of the domain in per-domain losses."""


class HfChatStreamSourceConfig(ChatOptions, StreamOptions):
    """Streamed `hf_chat` source for more conversations than can be ingested: read again in every epoch.

    Training rows are shuffled within a block of `block_tokens`; blocks keep the order of the data set.
    """

    kind: Literal["hf_chat_stream"] = "hf_chat_stream"
    domain: Domain = "hf_chat_stream"
    """Name of the domain in per-domain losses."""
