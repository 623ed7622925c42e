"""Where each tensor of a run's first checkpoint comes from."""

from collections.abc import Iterable, Mapping

from torch.nn import Parameter

from trainer.checkpoint.coverage import WEIGHT, is_moment, weight_of
from trainer.checkpoint.init_from import InitFromConfig
from trainer.checkpoint.streamed import GlobalTensor
from trainer.convert.first_tensors import Constant, Initial, Taken, TensorSource
from trainer.convert.import_plan import plain_model
from trainer.convert.match_tensors import match_tensors
from trainer.convert.other_experts import ExpertChoice, ResizedExperts, choose_experts
from trainer.convert.parent_tensors import ParentTensors
from trainer.convert.router_columns import expert_dimensions, tensors_of
from trainer.convert.surgery_plan import num_groups
from trainer.convert.vocabulary_rows import VocabularyMap, VocabularyRows, map_vocabulary
from trainer.data.tokenizers.base import Tokenizer
from trainer.engine.base import COUNTS, SINCE
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.gpt import GPT
from trainer.models.initialize import expert_parameters
from trainer.models.parameter_roles import is_adapter

_VOCABULARY = ("embedding.weight", "head.weight")


class InitPlan:
    """Sources of the tensors of a new model, among those of another one."""

    def __init__(self, config: ExperimentConfig, init: InitFromConfig, parent: ParentTensors, *, num_ids: int) -> None:
        """Match all tensors by name and shape, for a tokenizer with so many ids.

        Raises:
            ConfigError: if a tensor has no source or no place, or another shape.
        """
        self.parent, self._config = parent, config
        self.has_moments = init.parts == "weights+optimizer"
        self.notes: list[str] = []
        """Lines about what was taken, once `sources` has been called."""
        self._model = plain_model(config, num_ids)
        self._ours = tensors_of(self._model)
        self._axes = _expert_axes(self._model)
        self._choices: dict[str, ExpertChoice] = {}
        self._since: dict[str, int] = {}
        born_here = {name for name, ours in self._ours.items() if is_adapter(name) or not isinstance(ours, Parameter)}
        self._matched = match_tensors(init, parent.names, self._ours, born_here=born_here, where=parent.where)
        self._check_shapes()

    @property
    def optimizer_steps(self) -> int:
        """Steps of the optimizer state that is taken over."""
        return int(self.parent.values["optimizer_steps"]) if self.has_moments else 0

    @property
    def values(self) -> dict[str, int]:
        """Scalars of the engine's state: the steps, and those before the first of a parameter's moments."""
        return {"optimizer_steps": self.optimizer_steps} | {SINCE + name: n for name, n in self._since.items() if n}

    def sources(self, wanted: Mapping[str, GlobalTensor], tokenizer: Tokenizer) -> dict[str, TensorSource]:
        """Return the source of each tensor of the checkpoint, by its name there."""
        vocabulary = self._vocabulary(tokenizer)
        weights = {name: self._source(name, source, vocabulary) for name, source in self._matched.items()}
        found: dict[str, TensorSource] = {WEIGHT + name: source for name, source in weights.items()}
        for name, tensor in wanted.items():
            if is_moment(name):
                found[name] = self._moment(name, tensor, weights)
            elif name == COUNTS:
                found[name] = self._counts(tensor, weights.values())
        self.notes = [self._summary(weights, found), *([] if vocabulary is None else [vocabulary.note])]
        self.notes += list(dict.fromkeys(map(self._about, self._choices.values())))
        return found

    def check_engine(self) -> None:
        """Refuse moments that begin at different steps, where the engine has one count for many of them.

        Raises:
            ConfigError: with the first weight whose moments begin later.
        """
        late = next((name for name, steps in self._since.items() if steps), None)
        if late is not None and isinstance(self._config.engine, DeepSpeedEngineConfig):
            raise ConfigError(
                f"init_from.parts: {late} begins without moments, and others with those of {self.parent.where}: "
                "DeepSpeed has one step count for all weights of a group; use weights, or engine.kind native"
            )

    def _check_shapes(self) -> None:
        for name, source in self._matched.items():
            if source is None:
                continue
            here = tuple(self._ours[name].shape)
            there = self.parent.tensors[WEIGHT + source].shape
            fits = here[1:] == there[1:] if self._is_vocabulary(name) else here == there
            if not fits and not self._has_other_experts(name, source):
                renamed = "" if name == source else f", there {source},"
                raise ConfigError(
                    f"init_from: {name}{renamed} is {list(here)} in this model and {list(there)} in "
                    f"{self.parent.where}; make them equal, or start it from initial values by init_from.exclude: "
                    f"[{source}]"
                )

    def _is_vocabulary(self, name: str) -> bool:
        return name in _VOCABULARY and self._matched[name] in _VOCABULARY

    def _has_other_experts(self, name: str, source: str) -> bool:
        """Return whether a tensor differs by the number of experts alone."""
        dim, moe, theirs = self._axes.get(name), self._config.model.moe, self.parent.model.moe
        if dim is None or moe is None or theirs is None:
            return False
        here = tuple(self._ours[name].shape)
        there = self.parent.tensors[WEIGHT + source].shape
        more = moe.num_experts - theirs.num_experts
        return len(here) == len(there) and all(
            size == other + (more if i == dim else 0) for i, (size, other) in enumerate(zip(here, there, strict=True))
        )

    def _source(self, name: str, source: str | None, vocabulary: VocabularyMap | None) -> TensorSource:
        tensor = self._ours[name]
        if source is None:
            if isinstance(tensor, Parameter):
                return Initial(self._model, name, seed=self._config.seed)
            return Constant(0, GlobalTensor(shape=tuple(tensor.shape)))
        stored = WEIGHT + source
        if self._is_vocabulary(name):
            return Taken(self.parent, stored) if vocabulary is None else VocabularyRows(self.parent, stored, vocabulary)
        if tuple(tensor.shape) == self.parent.tensors[stored].shape:
            return Taken(self.parent, stored)
        choice = self._choice(source.partition(".ffn.")[0])
        return ResizedExperts(self.parent, stored, choice, dim=self._axes[name], of=name, seed=self._config.seed)

    def _choice(self, block: str) -> ExpertChoice:
        """Return the experts that are taken from a block of the other model."""
        if block not in self._choices:
            moe, theirs = self._config.model.moe, self.parent.model.moe
            assert moe is not None and theirs is not None, "a tensor of experts was found"
            counts, layers = self.parent.counts(), self.parent.model.moe_layers
            layer = layers.index(int(block.removeprefix("blocks.")))
            load = [0] * theirs.num_experts if counts is None else counts[layer, : theirs.num_experts].tolist()
            groups = num_groups(moe) if num_groups(moe) == num_groups(theirs) else 1
            self._choices[block] = choose_experts(load, moe.num_experts, groups=groups)
        return self._choices[block]

    def _vocabulary(self, tokenizer: Tokenizer) -> VocabularyMap | None:
        """Return the map of rows; None if they are the same, or none are taken."""
        taken = [name for name in self._matched if self._is_vocabulary(name)]
        if not taken:
            return None
        old_rows = self.parent.tensors[WEIGHT + (self._matched[taken[0]] or "")].shape[0]
        old, new_rows = self.parent.tokenizer(), self._model.vocab_size
        if old is None:
            old = tokenizer  # the folder has none, so it is taken at the user's word
        if old.vocab_size > old_rows:
            raise ConfigError(
                f"init_from: {self.parent.where} has {old_rows} rows for {old.vocab_size} ids of the tokenizer; set "
                "data.tokenizer to the one that it was trained with"
            )
        if old.fingerprint == tokenizer.fingerprint and old_rows == new_rows:
            return None
        return map_vocabulary(old, tokenizer, old_rows=old_rows, new_rows=new_rows)

    def _moment(self, name: str, tensor: GlobalTensor, weights: Mapping[str, TensorSource]) -> TensorSource:
        """Return the moment of a parameter that is taken as it is, or zeros."""
        parameter = weight_of(name).removeprefix(WEIGHT)
        source, prefix = self._matched[parameter] or "", name.removesuffix(parameter)
        is_whole = isinstance(weights[parameter], Taken) and (source == parameter or source not in _VOCABULARY)
        if is_whole and prefix + source in self.parent.tensors:
            self._since[parameter] = int(self.parent.values.get(SINCE + source, 0))
            return Taken(self.parent, prefix + source)
        self._since[parameter] = self.optimizer_steps
        return Constant(0, tensor)

    def _counts(self, tensor: GlobalTensor, weights: Iterable[TensorSource]) -> TensorSource:
        """Return the last step's load with the optimizer's state, if all experts are the same; else an even one."""
        is_same = self.has_moments and not any(isinstance(source, ResizedExperts) for source in weights)
        if is_same and COUNTS in self.parent.tensors and self.parent.tensors[COUNTS].shape == tensor.shape:
            return Taken(self.parent, COUNTS)
        return Constant(1, tensor)

    def _summary(self, weights: Mapping[str, TensorSource], found: Mapping[str, TensorSource]) -> str:
        kinds = Taken, ResizedExperts, Initial
        counted = {kind: sum(isinstance(source, kind) for source in weights.values()) for kind in kinds}
        parts = [f"{counted[Taken]} tensors as they are"]
        if rows := len(weights) - sum(counted.values()) - sum(isinstance(s, Constant) for s in weights.values()):
            parts.append(f"{rows} by pieces of the vocabulary")
        if counted[ResizedExperts]:
            parts.append(f"{counted[ResizedExperts]} with other experts")
        if counted[Initial]:
            parts.append(f"{counted[Initial]} with initial values")
        if self.has_moments:
            moments = [source for name, source in found.items() if is_moment(name)]
            kept = sum(isinstance(source, Taken) for source in moments)
            parts.append(f"{kept} of {len(moments)} moments after {self.optimizer_steps} optimizer steps")
        return f"first weights from {self.parent.where}: {', '.join(parts)}"

    def _about(self, choice: ExpertChoice) -> str:
        there, here = choice.num_there, len(choice.sources)
        what = f"copies of the {here - there} most used" if here > there else f"the {here} most used"
        return f"{here} experts from {there}: {'all and noisy ' if here > there else ''}{what}"


def _expert_axes(model: GPT) -> dict[str, int]:
    """Return the dimension that counts experts, of each parameter and buffer that has one."""
    axes = dict.fromkeys(expert_parameters(model), 0)
    for layer in model.config.moe_layers:
        for name, dim in expert_dimensions(model.config, layer).items():
            axes[f"blocks.{layer}.ffn.router.{name}"] = dim
    return axes
