"""The section `data.chat_template`: how conversations become text. Imports no torch."""

import datetime
import re
from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem
from trainer.config.nodes import shown

Builtin = Literal["byte", "chatml"]
"""Templates that come with Turnout: trainer/data/chat/templates/."""
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


class ChatTemplateConfig(Config):
    """Template that writes conversations as text (Jinja, as transformers has it), one for a whole run."""

    path: PathText | None = None
    """A Jinja file, such as chat_template.jinja. Null: that of the tokenizer's folder, else the builtin one that the
    tokenizer has tokens for."""
    builtin: Builtin | None = None
    """A template of ours instead. `byte`: markers of the byte tokenizer that no text can contain. `chatml`:
    <|im_start|> and <|im_end|>."""
    date: str | None = None
    """The date, such as 2026-01-31, for a template that writes today's; null refuses such a template, since its text
    would be another one tomorrow."""
    variables: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], bool | int | float | str] = Field(
        default={}
    )
    """Variables that the template knows, such as `enable_thinking: false`."""

    @property
    def today(self) -> datetime.date | None:
        """The date as such."""
        return None if self.date is None else datetime.date.fromisoformat(self.date)

    def problems(self) -> Iterator[Problem]:
        """Refuse two templates and a date that does not exist."""
        if self.path is not None and self.builtin is not None:
            yield Problem("builtin", f"{self.builtin}, but path names a template too; leave one of them out")
        try:
            if self.date is not None and not _DATE.fullmatch(self.date):
                raise ValueError
            _ = self.today
        except ValueError:
            yield Problem("date", f"{shown(self.date)} is not a date such as 2026-01-31")
