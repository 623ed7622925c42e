"""Faults of runs that are made from others."""

from tests.planted.fault import in_package as _fault

SURGERY = "convert/test_change_experts.py"
EXPORT = "convert/test_hf_export.py"
UPCYCLE = "convert/test_upcycle_weights.py"

FAULTS = [
    _fault(
        "router rows stay with experts that are gone",
        "convert/take_experts.py",
        "torch.tensor(experts),",
        "torch.arange(len(experts)),",
        SURGERY,
    ),
    _fault(
        "the selection bias of null experts is lost",
        "convert/router_columns.py",
        "torch.arange(num_old, value.shape[dim])",
        "torch.arange(0)",
        SURGERY,
    ),
    _fault(
        "hidden units are averaged as they come",
        "convert/merge_experts.py",
        "network.take(torch.from_numpy(units))",
        "network",
        SURGERY,
    ),
    _fault(
        "a merged expert is fitted to the first of its group",
        "convert/refit_output.py",
        "experts(x, index, weight).double()",
        "experts(x, index[:, :1].contiguous(), weight[:, :1]).double()",
        SURGERY,
    ),
    _fault("halves are not doubled", "convert/surgery_plan.py", "2.0 if self.halves", "1.0 if self.halves", SURGERY),
    _fault(
        "the experts that are used most are pruned",
        "convert/change_experts.py",
        "(counts[e], -e))[:each]",
        "(-counts[e], -e))[:each]",
        SURGERY,
    ),
    _fault("a dense network sums experts as they are", "convert/dense_from_experts.py", ".scaled(factor)", "", SURGERY),
    _fault(
        "a virtual group's slices are all the first",
        "convert/upcycle_weights.py",
        "first + e % plan.granularity * size",
        "first",
        UPCYCLE,
    ),
    _fault(
        "the slices of a copy have router rows of their own",
        "convert/upcycle_weights.py",
        "expert - expert % plan.granularity",
        "expert",
        UPCYCLE,
    ),
    _fault(
        "a slice of a gate takes the rows of up",
        "convert/hidden_units.py",
        "part * len(self) for",
        "0 * len(self) for",
        UPCYCLE,
    ),
    _fault(
        "shared copies are not counted", "convert/upcycle_plan.py", "weight_sum + G * copies)", "weight_sum)", UPCYCLE
    ),
    _fault("a gate on shared experts is not undone", "convert/upcycle_plan.py", "2.0 if moe", "1.0 if moe", UPCYCLE),
    _fault(
        "an exported expert has the rows of its neighbour",
        "convert/checkpoint_weights.py",
        "begin + first, begin + last)",
        "max(begin - 1, 0) + first, max(begin - 1, 0) + last)",
        EXPORT,
    ),
    _fault(
        "gate and up are linked the wrong way round",
        "families/decoder_links.py",
        "((names.gate, (0, F)), (names.up, (F, 2 * F)))",
        "((names.up, (0, F)), (names.gate, (F, 2 * F)))",
        EXPORT,
    ),
    _fault(
        "gate and up of GPT-OSS do not alternate",
        "families/gpt_oss.py",
        'ours=f"{ours}.w_in", interleaved=both, transposed=True',
        'ours=f"{ours}.w_in", transposed=True',
        "tests/unit/convert/test_hf_export.py::test_transformers_has_our_logits_and_our_texts",
    ),
    _fault(
        "a GPT-OSS without scaling gets that of its config's default",
        "families/gpt_oss.py",
        'values["rope_scaling"] = values["rope_scaling"] or {"rope_type": "default", "type": "default"}',
        "pass",
        "families/test_registry.py",
    ),
    _fault(
        "rotated rows keep our order",
        "convert/link_tensors.py",
        "unflatten(-1, (2, half) if to_theirs else (half, 2))",
        "unflatten(-1, (half, 2))",
        "convert/test_link_tensors.py",
    ),
    _fault(
        "the gate compares the first batch with itself",
        "convert/gates.py",
        "our_logits(ours, row), their_logits(theirs, row)",
        "our_logits(ours, row), our_logits(ours, row)",
        "tests/unit/convert/test_gates.py::test_the_logits_are_those_of_transformers",
    ),
    _fault(
        "a key that changes the model is not compared",
        "families/expressible.py",
        """    "moe.z_loss_coef",
""",
        """    "moe.z_loss_coef",
    "moe.router",
""",
        "families/test_registry.py",
    ),
    _fault(
        "auto may call a mixture dense",
        "families/registry.py",
        "if family.is_dense == (model.moe is None)",
        "",
        "families/test_expressible.py",
    ),
    _fault(
        "a null window is that of Mistral's default",
        "families/base.py",
        "HFConfig({**self.defaults, **config})",
        "HFConfig({**self.defaults, **{key: value for key, value in config.items() if value is not None}})",
        "families/test_registry.py",
    ),
    _fault(
        "the late windows of Qwen2 are the early ones",
        "families/window_keys.py",
        'if i >= first else "full_attention"',
        'if i < first else "full_attention"',
        "families/test_hf_config.py",
    ),
    _fault(
        "a row of a slice is looked for as if its tensor began there",
        "convert/compare_tensors.py",
        "start - part.start, end - part.start",
        "0, end - start",
        "tests/laws/test_native_round_trip.py",
    ),
    _fault(
        "files that are too many stay open",
        "convert/open_shards.py",
        "self._open.popitem(last=False)[1].close()",
        "self._open.popitem(last=False)",
        "convert/test_open_shards.py",
    ),
    _fault(
        "a tied model has a head",
        "families/decoder_links.py",
        "if not model.tie_embeddings:",
        "if True:",
        "tests/laws/test_native_round_trip.py",
    ),
]
