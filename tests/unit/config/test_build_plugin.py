"""A plug-in that cannot be built is a config error that names it; built-in kinds raise what they raise."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.added_router import ThresholdRouter, ThresholdRouterConfig
from tests.builders import make_batch, make_model, tiny_model_config
from tests.unit.contracts.test_plugin import SGDConfig
from trainer.config.build_plugin import build_plugin
from trainer.contracts.plugin import check_plugin
from trainer.data.config import DataConfig
from trainer.data.corpus import build_corpus
from trainer.data.sources.base import Source, SourcePart
from trainer.data.sources.registry import SourceOptions
from trainer.engine.native import NativeEngine
from trainer.engine.numerics import NumericsConfig
from trainer.errors import ConfigError
from trainer.moe.build_router import build_router
from trainer.moe.causality import evaluation_warning, training_warning
from trainer.moe.routers.config.options import RouterOptions
from trainer.optim.registry import OptimizerOptions


class NoneConfig(RouterOptions):
    def build(self, **options: Any) -> Any:
        return None


class LinearConfig(RouterOptions):
    def build(self, **options: Any) -> Any:
        return nn.Linear(2, 2)


class WrongSignatureConfig(RouterOptions):
    def build(self) -> Any:  # type: ignore[override]
        return None


class RaisingConfig(RouterOptions):
    def build(self, **options: Any) -> Any:
        raise KeyError("gone")


class UndecidedRouter(ThresholdRouter):
    causal: ClassVar[Any] = "maybe"


class UndecidedConfig(ThresholdRouterConfig):
    def build(self, *, d_model: int, num_experts: int, layer: int) -> Any:
        return UndecidedRouter(d_model=d_model, num_experts=num_experts, threshold=0.5)


class LeakyRouter(ThresholdRouter):
    causal: ClassVar[Any] = "within_sequence"


class LeakyConfig(ThresholdRouterConfig):
    def build(self, *, d_model: int, num_experts: int, layer: int) -> Any:
        return LeakyRouter(d_model=d_model, num_experts=num_experts, threshold=0.5)


class TensorRouter(ThresholdRouter):
    def forward(self, x: Tensor, context: Any) -> Any:
        return x


class TensorConfig(ThresholdRouterConfig):
    def build(self, *, d_model: int, num_experts: int, layer: int) -> Any:
        return TensorRouter(d_model=d_model, num_experts=num_experts, threshold=0.5)


class BrokenSource(Source):
    def files(self) -> Any:
        return []

    def origin(self) -> str:
        return "here"

    def parts(self) -> Any:
        return [SourcePart(size_bytes=1)]

    def read(self, part: SourcePart) -> Any:
        raise ValueError("no luck")


class BrokenSourceConfig(SourceOptions):
    def build(self) -> Any:
        return BrokenSource()


class MomentumConfig(OptimizerOptions):
    def build(self, *, decayed: Any, not_decayed: Any) -> Any:
        return torch.optim.SGD([*decayed, *not_decayed], lr=0.0, momentum=0.9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NoneConfig(), "NoneConfig.build returned None, not a trainer.moe.routing.Router"),
        (LinearConfig(), "LinearConfig.build returned a Linear, not a trainer.moe.routing.Router"),
        (WrongSignatureConfig(), "WrongSignatureConfig.build raised TypeError: "),
        (RaisingConfig(), "RaisingConfig.build raised KeyError: 'gone' (test_build_plugin.py:"),
        (UndecidedConfig(), "UndecidedConfig: its router's causal is 'maybe'; use strict, within_sequence, no"),
    ],
)
def test_a_router_that_cannot_be_built_is_a_config_error(config: RouterOptions, message: str) -> None:
    where = re.escape(f"model.moe.router: {__name__}:{message}")
    with pytest.raises(ConfigError, match=f"^{where}"):
        build_router(config, d_model=4, num_experts=4, layer=0)
    with pytest.raises(ConfigError, match=where):
        make_model(tiny_model_config({"router": config}))
    (outcome,) = check_plugin(config.kind, [])[1]  # nothing else is checked
    assert outcome.error is not None and message in outcome.error


def test_memory_errors_stay_what_they_are() -> None:
    class FullConfig(RouterOptions):
        def build(self, **options: Any) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        build_plugin(FullConfig(), nn.Module, "")


def test_a_router_that_returns_a_tensor_is_a_config_error() -> None:
    config = tiny_model_config({"router": TensorConfig()})
    with pytest.raises(ConfigError, match=r"TensorRouter\.forward returned a Tensor, not a trainer\.moe\.routing\."):
        make_model(config)(make_batch(2, config.seq_len))


@pytest.mark.parametrize(("optim", "state"), [(SGDConfig(), "nothing"), (MomentumConfig(), "momentum_buffer")])
def test_an_optimizer_whose_state_would_be_lost_is_refused(optim: Any, state: str) -> None:
    with pytest.raises(ConfigError, match=f"the state of a parameter has {state}; checkpoints hold exactly step"):
        NativeEngine(make_model(tiny_model_config()), optim, NumericsConfig(seed=0, dtype=torch.float32, grad_clip=1.0))


def test_a_warning_about_a_plugin_names_no_key_that_it_lacks() -> None:
    config = tiny_model_config({"router": LeakyConfig()})
    layers = make_model(config).moe_layers()
    warning = evaluation_warning(layers)
    assert warning is not None and warning.startswith("model.moe.router: in evaluation it lets ")
    assert config.moe is not None
    assert "held-out" not in str(training_warning(config.moe, layers))


def test_a_source_that_cannot_read_is_a_config_error(tmp_path: Path) -> None:
    config = DataConfig.model_validate({"sources": [BrokenSourceConfig()], "cache_dir": str(tmp_path)})
    where = f"data.sources: {__name__}:BrokenSourceConfig: reading it raised ValueError: no luck (test_build_plugin.py:"
    with pytest.raises(ConfigError, match=re.escape(where)):
        build_corpus(config)
