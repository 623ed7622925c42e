"""Checks of the arguments of `MoELayer`, with the messages of an experiment file."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from trainer.config import slots
from trainer.config.base import Config, Problem
from trainer.config.explain import explain
from trainer.config.nodes import Finding, SourceLocation, report, shown
from trainer.config.numbers import Experts, Factor, Whole, Width
from trainer.config.overrides import as_node
from trainer.config.plugins import PluggableFunction
from trainer.errors import ConfigError
from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routers.registry import RouterConfig
from trainer.ops.kernels import ExpertsKernel, missing_kernel
from trainer.ops.package_experts import PACKAGE_EXPERTS

_CALL: Final = SourceLocation(0, 0, 0, "MoELayer")


class LayerArguments(Config):
    """Arguments of `MoELayer`, as a section."""

    d_model: Width
    num_experts: Experts
    d_ff: Width | None
    router: RouterConfig
    capacity_factor: Factor | None
    activation: Literal["swiglu", "gelu", "clamped_swiglu"]
    expert_bias: bool
    kernel: Annotated[ExpertsKernel, PluggableFunction("experts_kernels")]
    seed: Whole

    def problems(self) -> Iterator[Problem]:
        """Check the arguments that depend on each other, or on this build of torch."""
        for problem in self.router.problems_among(self.num_experts):
            yield Problem(f"router.{problem.key}", problem.message)
        if self.capacity_factor is not None and not self.router.has_fixed_k:
            text = f"{self.router.kind} has no fixed number of experts per token; use None"
            yield Problem("capacity_factor", text)
        if self.expert_bias and (":" in self.kernel or self.kernel in PACKAGE_EXPERTS):
            what = "a kernel of your own" if ":" in self.kernel else self.kernel
            yield Problem("expert_bias", f"{what} has no biases; use False, or a built-in kernel such as loop")
        if (message := missing_kernel(self.kernel, instead="loop")) is not None:
            yield Problem("kernel", message)


def check_arguments(
    router: str | Mapping[str, Any] | RouterOptions, top_k: int | None, values: Mapping[str, Any]
) -> LayerArguments:
    """Check the arguments of a layer; `values` are those besides `router` and `top_k`.

    Raises:
        ConfigError: with a line for each wrong argument.
    """
    options = _router_options(router, top_k)
    try:
        return LayerArguments.model_validate({**values, "router": options})
    except ValidationError as error:
        findings = explain(error, as_node({**values, "router": options}, _CALL), LayerArguments)
    raise report(_at_argument(found, router, top_k) for found in findings) from None


def _router_options(
    router: str | Mapping[str, Any] | RouterOptions, top_k: int | None
) -> dict[str, Any] | RouterOptions:
    """Return the router's options with the argument top_k among them."""
    if not isinstance(router, str | Mapping | RouterOptions):
        what = "a kind, a mapping of a kind and its options, or a router's config"
        raise ConfigError(f"{_CALL}: router: expected {what}, got {shown(router)}")
    options: dict[str, Any] = {"kind": router} if isinstance(router, str) else dict(router)
    if top_k is None:
        return router if isinstance(router, RouterOptions) else options
    kind, given = options.get("kind"), set(options)
    if isinstance(router, RouterOptions):
        section, given = type(router), router.model_fields_set
    else:
        section = slots.section_of(slots.field(LayerArguments, "router"), kind)
    if section is not None and "top_k" not in section.model_fields:
        raise ConfigError(f"{_CALL}: top_k: {kind} has no such option; leave it out")
    if "top_k" in given and options["top_k"] != top_k:
        raise ConfigError(
            f"{_CALL}: top_k: {shown(top_k)}, but the router's options have top_k {shown(options['top_k'])}; "
            "give one of them"
        )
    options["top_k"] = top_k
    if top_k == 1 and kind == "top_k" and "normalize" not in given:
        options["normalize"] = False  # a normalised single weight is the constant 1
    if not isinstance(router, RouterOptions):
        return options
    try:
        return type(router).model_validate(options)
    except ValidationError as error:
        findings = explain(error, as_node(options, _CALL), type(router))
    raise report(_at_argument(f._replace(key=("router", *f.key)), router, top_k) for f in findings) from None


def _at_argument(finding: Finding, router: object, top_k: int | None) -> Finding:
    """Move a finding about a router's kind or top_k to the argument that it was given by."""
    if finding.key == ("router", "kind") and isinstance(router, str):
        return finding._replace(key=("router",))
    if finding.key == ("router", "top_k") and top_k is not None:
        return finding._replace(key=("top_k",))
    return finding


def check_inputs(
    x: Tensor, valid: Tensor | None, token_ids: Tensor | None, *, d_model: int, needs_token_ids: bool
) -> None:
    """Check the inputs of a layer's forward pass.

    Raises:
        TypeError: if one is not a tensor, or has the wrong dtype.
        ValueError: if one is missing, or has the wrong shape.
    """
    named = {"x": x, "valid": valid, "token_ids": token_ids}
    for name, value in named.items():
        if not isinstance(value, Tensor) and (name == "x" or value is not None):
            raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__name__}; expected a torch.Tensor")
    if x.dim() != 3 or x.shape[2] != d_model or x.numel() == 0:
        size = "at least one sequence of at least one token"
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (batch, sequence, d_model) with d_model {d_model} and {size}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point dtype")
    for name, value, dtype in (("valid", valid, torch.bool), ("token_ids", token_ids, torch.int64)):
        if value is not None and value.shape != x.shape[:2]:
            expected = f"(batch, sequence) = {tuple(x.shape[:2])}"
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {expected}")
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name} has dtype {value.dtype}; expected {dtype}")
    if needs_token_ids and token_ids is None:
        raise ValueError("token_ids: missing; this router chooses experts by them: pass (batch, sequence) int64 ids")
