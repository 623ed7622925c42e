"""Conversations as documents: their tokens, and which of them are learned.

rendered    system user1 answer1 user2 answer2            EOD
learn       assistant: answer1 and answer2, and the EOD, because the last turn is learned
too long    left: without user1 answer1; right: cut behind the last token of a row, and no EOD is learned
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.chat.chat_rows import ChatRow
from trainer.data.chat.chat_template import ChatRefused, ChatTemplate
from trainer.data.chat.encode_chat import ChatEncoder
from trainer.data.chat.messages import Learn, Truncate
from trainer.data.records.bad_records import BadRecord
from trainer.data.tokenizers.base import Tokenizer

NOTHING_LEARNED: Final = "with nothing to learn"
TOO_LONG: Final = "longer than a row"
ANY_LENGTH: Final = 1 << 62
"""A `seq_len` that no conversation exceeds."""


class EncodedRow(NamedTuple):
    """A conversation as a document of n tokens."""

    tokens: NDArray[np.integer]
    is_learned: NDArray[np.bool_]
    """(n + 1,): of each token and of the end of the document."""


class LongerThanRow(BadRecord):
    """A conversation that does not fit into a row."""


@dataclass(frozen=True, kw_only=True)
class ChatSetting:
    """Template, its variables and length of a row, with which all sources of a run encode conversations."""

    template: ChatTemplate
    variables: dict[str, Any]
    seq_len: int
    """Positions of a row, which a conversation must fit into."""

    def fingerprint(self) -> list[Any]:
        """Return what the tokens of conversations depend on."""
        return [self.template.fingerprint, self.variables, self.seq_len]


class RowEncoder:
    """Encodes the conversations of a source."""

    def __init__(self, setting: ChatSetting, tokenizer: Tokenizer, *, learn: Learn, truncate: Truncate) -> None:
        self._roles = frozenset(["assistant"] if isinstance(learn, str) else learn)
        self._shown = learn if isinstance(learn, str) else ", ".join(learn)
        self._learns_all, self._truncate = learn == "all", truncate
        # The end of document before a conversation takes a position too (batches/packed_rows.py).
        self._max_tokens = setting.seq_len - 1
        self._encoder = ChatEncoder(
            template=setting.template,
            tokenizer=tokenizer,
            roles=frozenset() if self._learns_all else self._roles,
            last_turn=learn == "last_turn",
            variables=setting.variables,
        )

    def encode(self, row: ChatRow, *, where: str) -> EncodedRow:
        """Return the tokens of a conversation.

        Raises:
            LongerThanRow: if it does not fit into a row, unless it is to be truncated.
            BadRecord: if the template refuses it, or nothing of it is learned.
            ChatTemplateError: if the template cannot be used at all.
        """
        try:
            return self._fitting(row, where)
        except ChatRefused as error:
            raise BadRecord(f"{where}: {error}", reason=error.reason) from error

    def _fitting(self, row: ChatRow, where: str) -> EncodedRow:
        self._refuse_unlearned(row, where)
        encoded, limit = self._encoded(row), self._max_tokens
        if len(encoded.tokens) > limit:
            if self._truncate == "left":
                encoded = self._without_beginning(row, encoded, where)
            elif self._truncate == "right":
                is_learned = np.append(encoded.is_learned[:limit], False)
                encoded = EncodedRow(encoded.tokens[:limit], is_learned)
            else:
                raise self._too_long(encoded, where)
        if not encoded.is_learned.any():
            found = f"{where}: nothing is learned in its {len(encoded.tokens)} tokens of a row (learn: {self._shown})"
            raise BadRecord(f"{found}; correct or remove the record", reason=NOTHING_LEARNED)
        return encoded

    def _encoded(self, row: ChatRow) -> EncodedRow:
        tools = None if row.tools is None else list(row.tools)
        chat = self._encoder.encode(row.messages, tools, without=row.not_learned)
        if self._learns_all:
            return EncodedRow(chat.ids, np.ones(len(chat.ids) + 1, dtype=np.bool_))
        last = len(row.messages) - 1
        is_end_learned = row.messages[last]["role"] in self._roles and last not in row.not_learned
        return EncodedRow(chat.ids, np.append(chat.mask, is_end_learned))

    def _without_beginning(self, row: ChatRow, whole: EncodedRow, where: str) -> EncodedRow:
        """Return the conversation, which is too long, without as few of its first exchanges as possible."""
        users = [number for number, message in enumerate(row.messages) if message["role"] == "user"]
        num_kept = next((n for n, m in enumerate(row.messages) if m["role"] not in ("system", "developer")), 0)
        starts = [start for start in users if start > num_kept]
        rest: dict[int, EncodedRow] = {}  # by the message that it begins with

        def fits(start: int) -> bool:
            rest[start] = self._encoded(_from(row, num_kept, start))
            return len(rest[start].tokens) <= self._max_tokens

        found = bisect_left(starts, True, key=fits)
        if found == len(starts):
            raise self._too_long(rest[starts[-1]] if starts else whole, where, what="its last exchange alone")
        return rest[starts[found]]

    def _refuse_unlearned(self, row: ChatRow, where: str) -> None:
        """Raise BadRecord if no turn is learned, before the template is asked."""
        roles = [message["role"] for message in row.messages]
        if self._learns_all or any(role in self._roles and i not in row.not_learned for i, role in enumerate(roles)):
            return
        if not self._roles & set(roles):
            wanted = " or ".join(sorted(self._roles))
            found = f"has no turn of {wanted}, but {', '.join(dict.fromkeys(roles))}"
        else:
            found = "takes every turn out of the loss that is to be learned"
        message = f"{where}: {found}; nothing is learned (learn: {self._shown}); correct or remove the record"
        raise BadRecord(message, reason=NOTHING_LEARNED)

    def _too_long(self, encoded: EncodedRow, where: str, what: str = "the conversation") -> LongerThanRow:
        limit = self._max_tokens
        return LongerThanRow(
            f"{where}: {what} has {len(encoded.tokens)} tokens, and a row of model.seq_len {limit + 1} takes {limit}; "
            f"set a larger seq_len, or truncate: {'' if self._truncate == 'left' else 'left, '}right or drop",
            reason=TOO_LONG,
        )


def _from(row: ChatRow, num_kept: int, start: int) -> ChatRow:
    """Return the first `num_kept` messages and those from `start` on."""
    numbers: Sequence[int] = [*range(num_kept), *range(start, len(row.messages))]
    not_learned = frozenset(new for new, old in enumerate(numbers) if old in row.not_learned)
    return ChatRow(tuple(row.messages[number] for number in numbers), row.tools, not_learned)
