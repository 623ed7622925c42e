"""Measure one MoE layer: by kernel, beside a dense twin, the products alone and Hugging Face's implementations."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.distributed.runtime import start
from trainer.lab.costs.contest import Contender, measure
from trainer.lab.costs.cost_options import CostOptions, LayerShape, Routing, by_dtype
from trainer.lab.costs.cost_report import CostCase, report_costs
from trainer.lab.costs.given_routing import GivenLogits
from trainer.lab.costs.interleaved import Entry, LocalRunner
from trainer.lab.costs.layer_entries import LayerInput, ProductsEntry, default_kernel, dense_entry, moe_entry
from trainer.lab.costs.traces import read_traces
from trainer.lab.costs.transformers_peer import block_entry, why_not
from trainer.ops.kernels import missing_kernel


def bench_layer(
    shapes: Sequence[LayerShape], options: CostOptions, *, kernels: Sequence[str], is_compiled: bool
) -> int:
    """Time and weigh the layer of every shape and routing; print and write the result, and return the exit code.

    Shapes of the same dtype take turns, so that numbers of experts can be compared.
    """
    options = replace(options, device=start(options.device).type)
    traces = read_traces(options.traced, experts=[shape.num_experts for shape in shapes], seed=options.seed)
    cases = [layer_case(alike, options, kernels, is_compiled=is_compiled, traces=traces) for alike in by_dtype(shapes)]
    settings = {**options.record(), "kernels": list(kernels), "compile": is_compiled}
    return report_costs("layer", cases, options=settings, device=options.device, json_path=options.json_path)


def layer_case(
    shapes: Sequence[LayerShape],
    options: CostOptions,
    kernels: Sequence[str],
    *,
    is_compiled: bool,
    traces: Mapping[Routing, tuple[Tensor, ...]],
) -> CostCase:
    """Measure the shapes of one dtype together, in this process."""
    device, contenders = torch.device(options.device), []
    for shape, routing in itertools.product(shapes, options.routings):
        logits = GivenLogits(routing.kind, shape.num_experts, options.seed, traces.get(routing, ()))
        given = LayerInput(shape, logits, device)
        contenders += [
            Contender(
                name=name,
                routing=str(routing),
                num_experts=shape.num_experts,
                runner=entry if isinstance(entry, str) else LocalRunner(entry, device),
            )
            for name, entry in _entries(
                given, options, kernels, is_compiled=is_compiled, is_first=routing == options.routings[0]
            )
        ]
    entries = measure(contenders, rounds=options.rounds)
    return CostCase(title=shapes[0].title, settings=shapes[0].record(), entries=entries)


def _entries(
    given: LayerInput, options: CostOptions, kernels: Sequence[str], *, is_compiled: bool, is_first: bool
) -> Iterator[tuple[str, Entry | str]]:
    """Yield each entry, or the reason that there is none, with its name."""
    shape = given.shape
    for name in kernels:
        kernel = default_kernel(shape, given.device) if name == "auto" else name
        label = f"turnout, {kernel}{', compiled' if is_compiled else ''}"
        yield label, missing_kernel(kernel, given.device.type) or moe_entry(given, kernel, is_compiled=is_compiled)
    if is_first:
        yield "dense twin", dense_entry(given)
    if options.rounds:
        yield "products alone", ProductsEntry(given)
    for name in options.peers:
        yield f"hf {name}", why_not(name, shape) or block_entry(given, name)
