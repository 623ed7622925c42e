"""Chat on a terminal, or with lines from a pipe: reads messages and commands, writes answers as they come."""

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.base import expand_home
from trainer.config.nodes import shown_path
from trainer.console.console import Console
from trainer.data.chat.chat_template import ChatTemplate
from trainer.data.chat.find_template import builtin_for, find_template
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import ConfigError, DataError, NumericsError
from trainer.experiment import ExperimentConfig
from trainer.moe.causality import evaluation_warning
from trainer.terminal import print_safe, visible
from trainer.training.chat_session import AnswerOptions, ChatSession
from trainer.training.load_trained import load_trained
from trainer.training.run_template import chat_encoder, kept_template

_COMMANDS: Final = (
    "/reset forgets the conversation, /undo its last exchange, /system TEXT says who the model is (no TEXT: nobody), "
    "/save FILE adds the conversation to a file of chats (JSON Lines), /quit ends; // begins a message with a /"
)
_KEYS: Final = "Ctrl-C stops an answer, Ctrl-D ends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Options of a chat."""

    answers: AnswerOptions
    system: str | None = None
    """The system's message."""
    choice: CheckpointChoice = NEWEST
    """Weights that answer."""
    directory: Path
    """Where files are saved whose path is relative."""


def chat_with_run(config: ExperimentConfig, folder: RunFolder, chat: Chat) -> None:
    """Chat with a run's checkpoint until the input ends.

    Raises:
        ConfigError: if the run has no template, and its tokenizer no tokens that mark turns.
        ChatTemplateError: if its template cannot be used.
    """
    console = Console(file=sys.stderr)
    engine, tokenizer, checkpoint = load_trained(config, folder, chat.choice, warn=console.warning)
    if warning := evaluation_warning(engine.model.moe_layers()):
        console.warning(warning)
    template = _template_of(config, folder, tokenizer, console)
    encoder = chat_encoder(config, template, tokenizer)
    _ = encoder.stop_tokens  # a template that cannot be used is reported before the first message
    before = (tokenizer.end_of_document,) if config.data.has_chats else ()  # as in its rows
    session = ChatSession(engine.model, encoder, replace(chat.answers, first_tokens=before), system=chat.system)
    terminal = ChatTerminal(session, where=str(checkpoint.path), directory=chat.directory)
    terminal.notice(f"{config.name}, {chat.choice.said(checkpoint.step)}. /help lists commands; {_KEYS}.")
    terminal.run()


class ChatTerminal:
    """Reads lines of standard input, and writes answers to standard output and notices to standard error."""

    def __init__(self, session: ChatSession, *, where: str, directory: Path) -> None:
        """Talk by a session; `where` is the checkpoint, for messages, and files are saved in `directory`."""
        self._session, self._where, self._directory = session, where, directory
        self._is_interactive = sys.stdin.isatty()
        # A terminal shows control characters instead of obeying them; a file or pipe gets the text unchanged.
        self._shown = visible if sys.stdout.isatty() else str
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for a terminal without UTF-8

    def notice(self, text: str) -> None:
        """Say something that is not the model's, where a person is listening."""
        if self._is_interactive:
            print_safe(text, file=sys.stderr)

    def run(self) -> None:
        """Answer until the input ends."""
        for line in self._lines():
            # Bytes that are not UTF-8 arrive as surrogates; the model reads the replacement characters shown.
            text = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            if text.startswith("/") and not text.startswith("//"):
                if not self._obey(*text[1:].partition(" ")[::2]):
                    return
            elif text.strip():
                self._answer(text.removeprefix("/") if text.startswith("//") else text)

    def _lines(self) -> Iterator[str]:
        if not self._is_interactive:
            yield from (line.rstrip("\r\n") for line in sys.stdin)
            return
        with suppress(ImportError):
            import readline  # noqa: F401 - input() then edits the line and remembers earlier ones
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self.notice("\nCtrl-D ends")
            except EOFError:
                print()
                return

    def _answer(self, message: str) -> None:
        session, pieces = self._session, self._session.answer(message)
        try:
            for number, piece in enumerate(pieces):
                if number == 0 and session.last.dropped:
                    self._warn(f"forgot the oldest {session.last.dropped} exchanges, which no longer fit into a row")
                print(self._shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            session.last.ended_by = "Ctrl-C"
        except NumericsError as error:
            raise NumericsError(f"{self._where}: {error}; use the checkpoint of another step (--step)") from None
        except DataError as error:  # this message, not the next one
            if not self._is_interactive:
                raise
            self._warn(str(error))
            return
        print(flush=True)
        if session.last.ended_by:
            self._warn(f"stopped: {session.last.ended_by}")

    def _obey(self, command: str, argument: str) -> bool:
        """Run a command; return whether the conversation goes on."""
        session, argument = self._session, argument.strip()
        match command:
            case "quit":
                return False
            case "reset":
                session.reset()
            case "undo":
                if not session.undo():
                    self._warn("there is nothing to undo")
            case "system":
                session.system = argument or None
            case "save":
                self._save(argument)
            case "help":
                self._warn(f"{_COMMANDS}. {_KEYS}.")
            case _:
                self._warn(f"/{command}: is not a command. {_COMMANDS}")
        return True

    def _save(self, name: str) -> None:
        if not name:
            self._warn("/save needs the name of a file")
            return
        path = self._directory / expand_home(name)
        try:
            begin = "\n" if _ends_within_line(path) else ""
            with path.open("a", encoding="utf-8") as file:
                file.write(begin + self._session.as_row())
        except OSError as error:
            self._warn(f"{shown_path(path)}: cannot be written: {error.strerror}")
        except ValueError as error:  # U+0000
            self._warn(f"{shown_path(path)}: cannot be written: {error}")
        else:
            self._warn(f"added to {shown_path(path)}")

    def _warn(self, text: str) -> None:
        """Say what a person must know, also one who reads a file of answers."""
        print_safe(text, file=sys.stderr)


def _ends_within_line(path: Path) -> bool:
    """Return whether a file has an incomplete last line; only its last byte is read, since it may be large."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, io.SEEK_END)
        return file.read(1) != b"\n"


def _template_of(config: ExperimentConfig, folder: RunFolder, tokenizer: Tokenizer, console: Console) -> ChatTemplate:
    """Return the template that a run was trained with, or one of ours with a warning."""
    template = kept_template(config, folder)
    if template is not None:
        return template
    if builtin_for(tokenizer) is None:
        raise ConfigError(
            f"{folder.path}: was not trained on chats: it has no chat template, and its tokenizer has no tokens that "
            "mark turns; train it on a source of kind chat, or use generate"
        )
    template = find_template(config.data.chat_template, config.data.tokenizer, tokenizer)
    console.warning(
        f"{folder.path}: was not trained on chats and may answer anything; using {template.name}, whose markers it may "
        "never have seen"
    )
    return template
