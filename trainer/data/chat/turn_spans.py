"""Where each message is in a rendered conversation, for templates that do not mark what the assistant wrote.

The text of a message is what a longer conversation has more than a shorter one; for the assistant the shorter one ends
with the generation prompt, so that exactly what it has to generate remains. That holds only if the shorter text is the
beginning of the longer one, which is checked: some templates rewrite earlier messages (Qwen3 removes thoughts).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trainer.config.nodes import shown
from trainer.data.chat.chat_template import ChatRefused, ChatTemplate, Message, RenderedChat

ASSISTANT: Final = "assistant"
_EXCERPT: Final = 24
_REMEDY: Final = (
    "mark what the assistant writes in a copy of the template, {% generation %}...{% endgeneration %}, or learn the "
    "last turn only"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages, and how they are rendered."""

    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def render(self, num_messages: int | None = None, *, add_generation_prompt: bool = False) -> RenderedChat:
        """Return the text of the first messages; None: of all."""
        return self.template.render(
            self.messages[:num_messages],
            self.tools,
            add_generation_prompt=add_generation_prompt,
            variables=self.variables,
        )

    def span_of(self, index: int, text: str, ends: re.Pattern[str]) -> tuple[int, int]:
        """Return start and end of a message in `text`, the whole conversation.

        `ends` are the names of tokens; white space after the one that ends an answer is not generated.

        Raises:
            ChatRefused: if the conversation up to the message is not the beginning of `text`.
        """
        is_answer = self.messages[index].get("role") == ASSISTANT
        start = end = 0
        if index or is_answer:
            start = self._length(text, index, index, add_generation_prompt=is_answer)
        end = len(text) if index + 1 == len(self.messages) else self._length(text, index, index + 1)
        if end < start:  # it adds less than the generation prompt has
            raise self._refused(index, "adds less than the generation prompt has")
        if is_answer:
            written = text[start:end].rstrip()
            names = list(ends.finditer(written))
            if names and names[-1].end() == len(written):
                end = start + len(written)
        return start, end

    def _length(self, text: str, index: int, num_messages: int, *, add_generation_prompt: bool = False) -> int:
        try:
            shorter = self.render(num_messages, add_generation_prompt=add_generation_prompt).text
        except ChatRefused as error:
            raise self._refused(index, f"cannot be told apart from the others: {error}") from None
        if not text.startswith(shorter):
            same = next((i for i, (a, b) in enumerate(zip(text, shorter, strict=False)) if a != b), len(text))
            alone, within = (shown(part[max(0, same - _EXCERPT) : same + _EXCERPT]) for part in (shorter, text))
            raise self._refused(index, f"follows {alone} on its own and {within} in the whole conversation")
        return len(shorter)

    def _refused(self, index: int, why: str) -> ChatRefused:
        role = shown(self.messages[index].get("role"))
        message = f"{self.template.name}: message {index + 1} ({role}) {why}; {_REMEDY}"
        return ChatRefused(message, reason="turns not found")
