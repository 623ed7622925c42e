"""The chat template of a run: kept in its folder, so that whoever talks to its model writes as it was trained."""

from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.run_tokenizer import fingerprint_in_use
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
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig

MIXED_CONVERSATIONS = (
    "model.document_mask is false: a conversation sees those before it in its row, as it never will when the model is "
    "used; set model.document_mask: true"
)


def training_template(config: ExperimentConfig, folder: RunFolder, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template of a run's conversations; None if it has none.

    Once there is a checkpoint it is the one in the run folder, whatever becomes of the file that it came from.

    Raises:
        CheckpointError: if the config names another template now, or that file has another one.
        ChatTemplateError: if the template cannot be read.
    """
    if not config.data.has_chats:
        return None
    kept = None if fingerprint_in_use(folder) is None else template_in(folder.path)
    if kept is None:
        return find_template(config.data.chat_template, config.data.tokenizer, tokenizer)
    template = _template(config, folder.path, kept)
    given = _given(config, tokenizer)
    if given is not None and given.text != template.text:
        raise CheckpointError(
            f"{template.name}: is the chat template of this run, and {given.name} is another one; restore that, or use "
            "a new name=..."
        )
    return template


def save_template(config: ExperimentConfig, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the template of a run that trains on conversations into its folder."""
    template = training_template(config, folder, tokenizer)
    if template is not None:
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
    if not config.data.has_chats:
        return template
    names = {index: name for name, index in tokenizer.special_tokens().items()}
    return template.after(names[tokenizer.end_of_document])


def chat_encoder(config: ExperimentConfig, template: ChatTemplate, tokenizer: Tokenizer) -> ChatEncoder:
    """Return what writes conversations as the run was trained on them."""
    return ChatEncoder(template=template, tokenizer=tokenizer, variables=config.data.chat_template.variables)


def _given(config: ExperimentConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template that the config names; None if its file is gone, or it names none."""
    section, beside = config.data.chat_template, folder_of(config.data.tokenizer)
    if section.path is not None and not Path(section.path).exists():
        return None
    is_named = section.path is not None or section.builtin is not None
    if not is_named and (beside is None or template_in(beside) is None):
        return None
    return find_template(section, config.data.tokenizer, tokenizer)


def _template(config: ExperimentConfig, place: Path, text: str) -> ChatTemplate:
    name, today = shown_path(place / TEMPLATE), config.data.chat_template.today
    return ChatTemplate(text, special_tokens=special_tokens_in(place), name=name, today=today)
