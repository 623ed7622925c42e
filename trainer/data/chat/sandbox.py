"""Jinja environment of chat templates: what transformers offers them, in a sandbox whose work and output are bounded.

A template comes with a published tokenizer, so it is foreign: it sees JSON values only, reads no file and no clock, and
cannot fill the memory. Limits count work, not time, so that a row is not refused on a slow machine; the limit of time
is only for a template that hangs.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from jinja2 import Template, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from trainer.data.chat.growth import TooLarge, bounded_list, check_call, check_format, check_length, check_result

_MAX_STEPS: Final = 1 << 20  # turns of loops and calls of macros
_MAX_SECONDS: Final = 60.0
_MAX_BITS: Final = 1 << 12  # of a whole number
_STEPS_BETWEEN_LOOKS: Final = 256
_READING: Final = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
_REPEATED: Final = (nodes.For, nodes.Macro)


class NoDate(TemplateError):
    """A template that asks for the date where none is given."""


class ReadsFiles(TemplateError):
    """A template that names another file."""


@dataclass(slots=True)
class Recording:
    """Output and work of one rendering so far."""

    length: int = 0
    """Characters of the blocks that are complete."""
    generated: list[tuple[int, str]] = field(default_factory=list)
    """Start and text of each generation block."""
    steps: int = 0
    started: float = field(default_factory=time.thread_time)


class GenerationBlocks(Extension):
    """The tag `generation`, which marks what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Turn a block into a call that records its text."""
        assert isinstance(self.environment, ChatSandbox)
        self.environment.marks_generation = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _record(self, _: nodes.EvalContext, caller: Callable[[], str]) -> str:
        assert isinstance(self.environment, ChatSandbox)
        text = caller()
        recording = self.environment.recording
        recording.generated.append((recording.length, text))
        return text


class ChatSandbox(ImmutableSandboxedEnvironment):
    """Sandbox of one template. Not for several threads at once."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, strftime_now: Callable[[str], str]) -> None:
        """Offer the filters and functions that published templates use; `strftime_now` formats the date."""
        extensions = [GenerationBlocks, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.recording = Recording()
        self.marks_generation = False
        """Whether a template that was parsed has generation blocks."""
        self.filters |= {"tojson": _tojson, "random": _refuse_chance}
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]  # random text
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        functions |= {"dict": _Dictionaries(), "namespace": _Namespace}
        self.globals.update(functions)

    def generate(self, template: Template, values: dict[str, Any]) -> tuple[str, Recording]:
        """Return the text that a template makes of values, and what was recorded."""
        recording = self.recording = Recording()
        blocks: list[str] = []
        for block in template.generate(values):
            blocks.append(block)
            recording.length += len(block)
            check_length(recording.length)
        return "".join(blocks), recording

    def count_step(self) -> None:
        """Count a turn of a loop or a call of a macro."""
        recording = self.recording
        recording.steps += 1
        if recording.steps > _MAX_STEPS:
            raise TooLarge(f"its loops turn more than {_MAX_STEPS} times")
        late = recording.steps % _STEPS_BETWEEN_LOOKS == 0 and time.thread_time() - recording.started > _MAX_SECONDS
        if late:
            raise TooLarge(f"it takes more than {_MAX_SECONDS:g} s of computing")

    def join_values(self, *values: Any) -> str:
        """Return values as one string: the operator `~`."""
        return self.concat(map(str, values))

    @staticmethod
    def concat(pieces: Iterable[str], /) -> str:  # type: ignore[override]
        """Join pieces of output; each block that is kept in a variable passes here."""
        joined = list(pieces)
        check_length(sum(map(len, joined)))
        return "".join(joined)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result is bounded."""
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    check_length(len(sequence) * times)
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            check_length(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            check_format(left, right if isinstance(right, tuple) else (right,))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise TooLarge(f"it computes a number of more than {_MAX_BITS} bits")
        return check_result(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method whose result is bounded."""
        text = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # wrapped: str.format
        if isinstance(text, str):
            check_call(called.__name__, (text, *args, *kwargs.values()))
        return check_result(super().call(context, called, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for reading in tree.find_all(_READING):
            raise ReadsFiles(f"line {reading.lineno}: reads another file ({type(reading).__name__.lower()})")
        for repeated in tree.find_all(_REPEATED):
            count = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            repeated.body.insert(0, nodes.ExprStmt(count).set_lineno(repeated.lineno))
        return _Joins().visit(tree)


class _Joins(NodeTransformer):
    """Turns the operator `~` into a call that is bounded."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join_values")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


class _Dictionaries:
    """The function `dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace whose attributes cannot begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that an attribute may be called `self`
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with jinja's marks of what a filter is given
    def checked(*args: Any, **kwargs: Any) -> Any:
        if name in ("join", "list"):  # what `map` gives has no length yet
            args = tuple(bounded_list(value) if isinstance(value, Iterator) else value for value in args)
        check_call(name, (*args, *kwargs.values()))
        return check_result(function(*args, **kwargs))

    return checked


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _refuse_chance(_: Any) -> NoReturn:
    raise SecurityError("the filter 'random' would give other text each time")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON: jinja's own filter would escape HTML."""
    check_length(indent or 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
