"""Which tokens of a conversation are learned, and what becomes of one that is longer than a row."""

from typing import Any

import numpy as np
import pytest

from trainer.data.chat.chat_rows import ChatRow
from trainer.data.chat.config import ChatTemplateConfig
from trainer.data.chat.encode_rows import ANY_LENGTH, ChatSetting, LongerThanRow, RowEncoder
from trainer.data.chat.find_template import find_template
from trainer.data.records.bad_records import BadRecord
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.data.tokenizers.registry import ByteTokenizerConfig

EOD = ByteTokenizer.end_of_document
S, U, A, T, END = (bytes([marker]) for marker in (0xF8, 0xF9, 0xFA, 0xFB, 0xFE))  # of the byte tokenizer's template
CHAT = [("system", "s"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
SYSTEM, FIRST, SECOND = S + b"s" + END, U + b"one" + END + A + b"1" + END, U + b"two" + END + A + b"2" + END


def row_of(*turns: tuple[str, str], not_learned: frozenset[int] = frozenset()) -> ChatRow:
    return ChatRow(tuple({"role": role, "content": content} for role, content in turns), not_learned=not_learned)


def encoder(*, seq_len: int = ANY_LENGTH, learn: Any = "assistant", truncate: Any = "error") -> RowEncoder:
    tokenizer = ByteTokenizer()
    template = find_template(ChatTemplateConfig(), ByteTokenizerConfig(), tokenizer)
    setting = ChatSetting(template=template, variables={}, seq_len=seq_len)
    return RowEncoder(setting, tokenizer, learn=learn, truncate=truncate)


def learned(row: ChatRow, **options: Any) -> tuple[bytes, bytes]:
    """Return all bytes of a conversation, and those that are learned, perhaps with the end of the document."""
    tokens, is_learned = encoder(**options).encode(row, where="a:1")
    assert len(is_learned) == len(tokens) + 1
    return bytes(tokens.tolist()), bytes(np.append(tokens, EOD)[is_learned].tolist())


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ("assistant", b"1" + END + b"2" + END + b"\xff"),
        (["assistant"], b"1" + END + b"2" + END + b"\xff"),
        ("last_turn", b"2" + END + b"\xff"),
        ("all", SYSTEM + FIRST + SECOND + b"\xff"),
        (["user"], U + b"one" + END + U + b"two" + END),
        (["system", "assistant"], SYSTEM + b"1" + END + b"2" + END + b"\xff"),
    ],
)
def test_what_is_learned(learn, expected):
    assert learned(row_of(*CHAT), learn=learn) == (SYSTEM + FIRST + SECOND, expected)


def test_the_end_is_learned_only_after_a_learned_turn():
    assert learned(row_of(*CHAT, ("user", "?")))[1] == b"1" + END + b"2" + END
    assert learned(row_of(*CHAT, not_learned=frozenset({4})))[1] == b"1" + END
    assert learned(row_of(*CHAT, not_learned=frozenset({2})))[1] == b"2" + END + b"\xff"


def test_flags_hold_for_roles_that_the_template_does_not_mark():
    row = row_of(*CHAT, not_learned=frozenset({1, 2}))
    assert learned(row, learn=["user", "assistant"])[1] == U + b"two" + END + b"2" + END + b"\xff"


WHOLE = len(SYSTEM + FIRST + SECOND)


@pytest.mark.parametrize("truncate", ["error", "left", "right", "drop"])
def test_a_conversation_fits_with_the_end_before_it(truncate):
    assert learned(row_of(*CHAT), seq_len=WHOLE + 1, truncate=truncate)[0] == SYSTEM + FIRST + SECOND


@pytest.mark.parametrize("truncate", ["error", "drop"])
def test_a_longer_one_is_refused(truncate):
    with pytest.raises(
        LongerThanRow, match=rf"a:1: the conversation has {WHOLE} tokens, and a row of model.seq_len {WHOLE}"
    ):
        learned(row_of(*CHAT), seq_len=WHOLE, truncate=truncate)


def test_left_leaves_out_the_first_exchanges_and_keeps_the_system_prompt():
    assert learned(row_of(*CHAT), seq_len=WHOLE, truncate="left") == (SYSTEM + SECOND, b"2" + END + b"\xff")
    many = [turn for i in range(9) for turn in (("user", f"q{i}"), ("assistant", f"a{i}"))]
    row = row_of(*CHAT[:1], *many, not_learned=frozenset({16}))  # a7
    kept = b"".join(U + b"q%d" % i + END + A + b"a%d" % i + END for i in (6, 7, 8))
    for seq_len in (len(SYSTEM + kept) + 1, len(SYSTEM + kept) + 7):
        whole, target = learned(row, seq_len=seq_len, truncate="left")
        assert (whole, target) == (SYSTEM + kept, b"a6" + END + b"a8" + END + b"\xff")


def test_right_cuts_the_row_and_learns_no_end():
    for length in range(len(SYSTEM + FIRST), WHOLE):
        whole, target = learned(row_of(*CHAT), seq_len=length + 1, truncate="right")
        assert whole == (SYSTEM + FIRST + SECOND)[:length]
        assert target == b"1" + END + (b"2" if length == WHOLE - 1 else b"")


@pytest.mark.parametrize(("truncate", "message"), [("left", "its last exchange alone has"), ("right", "nothing is")])
def test_a_question_that_fills_the_row_is_refused(truncate, message):
    with pytest.raises(BadRecord, match=f"a:1: {message}"):
        learned(row_of(("user", "x" * 99), ("assistant", "1")), seq_len=50, truncate=truncate)
