"""Reading of a published config.json: its family, our `model` section, and what must not be run. Imports no torch."""

from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown, shown_path
from trainer.convert.foreign_folder import CONFIG, ForeignFolder
from trainer.convert.quantization import quantization_problem
from trainer.errors import DataError
from trainer.families.base import Family
from trainer.families.hf_config import ForeignConfigError
from trainer.families.registry import FAMILIES, family_of
from trainer.models.config import ModelConfig


class ForeignModel(NamedTuple):
    """A published model."""

    family: Family
    config: dict[str, Any]
    """Its config.json."""
    model: ModelConfig
    """Our section for it, with its own number of positions."""
    quantization: dict[str, Any] | None
    """How its weights are quantized; None: they are not."""

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return self.config["vocab_size"]


def read_foreign_model(folder: ForeignFolder) -> ForeignModel:
    """Read config.json.

    Raises:
        DataError: if it is unusable, needs code of its own, or is of a model that cannot be expressed here.
    """
    config, where = folder.json(CONFIG), shown_path(folder.path / CONFIG)
    quantization = config.pop("quantization_config", None)
    if quantization is not None and (problem := quantization_problem(quantization)) is not None:
        raise DataError(f"{where}: quantization_config: {problem}")
    kind = config.get("model_type")
    if config.get("auto_map") and not (isinstance(kind, str) and kind in FAMILIES):
        raise DataError(
            f"{where}: its model is code that comes with it (auto_map), which is never run; models of "
            f"{', '.join(FAMILIES)} are imported"
        )
    try:
        family = family_of(config)
        architectures = config.get("architectures")
        if architectures not in (None, [], [family.architecture]):
            names = ", ".join(map(shown, architectures)) if isinstance(architectures, list) else shown(architectures)
            raise DataError(f"{where}: architectures: {names}; of {family.name} only {family.architecture} is imported")
        values = family.from_hf(config)
        vocab_size = config.get("vocab_size")
        if type(vocab_size) is not int or not 0 < vocab_size <= 1 << 24:
            raise DataError(f"{where}: vocab_size: {shown(vocab_size)} is no number of ids")
        return ForeignModel(family, config, ModelConfig.model_validate(values), quantization)
    except ForeignConfigError as error:
        raise DataError(f"{where}: {error}") from None
    except ValidationError as error:
        raise DataError(f"{where}: cannot be a model here: {_first_problem(error)}") from None
    except (TypeError, ZeroDivisionError, OverflowError, RecursionError, AttributeError) as error:
        raise DataError(f"{where}: has a value of the wrong type ({error})") from None


def published_positions(run: RunFolder) -> int:
    """Return the number of positions of the model that a run was imported from; 0 if it was not, or it is unknown."""
    with suppress(DataError):
        positions = ForeignFolder(run.source).json(CONFIG).get("max_position_embeddings")
        return positions if type(positions) is int and 0 < positions <= 1 << 27 else 0
    return 0


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
