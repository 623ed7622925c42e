"""The chat template of a run: kept in its folder, so that whoever talks to its model writes as it was trained."""

from pathlib import Path
from typing import Final

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.data.chat.chat_template import ChatTemplate
from trainer.data.chat.encode_chat import ChatEncoder
from trainer.data.chat.find_template import (
    TEMPLATE,
    find_template,
    folder_of,
    special_tokens_in,
    template_files,
    template_in,
)
from trainer.data.tokenizers.base import Tokenizer
from trainer.experiment import ExperimentConfig

_CHAT: Final = "chat"


def trains_on_chats(config: ExperimentConfig) -> bool:
    """Return whether a source of the config holds conversations."""
    return any(source.kind == _CHAT for source in config.data.sources)


def save_template(config: ExperimentConfig, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the template of a run that trains on conversations into its folder."""
    if trains_on_chats(config):
        template = find_template(config.data.chat_template, config.data.tokenizer, tokenizer)
        for name, text in template_files(template).items():
            folder.write(folder.path / name, text)


def kept_template(config: ExperimentConfig, folder: RunFolder) -> ChatTemplate | None:
    """Return the template in the run folder, of its published model, or beside the tokenizer that the config names.

    None if there is none; nothing is rendered.

    Raises:
        ChatTemplateError: if several are kept and none is the default.
    """
    beside = folder_of(config.data.tokenizer)
    places = [folder.path, folder.source, *([] if beside is None else [beside])]
    for place in places:
        if (text := template_in(place)) is not None:
            return _template(config, place, text)
    return None


def served_template(config: ExperimentConfig, template: ChatTemplate, tokenizer: Tokenizer) -> ChatTemplate:
    """Return a run's template for a server that gives the model nothing before a conversation.

    Training rows have an end of document there, so the template writes it.
    """
    if not trains_on_chats(config):
        return template
    names = {index: name for name, index in tokenizer.special_tokens().items()}
    return template.after(names[tokenizer.end_of_document])


def chat_encoder(config: ExperimentConfig, template: ChatTemplate, tokenizer: Tokenizer) -> ChatEncoder:
    """Return what writes conversations as the run was trained on them."""
    return ChatEncoder(template=template, tokenizer=tokenizer, variables=config.data.chat_template.variables)


def _template(config: ExperimentConfig, place: Path, text: str) -> ChatTemplate:
    name, today = shown_path(place / TEMPLATE), config.data.chat_template.today
    return ChatTemplate(text, special_tokens=special_tokens_in(place), name=name, today=today)
