"""Every dispatcher's options, and the union of them that `parallel.dispatcher` accepts. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trainer.config.base import Config

if TYPE_CHECKING:
    from trainer.moe.dispatch.base import Dispatcher


class LocalDispatcherConfig(Config):
    """All experts are here: rows are grouped by expert and nothing is sent."""

    kind: Literal["local"] = "local"

    def build(self) -> Dispatcher:
        """Make the dispatcher."""
        from trainer.moe.dispatch.local import LocalDispatcher

        return LocalDispatcher()


DispatcherConfig = LocalDispatcherConfig
