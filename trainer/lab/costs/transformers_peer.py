"""Mixtral as Hugging Face's transformers has it, with the same shapes, losses and optimizer as ours.

# T tokens, k experts per token, E experts.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.experiment import ExperimentConfig
from trainer.lab.costs.cost_options import LayerShape
from trainer.lab.costs.layer_entries import LayerEntry, LayerInput
from trainer.packages import is_installed

MOST_COPIED = 2 << 30
"""Bytes of weights that `batched_mm` may copy, a set of weights for each row."""


def why_not_mixtral(config: ExperimentConfig) -> str | None:
    """Return why a config's model is not a Mixtral of some size; None if it is one."""
    model = config.model
    differs = [key for key in ("qk_norm", "tie_embeddings", "document_mask", "rope_scaling") if getattr(model, key)]
    if differs := differs + [f"attention.{key}" for key in model.attention.model_dump(exclude_defaults=True)]:
        return f"Mixtral has no {', '.join(differs)}"
    return why_not_plain(config)


def why_not_plain(config: ExperimentConfig) -> str | None:
    """Return why a config's feed-forward blocks are not those that every library has; None if they are."""
    model, moe = config.model, config.model.moe
    if any(model.windows):
        return "not every layer sees all keys"
    if moe is None or len(model.moe_layers) < model.num_layers or moe.num_shared_experts:
        return "not every block has routed experts and nothing else"
    if model.activation != "swiglu":
        return f"its experts have {model.activation}"
    if moe.expert_bias:
        return "its experts have biases"
    if moe.router.kind != "top_k" or moe.capacity.factor is not None:
        return "its router is not top_k, or drops tokens"
    return None


def why_not(name: str, shape: LayerShape) -> str | None:
    """Return why an implementation cannot run; None if it can."""
    if not is_installed("transformers"):
        return "needs transformers, which is not installed; pip install 'turnout[hf]'"
    copied = 3 * shape.tokens * shape.top_k * shape.d_model * shape.d_ff * shape.itemsize
    if name == "batched_mm" and copied > MOST_COPIED:
        return f"would copy {copied / 1e9:.0f} GB of weights, one set for each row"
    return None


def mixtral_config(shape: LayerShape, implementation: str, **more: Any) -> Any:
    """Return transformers' config of a shape, whose experts run by the named implementation."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig

    options: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1, **more}
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        **options,
    )
    config._experts_implementation = implementation
    return config


def give_logits(model: nn.Module) -> list[Any]:
    """Let the model's routers add given logits to their own; return them."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    class GivenGate(MixtralTopKRouter):
        given: Tensor | None = None

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert self.given is not None, "the benchmark gives logits before it runs"
            logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight) + self.given  # (T, E)
            weight, index = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1)
            return logits, weight / weight.sum(-1, keepdim=True), index

    gates: list[Any] = [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]
    for gate in gates:
        gate.__class__ = GivenGate
        nn.init.normal_(gate.weight, std=1e-3)
    return gates


def block_entry(given: LayerInput, implementation: str) -> LayerEntry:
    """Return Mixtral's MoE block, with the routing of the benchmark."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.logits.seed)
        block = MixtralSparseMoeBlock(mixtral_config(given.shape, implementation))
        _initialize(block.parameters())
        gates = give_logits(block)
    return LayerEntry(block, block, given, gates)


def _initialize(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
