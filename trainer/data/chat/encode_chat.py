"""Conversations as token ids, with a mask of the tokens to learn."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from trainer.data.chat.chat_template import ChatRefused, ChatTemplate, Message, RenderedChat
from trainer.data.chat.special_text import broken, has_match, unused_character
from trainer.data.chat.turn_spans import ASSISTANT, Conversation
from trainer.data.tokenizers.base import Tokenizer
from trainer.data.tokenizers.rendered_tokens import RenderedTokens, encode_rendered, names_pattern

_USERS: Final = frozenset({"user", "system", "developer"})
"""Roles whose messages end a turn of the assistant; its tools' do not."""
_PROBE: Final = "probe"
Span = tuple[int, int]  # start and end


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as (T,) token ids, without an end of document."""

    ids: NDArray[np.integer]
    mask: NDArray[np.bool_]
    """(T,): whether a token is to be learned, in transformers the `assistant_masks`."""


@dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Encodes conversations with a template and a tokenizer. Can be pickled."""

    template: ChatTemplate
    tokenizer: Tokenizer
    roles: AbstractSet[str] = frozenset({ASSISTANT})
    """Whose messages are learned."""
    last_turn: bool = False
    """Learn only what follows the last message of a user."""
    variables: Mapping[str, Any] | None = None
    """Given to the template in addition."""

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        without: AbstractSet[int] = frozenset(),
    ) -> EncodedChat:
        """Return the tokens of a whole conversation; messages with an index in `without` are not learned.

        Raises:
            ChatRefused: if the template cannot render it, or what is to be learned cannot be found in its text.
            ChatTemplateError: if the template cannot be used at all.
        """
        chat = self._conversation(messages, tools)
        rendered = chat.render()
        spans = self._spans(chat, rendered, without)
        tokens = self._tokens(chat, rendered.text, add_generation_prompt=False)
        return EncodedChat(tokens.ids, tokens.overlapping(spans))

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> NDArray[np.integer]:
        """Return the tokens of a conversation that the assistant is to go on with."""
        chat = self._conversation(messages, tools)
        return self._tokens(chat, chat.render(add_generation_prompt=True).text, add_generation_prompt=True).ids

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer: the end of document, and what the template writes after one."""
        messages = [{"role": "user", "content": _PROBE}, {"role": ASSISTANT, "content": _PROBE}]
        stops = {self.tokenizer.end_of_document}
        try:
            text = self._conversation(messages, None).render().text
        except ChatRefused:  # it wants another conversation
            return frozenset(stops)
        after = self._names.search(text, text.rfind(_PROBE))
        if after is not None:
            stops.add(self.tokenizer.special_tokens()[after[0]])
        return frozenset(stops)

    @cached_property
    def _names(self) -> Any:
        return names_pattern(self.tokenizer.special_tokens())

    def _conversation(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Conversation:
        return Conversation(template=self.template, messages=messages, tools=tools, variables=self.variables or {})

    def _tokens(self, chat: Conversation, text: str, *, add_generation_prompt: bool) -> RenderedTokens:
        """Return the tokens of a conversation's text, in which the names of tokens within messages are text."""
        inputs = [chat.messages, chat.tools, chat.variables]
        if not has_match(inputs, self._names):
            return encode_rendered(self.tokenizer, text, self._names)
        mark = unused_character(inputs)
        messages, tools, variables = broken(inputs, self._names, mark)
        marked = replace(chat, messages=messages, tools=tools, variables=variables)
        marked_text = marked.render(add_generation_prompt=add_generation_prompt).text
        if marked_text.replace(mark, "") != text:
            message = "has the name of a special token in it, and the template does not write it as it is; remove it"
            raise ChatRefused(f"{self.template.name}: the conversation {message}", reason="special token in text")
        return encode_rendered(self.tokenizer, marked_text, self._names, break_mark=mark)

    def _spans(self, chat: Conversation, rendered: RenderedChat, without: AbstractSet[int]) -> tuple[Span, ...]:
        """Return the characters to learn, in order."""
        roles = [message.get("role") for message in chat.messages]
        first = 0
        if self.last_turn:
            first = 1 + max((i for i, role in enumerate(roles) if role in _USERS), default=-1)
        chosen = [i for i, role in enumerate(roles) if role in self.roles and i >= first]
        if self.roles == {ASSISTANT} and self.template.marks_generation:
            generated = rendered.generated[len(chat.render(first).generated) if first else 0 :]
            if without.isdisjoint(chosen):
                return generated
            if len(generated) == len(chosen):
                return tuple(span for i, span in zip(chosen, generated, strict=True) if i not in without)
        return tuple(chat.span_of(i, rendered.text, self._names) for i in chosen if i not in without)
