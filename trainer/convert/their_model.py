"""The exported folder as transformers sees it: its model, its tensors under the names on disk, its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.convert.gate_report import GateError
from trainer.errors import first_line
from trainer.packages import importing


def load_model(folder: Path) -> nn.Module:
    """Load the model in float32, without code from the folder.

    Raises:
        GateError: if transformers cannot load it, or has or lacks any tensor.
    """
    with importing("transformers", user="comparing with transformers"), _quiet():
        from transformers import AutoModelForCausalLM

        with _explained("load its model"):
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="eager",
                experts_implementation="eager",
            )
    for kind, found in info.items():
        if found:
            first = sorted(map(str, found))[0]
            raise GateError(f"transformers reports {kind.replace('_', ' ')}: {first} ({len(found)} such)")
    return model.eval()


def their_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (B, S, V) of rows of ids (B, S).

    Raises:
        GateError: if transformers cannot compute them.
    """
    with _explained("compute with its model"):
        return model(input_ids=ids, use_cache=False).logits


def empty_model(folder: Path) -> nn.Module:
    """Build the model of the config on the meta device, without values."""
    with importing("transformers", user="comparing with transformers"), _quiet():
        from transformers import AutoConfig, AutoModelForCausalLM

        with _explained("load its config"), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer."""
    with importing("transformers", user="comparing with transformers"), _quiet():
        from transformers import AutoTokenizer

        with _explained("load its tokenizer"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tensors_on_disk(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model under the name that it has on disk; of tied ones the first.

    In memory transformers stacks the experts; what it does when it saves a model is undone here, a tensor at a time.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield from revert_weight_conversion(model, {name: tensor}).items()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever transformers raises about a folder into one line."""
    try:
        yield
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise GateError(f"transformers cannot {what}: {first_line(error):.300}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers: what they say is compared here."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
