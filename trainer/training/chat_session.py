"""A conversation with a model: its history, and answers token by token. Reads and writes no terminal."""

import codecs
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.data.chat.encode_chat import ChatEncoder
from trainer.data.chat.turn_spans import ASSISTANT
from trainer.errors import DataError, NumericsError
from trainer.models.gpt import GPT
from trainer.models.growing_text import GrowingText
from trainer.models.sampling import BrokenLogits, SamplingOptions


class TooLong(DataError):
    """A message that does not fit into a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How answers are generated."""

    sampling: SamplingOptions
    max_tokens: int
    seed: int = 0
    """The same seed and messages give the same answers."""
    first_tokens: tuple[int, ...] = ()
    """Before the conversation: an end of document if training rows have one there."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """How an answer came to be."""

    dropped: int = 0
    """Oldest exchanges that were forgotten for it."""
    ended_by: str | None = None
    """Why it ended, if not by the end of the model's turn."""


class ChatSession:
    """A conversation with a model in memory.

    The cache is kept from turn to turn, so that only new tokens are computed. If the history leaves too little room in
    a row, which is as long as in training, the oldest exchange is forgotten.
    """

    def __init__(self, model: GPT, encoder: ChatEncoder, options: AnswerOptions, *, system: str | None = None) -> None:
        self._text, self._encoder, self._options = GrowingText(model), encoder, options
        self._seq_len = model.config.seq_len
        self._room = min(options.max_tokens, max(1, self._seq_len // 4))
        self._generator = torch.Generator().manual_seed(options.seed)
        self._exchanges: list[tuple[str, str]] = []
        self.system = system
        self.last = Answer()
        """About the newest answer."""

    @property
    def num_computed(self) -> int:
        """Tokens that the model has computed so far."""
        return self._text.num_computed

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation in OpenAI's format."""
        return [*self._history(self._exchanges)]

    def as_row(self) -> str:
        """Return the conversation as a line of a file of chats."""
        return json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n"

    def reset(self) -> None:
        """Forget all but the system's message, and draw as at the beginning."""
        self._exchanges.clear()
        self._generator.manual_seed(self._options.seed)

    def undo(self) -> bool:
        """Forget the last exchange; return whether there was one."""
        if not self._exchanges:
            return False
        self._exchanges.pop()
        return True

    def answer(self, message: str) -> Generator[str]:
        """Yield pieces of the answer to a message. Closed early, what was said so far is kept.

        Raises:
            ChatRefused: if the template refuses the conversation. Nothing is kept then, nor after the others:
            TooLong: if the message alone does not fit.
            NumericsError: if the model's logits are not finite.
        """
        self.last = Answer()
        tokens = self._prompt(message)
        pieces: list[str] = []
        is_kept = True
        try:
            for piece in self._generate(tokens):
                pieces.append(piece)
                yield piece
        except NumericsError:
            is_kept = False
            raise
        finally:
            if is_kept:
                self._exchanges.append((message, "".join(pieces)))

    def _prompt(self, message: str) -> list[int]:
        """Return the tokens up to the answer, and forget the oldest exchanges if they are too many."""
        tokens: list[int] = []
        for first in range(len(self._exchanges) + 1):
            exchanges = self._exchanges[first:]
            chat = [*self._history(exchanges), {"role": "user", "content": message}]
            tokens = [*self._options.first_tokens, *self._encoder.prompt(chat).tolist()]
            if len(tokens) + self._room <= self._seq_len:
                self._exchanges, self.last.dropped = exchanges, first
                return tokens
        fits = f"{self._seq_len - self._room} fit into a row of {self._seq_len} with room for an answer"
        raise TooLong(f"the message has {len(tokens)} tokens with the template, and {fits}; write less")

    def _history(self, exchanges: Sequence[tuple[str, str]]) -> Iterator[dict[str, str]]:
        if self.system is not None:
            yield {"role": "system", "content": self.system}
        for user, assistant in exchanges:
            yield {"role": "user", "content": user}
            yield {"role": ASSISTANT, "content": assistant}

    def _generate(self, tokens: list[int]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end within a character
        tokenizer, stops = self._encoder.tokenizer, self._encoder.stop_tokens
        for number in range(self._options.max_tokens):
            if len(tokens) > self._seq_len:
                self.last.ended_by = f"the row of {self._seq_len} tokens is full"
                break
            logits = self._text.logits_after(tokens)
            try:
                token = int(self._options.sampling.sample(logits.cpu(), generator=self._generator))
            except BrokenLogits:
                problem = f"token {number}: the model's logits are not finite, so no token can be sampled"
                raise NumericsError(problem) from None
            if token in stops:
                break
            tokens.append(token)
            if said := decoder.decode(tokenizer.decode([token])):  # nothing for a special token, as servers have it
                yield said
        else:
            self.last.ended_by = f"{self._options.max_tokens} tokens (--max-tokens)"
        if rest := decoder.decode(b"", final=True):
            yield rest
