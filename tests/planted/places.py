"""Faults of positions: tokens seen by attention and its cache, and blocks with experts."""

from tests.planted.fault import Fault
from tests.planted.model import GPT, PARITY

CACHE = "tests/unit/models/test_kv_cache.py"
ATTENTION = "tests/unit/ops/test_attention.py"
MASK = "tests/unit/ops/test_attention_mask.py"


def _in_attention(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file="trainer/ops/attention.py", old=old, new=new, tests=tests)


def _in_mask(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file="trainer/ops/attention_mask.py", old=old, new=new, tests=(MASK, *tests))


def _in_cache(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file="trainer/models/kv_cache.py", old=old, new=new, tests=(CACHE,))


def _in_config(name: str, old: str, new: str) -> Fault:
    tests = ("tests/unit/models/test_config.py",)
    return Fault(name=name, file="trainer/models/config.py", old=old, new=new, tests=tests)


FAULTS = [
    Fault(
        name="rows of a cache have the positions of the first",
        file=GPT,
        old="extension.positions[:, None]",
        new="extension.positions[:1, None]",
        tests=(CACHE,),
    ),
    Fault(
        name="a cache routes every token as the first one",
        file=GPT,
        old="position=extension.positions.flatten()",
        new="position=torch.zeros_like(tokens).flatten()",
        tests=(CACHE,),
    ),
    Fault(
        name="the logits of a piece are of its last column",
        file=GPT,
        old="last = (num_new - 1).clamp(min=0)",
        new="last = num_new * 0 + tokens.shape[1] - 1",
        tests=(CACHE,),
    ),
    _in_cache(
        "new tokens take the first slots",
        "positions = self.lengths[:, None] + columns",
        "positions = 0 * self.lengths[:, None] + columns",
    ),
    _in_cache("new tokens do not see themselves", "before >= 0 if window is None", "before > 0 if window is None"),
    _in_cache("new tokens see the one after them", "before >= 0 if window is None", "before >= -1 if window is None"),
    _in_cache(
        "a copied row has the length of the first", "lengths=self.lengths[rows]", "lengths=self.lengths[0 * rows]"
    ),
    _in_attention(
        "attention is scaled by the width and not by its root",
        "enable_gqa=k.shape[1] != num_heads,",
        "enable_gqa=k.shape[1] != num_heads,\n            scale=1 / q.shape[-1],",
        PARITY,
    ),
    _in_attention("attention looks ahead", "is_causal=mask is None and q.shape[2] > 1,", "is_causal=False,", PARITY),
    _in_mask("a document's tokens see the next one", "[:, None, :]).tril()", "[:, None, :]).tril(1)", PARITY),
    _in_mask("a window is one key wider", "seen.triu(1 - self.window)", "seen.triu(-self.window)"),
    _in_mask(
        "blocks of two documents are met without a mask",
        "(low[:, :, None] == high[:, None]) & (low[:, None] == high[:, :, None])",
        "(low[:, :, None] == low[:, None])",
    ),
    _in_mask("the last block is without its own keys", "some = (ahead >= 0)", "some = (ahead > 0)"),
    _in_attention(
        "attention in blocks looks one token ahead",
        "position > position[start:, None]",
        "position - 1 > position[start:, None]",
        ATTENTION,
    ),
    _in_attention(
        "attention in blocks is not scaled", "q.to(wide) * d**-0.5, k.to(wide)", "q.to(wide), k.to(wide)", ATTENTION
    ),
    _in_attention(
        "heads share keys in another order",
        "return x.repeat_interleave(num_heads // x.shape[1], dim=1)",
        "return x.repeat(1, num_heads // x.shape[1], 1, 1)",
        ATTENTION,
    ),
    _in_config(
        "every: n begins at the first layer",
        "return (layer - self.moe.first_dense_layers + 1) % self.moe.every == 0",
        "return (layer - self.moe.first_dense_layers) % self.moe.every == 0",
    ),
    _in_config(
        "every: n does not count from the dense layers",
        "return (layer - self.moe.first_dense_layers + 1) % self.moe.every == 0",
        "return (layer + 1) % self.moe.every == 0",
    ),
    _in_config("first_dense_layers is ignored", "or layer < self.moe.first_dense_layers:", "or layer < 0:"),
    _in_config(
        "one dense layer too many",
        "or layer < self.moe.first_dense_layers:",
        "or layer < self.moe.first_dense_layers + 1:",
    ),
    _in_config(
        "layers names the dense layers", "return layer in self.moe.layers", "return layer not in self.moe.layers"
    ),
]
