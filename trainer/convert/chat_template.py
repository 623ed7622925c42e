"""The chat template of a run's tokenizer, if it has one: it came with the tokenizer's folder."""

from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.run_folder import RunFolder
from trainer.data.tokenizers.hf_files import OPTIONS, parse_json_object, read_tokenizer_file
from trainer.data.tokenizers.registry import FileTokenizerConfig
from trainer.experiment import ExperimentConfig

TEMPLATE = "chat_template.jinja"


def chat_template_of(config: ExperimentConfig, folder: RunFolder) -> str | None:
    """Return the template in the run folder, of its published model, or beside the tokenizer that the config names.

    None if there is none. It is text here: nothing is rendered.
    """
    places = [folder.path, folder.source]
    if isinstance(config.data.tokenizer, FileTokenizerConfig):
        named = Path(config.data.tokenizer.path)
        places.append(named if named.is_dir() else named.parent)
    for place in places:
        with suppress(OSError, ValueError):
            return read_tokenizer_file(place / TEMPLATE, through_links=True)
        with suppress(OSError, ValueError):
            stated = parse_json_object(read_tokenizer_file(place / OPTIONS, through_links=True)).get("chat_template")
            if isinstance(stated, str):
                return stated
    return None
