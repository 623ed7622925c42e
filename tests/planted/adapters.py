"""Faults of adapters (`model.lora`)."""

from tests.planted.fault import in_package as _fault

MODEL = "models/test_lora.py"
PEFT = "convert/test_peft_adapter.py"

HEADS = "tests/laws/test_tensor_parallelism.py::test_ranks_that_share_heads_learn_the_same[adapters-2 ranks]"

FAULTS = [
    _fault(
        "ranks that share heads leave out the adapter of what they sum",
        "models/lora.py",
        "return out + linear.added(x.to(compute_dtype(x))) if isinstance(linear, LoRALinear) else out",
        "return out",
        HEADS,
    ),
    _fault(
        "columns of A on a rank begin as a narrower matrix would",
        "models/initialize.py",
        "uniform_pieces(shape[-1] ** -0.5)",
        "uniform_pieces(parameter.shape[-1] ** -0.5)",
        HEADS,
    ),
    _fault(
        "an adapter is added without its scale",
        "models/lora.py",
        "F.linear(x, self.lora_a) * self.scale",
        "F.linear(x, self.lora_a)",
        MODEL,
    ),
    _fault(
        "latents in the cache are multiplied by the frozen matrix alone",
        "models/latent_attention.py",
        "whole_weight(self.kv_b)",
        "self.kv_b.weight",
        MODEL,
    ),
    _fault(
        "adapters do not begin at zero", "models/initialize.py", "part.local.zero_()", "part.local.fill_(0.1)", MODEL
    ),
    _fault(
        "what adapters adapt learns too",
        "models/lora.py",
        "is_adapter(name) or selected(config.trains, name)",
        "True",
        MODEL,
    ),
    _fault(
        "an export merges the rows of another part of B",
        "convert/checkpoint_weights.py",
        "self._rows.read(b_name, first, last)",
        "self._rows.read(b_name, 0, last - first)",
        PEFT,
    ),
    _fault(
        "peft gets the ranks of an expert together in B",
        "convert/peft_adapter.py",
        ".permute(1, 2, 0)",
        ".permute(1, 0, 2)",
        PEFT,
    ),
    _fault(
        "peft gets rows of B in our order",
        "convert/peft_adapter.py",
        "transposed=False, shape=tuple(b.shape))",
        "transposed=False, interleaved=None, shape=tuple(b.shape))",
        PEFT,
    ),
    _fault(
        "a merged run has the matrices alone",
        "convert/merge_adapters.py",
        "weight.double() + scale * (b.double() @ a.double())",
        "weight.double()",
        "tests/laws/test_lora_run.py",
    ),
]
