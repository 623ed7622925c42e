"""Faults of noise: independence across layers, sequences and runs, and none in evaluation."""

from tests.planted.fault import Fault

IN_USE = "tests/laws/test_noise_in_use.py"
LAYOUT = "tests/laws/test_layout.py::test_one_and_four_micro_batches_learn_the_same_in_float64[jitter]"
ROUTERS = "trainer/moe/routers"
GPT = "trainer/models/gpt.py"
CONTEXT = "trainer/models/routing_context.py"
BLOCK = "trainer/models/block.py"
STEP = "trainer/engine/step.py"


def _fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=file, old=old, new=new, tests=tests or (IN_USE,))


def _built_for_the_first_layer(name: str, router: str, module: str = "token_choice") -> Fault:
    old = f"return {router}(d_model=d_model, num_experts=num_experts, layer=layer, "
    name = f"{name} is built for the first layer everywhere"
    return _fault(name, f"{ROUTERS}/config/{module}.py", old, old.replace("layer=layer", "layer=0"))


FAULTS = [
    # One noise for all layers
    _fault(
        "jitter is equal in all layers",
        f"{ROUTERS}/top_k.py",
        "self.jitter, salt=self.layer",
        "self.jitter, salt=0",
    ),
    _fault(
        "jitter of top_p is equal in all layers",
        f"{ROUTERS}/top_p.py",
        "self.jitter, salt=self.layer",
        "self.jitter, salt=0",
    ),
    _fault(
        "jitter of noisy_top_k is equal in all layers",
        f"{ROUTERS}/noisy_top_k.py",
        "self.jitter, salt=self.layer",
        "self.jitter, salt=0",
    ),
    _fault(
        "normal noise is equal in all layers",
        f"{ROUTERS}/noisy_top_k.py",
        'salt=f"noisy_top_k {self.layer}"',
        'salt="noisy_top_k"',
    ),
    _fault(
        "the second expert is drawn equally in all layers",
        f"{ROUTERS}/gshard.py",
        'salt=f"gshard {self.layer}"',
        'salt="gshard"',
    ),
    _fault(
        "random experts are equal in all layers", f"{ROUTERS}/random.py", 'salt=f"random {self.layer}"', 'salt="random"'
    ),
    _fault("hashed experts are equal in all layers", f"{ROUTERS}/hash.py", " {self.layer}", ""),
    _fault(
        "capacity at random is equal in all layers",
        "trainer/moe/layer.py",
        "context, salt=self.layer)",
        "context, salt=0)",
    ),
    _fault(
        "every MoE layer says that it is the first",
        BLOCK,
        "        layer=layer,\n        needs_importance",
        "        layer=0,\n        needs_importance",
    ),
    _fault(
        "every router is built for the first layer",
        BLOCK,
        "num_experts=moe.num_experts, layer=layer)",
        "num_experts=moe.num_experts, layer=0)",
    ),
    _built_for_the_first_layer("top_k or switch", "TopKRouter", "options"),
    _built_for_the_first_layer("GShard", "GShardRouter"),
    _built_for_the_first_layer("NoisyTopK", "NoisyTopKRouter"),
    _built_for_the_first_layer("Cosine", "CosineRouter"),
    _built_for_the_first_layer("BiasBalanced", "BiasBalancedRouter"),
    _built_for_the_first_layer("GroupLimited", "GroupLimitedRouter"),
    _built_for_the_first_layer("TopP", "TopPRouter"),
    # Whose noise it is
    _fault(
        "the noise key is without the row",
        CONTEXT,
        "token_keys(seed, batch.sample_id, batch.position)",
        "token_keys(seed, 0 * batch.sample_id, batch.position)",
    ),
    _fault(
        "the noise key has the row of the batch",
        CONTEXT,
        "token_keys(seed, batch.sample_id, batch.position)",
        "token_keys(seed, torch.arange(num_sequences)[:, None].expand(-1, S), batch.position)",
    ),
    _fault(
        "the noise key is without the position",
        CONTEXT,
        "token_keys(seed, batch.sample_id, batch.position)",
        "token_keys(seed, batch.sample_id, 0 * batch.position)",
    ),
    _fault(
        "the noise key is without the seed",
        CONTEXT,
        "token_keys(seed, batch.sample_id, batch.position)",
        "token_keys(0, batch.sample_id, batch.position)",
    ),
    _fault(
        "the noise key forgets the upper half of the row's number",
        "trainer/ops/noise.py",
        "mix32((sample_id >> 32) + seed32)",
        "mix32(0 * sample_id + seed32)",
        "tests/unit/ops/test_noise.py",
    ),
    _fault(
        "columns share one number",
        "trainer/ops/noise.py",
        "dtype=torch.int64) * _GOLDEN",
        "dtype=torch.int64) * 0",
        "tests/unit/ops/test_noise.py",
    ),
    _fault(
        "jitter only makes smaller",
        f"{ROUTERS}/top_k.py",
        "(2 * noise - 1)",
        "(noise - 1)",
        "tests/laws/test_router_oracles.py",
    ),
    # Who has it
    _fault("training has no noise", STEP, "noise_seed=self.numerics.seed, top_k", "top_k"),
    _fault(
        "training has the noise of another seed",
        STEP,
        "noise_seed=self.numerics.seed, top_k",
        "noise_seed=0, top_k",
    ),
    _fault(
        "the pass that counts has no noise",
        STEP,
        "prepass=self.global_stats.counting_pass(batches, self.passes, run,",
        "prepass=self.global_stats.counting_pass(batches, self.passes, RunLayers(self, RoutingOptions()),",
        LAYOUT,
    ),
    _fault(
        "evaluation is given the noise seed",
        STEP,
        "dropless=dropless, top_k=top_k,",
        "noise_seed=self.numerics.seed, dropless=dropless, top_k=top_k,",
    ),
    _fault(
        "evaluation is dropless whatever was asked for",
        STEP,
        "dropless=dropless, top_k=top_k,",
        "dropless=True, top_k=top_k,",
    ),
    _fault(
        "evaluation is never dropless",
        STEP,
        "dropless=dropless, top_k=top_k,",
        "top_k=top_k,",
        "tests/unit/engine/test_native.py",
    ),
    _fault(
        "evaluation ignores the k that was asked for",
        STEP,
        "dropless=dropless, top_k=top_k,",
        "dropless=dropless,",
    ),
    _fault(
        "routers that look ahead do so in evaluation",
        f"{ROUTERS}/non_causal.py",
        "return context.is_training or (self",
        "return not context.is_incremental or (self",
    ),
    _fault(
        "routers that look ahead never do",
        f"{ROUTERS}/non_causal.py",
        "return context.is_training or (self",
        "return context.top_k == 0 or (self",
    ),
    _fault(
        "writing has noise",
        GPT,
        "            is_incremental=True,\n",
        "            is_incremental=True,\n            noise_key=extension.positions.flatten(),\n",
        "tests/unit/models/test_kv_cache.py",
    ),
    _fault(
        "a random capacity goes by position in training too",
        "trainer/moe/capacity.py",
        "if context.noise_key is None:\n            return order",
        "if True:\n            return order",
    ),
]
