"""Chat templates: a conversation as text, as transformers' `apply_chat_template` writes it.

transformers is the reference of the tests and is not needed here: jinja2 renders. What differs: a template that asks
for the date gets the one that is configured, since data that depends on the clock is never the same twice; it cannot
read files or draw random text; and a generation block that transformers would mark wrongly is refused.
"""

import hashlib
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError

from trainer.data.chat.growth import TooLarge
from trainer.data.chat.sandbox import ChatSandbox, NoDate, ReadsFiles
from trainer.errors import DataError, first_line, is_out_of_memory
from trainer.terminal import single_line

Message = Mapping[str, Any]
"""A message of a conversation: `role`, `content`, `tool_calls`, ..., all of them JSON values."""
MAX_TEMPLATE_CHARACTERS: Final = 1 << 20

_REASONING: Final = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's thoughts; the first is standard
_INDENTED: Final = re.compile(r"[ \t]+\{[%#]")
_TEMPLATE_FILE: Final = "<template>"  # jinja's name for the code of a template


class ChatTemplateError(DataError):
    """A chat template cannot be used."""


class ChatRefused(ChatTemplateError):
    """A template cannot render this conversation, although it may well render others."""

    def __init__(self, message: str, *, reason: str = "refused by the chat template") -> None:
        """Skipped records are counted by `reason`."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text."""

    text: str
    generated: tuple[tuple[int, int], ...]
    """Start and end of the text of each generation block, in characters."""


class ChatTemplate:
    """A chat template, compiled when it is first used. Can be pickled; not for several threads at once."""

    def __init__(
        self, text: str, *, special_tokens: Mapping[str, str] | None = None, name: str, today: date | None = None
    ) -> None:
        """Keep a template.

        Args:
            text: Jinja.
            special_tokens: `bos_token`, `eos_token`, ...: strings that the template may write.
            name: of its file, for messages.
            today: the date for a template that asks for it; None refuses such a template.
        """
        self.text, self.name, self.today = text, name, today
        self.special_tokens = dict(special_tokens or {})
        self._compiled: tuple[ChatSandbox, Template] | None = None

    def __reduce__(self) -> Any:
        return _restored, (self.text, self.special_tokens, self.name, self.today)

    @property
    def fingerprint(self) -> str:
        """Equal for two templates that write the same text for every conversation."""
        parts = [self.text, self.special_tokens, self.today and self.today.isoformat()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def marks_generation(self) -> bool:
        """Whether it marks what the assistant wrote."""
        return self._compile()[0].marks_generation

    def after(self, beginning: str) -> "ChatTemplate":
        """Return the template that writes `beginning` before what this one writes."""
        return self._behind(f"{{{{- {json.dumps(beginning, ensure_ascii=False)} }}}}")

    def with_own(self, name: str) -> "ChatTemplate":
        """Return the template that writes its special token `name` whatever a tokenizer says."""
        token = self.special_tokens.get(name, "")
        return self._behind(f"{{%- set {name} = {json.dumps(token, ensure_ascii=False)} +%}}")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """Return a conversation as text.

        Args:
            messages: as in OpenAI's format; keys whose value is None are left out.
            tools: JSON schemas of functions; None: no tools.
            add_generation_prompt: end with what begins an answer of the assistant.
            variables: others that the template knows, such as `enable_thinking`.

        Raises:
            ChatRefused: if the template refuses the conversation, fails on it, or makes too much text of it.
            ChatTemplateError: if the template cannot be used at all.
        """
        environment, template = self._compile()
        values = self.special_tokens | {
            "messages": [_normalized(message) for message in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text, recording = environment.generate(template, values | dict(variables or {}))
        except NoDate:
            advice = "text that depends on the clock is never the same twice; set data.chat_template.date: 2026-01-31"
            raise ChatTemplateError(f"{self.name}: asks for the date (strftime_now); {advice}") from None
        except SecurityError as error:
            line = single_line(f"{self._place(error)}: does what is not allowed: {error}")
            raise ChatTemplateError(f"{line}; correct the template") from None
        except TooLarge as error:
            raise ChatRefused(f"{self._place(error)}: {error}; shorten the conversation", reason="too large") from None
        except UndefinedError as error:
            what = single_line(f"{self._place(error)}: cannot render the conversation ({error})")
            raise ChatRefused(what) from None
        except TemplateError as error:
            raise ChatRefused(single_line(f"{self._place(error)}: refuses the conversation: {error}")) from None
        except Exception as error:  # whatever the template's own code meets in the messages
            if is_out_of_memory(error):
                raise ChatRefused(f"{self._place(error)}: fills the memory", reason="too large") from None
            what = single_line(f"{type(error).__name__}: {first_line(error)}")
            raise ChatRefused(f"{self._place(error)}: cannot render the conversation ({what})") from None
        generated = [(start, start + len(piece)) for start, piece in recording.generated]
        for (start, end), (_, piece) in zip(generated, recording.generated, strict=True):
            if text[start:end] != piece:
                raise ChatTemplateError(
                    f"{self.name}: has a generation block inside a macro, a call or a set block, where its place in "
                    "the text is not known; write it directly into the loop over the messages"
                )
        return RenderedChat(text, tuple(generated))

    def _compile(self) -> tuple[ChatSandbox, Template]:
        if self._compiled is None:
            if len(self.text) > MAX_TEMPLATE_CHARACTERS:
                size = f"{len(self.text)} characters, and {MAX_TEMPLATE_CHARACTERS} are allowed"
                raise ChatTemplateError(f"{self.name}: has {size}; is it a chat template?")
            environment = ChatSandbox(self._strftime_now)
            try:
                self._compiled = environment, environment.from_string(self.text)
            except TemplateSyntaxError as error:
                line = single_line(f"{self.name}:{error.lineno}: {error.message}")
                raise ChatTemplateError(f"{line}; correct the template") from None
            except ReadsFiles as error:
                message = f"{self.name}: {error}; write the whole template into one file"
                raise ChatTemplateError(message) from None
            except (SyntaxError, RecursionError, MemoryError, TemplateError, ValueError) as error:
                line = single_line(f"{self.name}: cannot be compiled ({first_line(error)})")
                raise ChatTemplateError(f"{line}; correct the template") from None
        return self._compiled

    def _behind(self, code: str) -> "ChatTemplate":
        # White space before a block is not written at the beginning of a line, which is elsewhere then.
        text = self.text.lstrip(" \t") if _INDENTED.match(self.text) else self.text
        return _restored(f"{code}{text}", self.special_tokens, self.name, self.today)

    def _strftime_now(self, form: str) -> str:
        if self.today is None:
            raise NoDate
        return self.today.strftime(form)

    def _place(self, error: Exception) -> str:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TEMPLATE_FILE
        ]
        return f"{self.name}:{lines[-1]}" if lines else self.name


def _restored(text: str, special_tokens: Mapping[str, str], name: str, today: date | None) -> ChatTemplate:
    return ChatTemplate(text, special_tokens=special_tokens, name=name, today=today)


def _normalized(message: Message) -> dict[str, Any]:
    """Return a message without keys of value None, its thoughts under both names that templates read."""
    kept = {key: value for key, value in message.items() if value is not None}
    thoughts = next((kept[name] for name in _REASONING if name in kept), None)
    if thoughts is None:
        return kept
    return {"thinking": thoughts} | kept | {"reasoning_content": thoughts}
