"""Faults of the model: computation and order of a block, and its gradients."""

from tests.planted.fault import Fault

PARITY = "tests/laws/test_transformers_parity.py"
GPT = "trainer/models/gpt.py"
ATTENTION = "trainer/models/self_attention.py"
BLOCK = "trainer/models/block.py"
LOSS = "tests/unit/ops/test_cross_entropy.py"
ROTARY = "trainer/ops/rotary.py"

_ROTATION = """\
    angle = torch.cat([angle, angle], dim=-1)
    table = torch.stack([angle.cos(), angle.sin()])
    return (table if scale == 1 else table * scale).to(dtype)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    \"\"\"Rotate each pair (i, i + r/2) of x (..., S, d) by its position's angle; in the wider dtype.

    Values of a head beyond the width r of the table are left as they are.
    \"\"\"
    cos, sin = rotary
    width = cos.shape[-1]
    first, rest = x[..., :width], x[..., width:]
    left, right = first.chunk(2, dim=-1)
    turned = first * cos + torch.cat([-right, left], dim=-1) * sin
"""
_ROTATION_OF_NEIGHBOURS = """\
    angle = angle.repeat_interleave(2, dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype) * scale


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    cos, sin = rotary
    width = cos.shape[-1]
    first, rest = x[..., :width], x[..., width:]
    left, right = first[..., ::2], first[..., 1::2]
    turned = first * cos + torch.stack([-right, left], dim=-1).flatten(-2) * sin
"""


def _in_gpt(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file=GPT, old=old, new=new, tests=tests or (PARITY,))


def _in_attention(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file=ATTENTION, old=old, new=new, tests=(PARITY,))


def _in_block(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file=BLOCK, old=old, new=new, tests=(PARITY,))


def _in_shared(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file="trainer/models/feed_forward.py", old=old, new=new, tests=(PARITY,))


def _in_norm(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file="trainer/ops/rms_norm.py", old=old, new=new, tests=(PARITY,))


def _in_loss(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file="trainer/ops/cross_entropy.py", old=old, new=new, tests=(LOSS,))


def _in_rotary(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file=ROTARY, old=old, new=new, tests=(PARITY,))


def _in_positions(name: str, old: str, new: str) -> Fault:
    return Fault(name=name, file="trainer/models/rotary_embedding.py", old=old, new=new, tests=(PARITY,))


FAULTS = [
    _in_attention(
        "queries and keys are normalised after the rotation",
        """\
            q, k = self._normed(q, k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k = rotate(q, rotary), rotate(k, rotary)
""",
        """\
            q, k = self._normed(rotate(q, rotary), rotate(k, rotary))
""",
    ),
    _in_attention(
        "values are not clipped",
        "q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))",
        "q, k = (x.clamp(-self.clip, self.clip) for x in (q, k))",
    ),
    _in_attention(
        "the norms of queries and keys are exchanged",
        "self.q_norm(q), self.k_norm(k)",
        "self.k_norm(q), self.q_norm(k)",
    ),
    _in_attention("keys are not normalised", "self.q_norm(q), self.k_norm(k)", "self.q_norm(q), k"),
    _in_positions(
        "rope_theta is ignored", "theta, width, scaling = config.rope_theta,", "theta, width, scaling = 10000.0,"
    ),
    _in_positions("yarn does not sharpen attention", "return yarn_mscale(scaling.factor)", "return 1.0"),
    _in_positions("the whole head is rotated", "config.rotary_width", "config.head_dim"),
    _in_rotary(
        "rotation frequencies are off",
        "dtype=torch.float64) / width)",
        "dtype=torch.float64) / (width - 2))",
    ),
    _in_rotary("rotation frequencies are float32", "device=device, dtype=torch.float64", "device=device"),
    _in_rotary(
        "the rotation turns the other way", "torch.cat([-right, left], dim=-1)", "torch.cat([right, -left], dim=-1)"
    ),
    Fault(
        name="yarn interpolates the fast pairs",
        file="trainer/ops/rope_scaling.py",
        old="return rates / factor * divided + rates * (1 - divided)",
        new="return rates / factor * (1 - divided) + rates * divided",
        tests=(PARITY, "tests/unit/ops/test_rope_scaling.py"),
    ),
    _in_rotary("the rotation pairs neighbours instead of halves", _ROTATION, _ROTATION_OF_NEIGHBOURS),
    _in_attention("keys are not rotated", "rotate(q, rotary), rotate(k, rotary)", "rotate(q, rotary), k"),
    _in_norm(
        "the eps of a norm is outside the root",
        "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)",
        "(1 / (wide.square().mean(-1, keepdim=True).sqrt() + eps))",
    ),
    _in_norm("norm_eps is ignored", "keepdim=True) + eps)", "keepdim=True) + 1e-6)"),
    _in_norm(
        "a norm subtracts the mean", "wide.square().mean(-1, keepdim=True)", "wide.var(-1, keepdim=True, correction=0)"
    ),
    _in_norm("a norm does not scale", "(wide * scale).mul_(weight)", "wide * scale"),
    _in_gpt(
        "there is no final norm",
        "F.linear(self.norm(hidden), self._head_weight())",
        "F.linear(hidden, self._head_weight())",
    ),
    _in_attention("attention is without its norm", "self.qkv, norm(x),", "self.qkv, x,"),
    _in_block("the feed-forward is without its norm", "return x, self.ffn_norm(x)", "return x, x"),
    _in_block(
        "attention has the norm of the feed-forward",
        "self.attention(x, self.attention_norm,",
        "self.attention(x, self.ffn_norm,",
    ),
    _in_block("the residual stream ends at attention", "x = x + y", "x = y"),
    _in_block("the residual stream ends at experts", "return x + y, stats", "return y, stats"),
    _in_block("the residual stream goes through the norm", "return x + y, stats", "return normed + y, stats"),
    _in_block("the residual stream ends at a dense block", "return x + self.ffn(normed,", "return self.ffn(normed,"),
    _in_attention("keys and values are exchanged", "q, k, v = projected.split", "q, v, k = projected.split"),
    _in_gpt(
        "the embedding is scaled by the root of its width",
        "x = self.embedding(batch.tokens) if",
        "x = self.embedding(batch.tokens) * self.config.d_model**0.5 if",
    ),
    _in_gpt(
        "a tied head teaches the embedding nothing",
        "return self.embedding.weight if",
        "return self.embedding.weight.detach() if",
    ),
    _in_gpt(
        "a head of its own is not used",
        "return self.embedding.weight if self.head is None else self.head.weight",
        "return self.embedding.weight",
    ),
    _in_gpt(
        "logits are as narrow as the products",
        "wide = logits.to(torch.promote_types(logits.dtype, torch.float32))",
        "wide = logits",
        "tests/unit/models/test_gpt.py",
    ),
    _in_gpt(
        "documents of a row see each other",
        "document = rows if self.config.document_mask else",
        "document =",
        PARITY,
        "tests/laws/test_documents.py",
    ),
    _in_gpt(
        "the loss mask is ignored",
        "(targets.shape) * target_mask).sum(1)",
        "(targets.shape)).sum(1)",
        PARITY,
        "tests/unit/models/test_gpt.py",
    ),
    Fault(
        name="every layer has the first layer's window",
        file="trainer/models/blocks.py",
        old="self.masks[windows[layer]]",
        new="self.masks[windows[0]]",
        tests=(PARITY,),
    ),
    Fault(
        name="the cache forgets windows",
        file="trainer/models/kv_cache.py",
        old="(before >= 0) & (before < window)",
        new="before >= 0",
        tests=("tests/unit/models/test_kv_cache.py",),
    ),
    Fault(
        name="a block that should be recomputed is saved",
        file=BLOCK,
        old='again = self.recompute == "block" and extend is None',
        new="again = False",
        tests=("tests/laws/test_recompute.py::test_each_setting_saves_less_than_the_one_before",),
    ),
    Fault(
        name="the gradient of a norm forgets what is along its input",
        file="trainer/ops/rms_norm.py",
        old="grad_normed.sub_(normed.mul_(along))",
        new="grad_normed",
        tests=("tests/unit/ops/test_rms_norm.py",),
    ),
    Fault(
        name="a sink of every head is the first head's",
        file="trainer/ops/scored_attention.py",
        old="rule.sinks.to(wide).view(",
        new="rule.sinks[:1].expand(H).to(wide).view(",
        tests=("tests/unit/models/test_self_attention.py", "tests/unit/ops/test_scored_attention.py"),
    ),
    Fault(
        name="hidden keys are capped and seen",
        file="trainer/ops/scored_attention.py",
        old='softcapped(scores, rule.softcap).masked_fill(~seen, float("-inf"))',
        new='softcapped(scores.masked_fill(~seen, float("-inf")), rule.softcap)',
        tests=("tests/unit/ops/test_scored_attention.py",),
    ),
    Fault(
        name="flex_attention adds a sink to scores without their normalizer",
        file="trainer/ops/block_attention.py",
        old="torch.sigmoid(found.lse - sinks[:, None])",
        new="torch.sigmoid(-sinks[:, None])",
        tests=("tests/unit/ops/test_scored_attention.py",),
    ),
    _in_loss("the gradient of capped logits is that of plain ones", "(1 - (logits / softcap).square())", "(1)"),
    _in_loss("chunks count masked targets", "return (nats * mask).sum(1)", "return nats.sum(1)"),
    _in_loss(
        "a chunk's gradient of the weight replaces the others'",
        "torch.addmm(total, a, b, out=total)",
        "total.copy_(a @ b)",
    ),
    _in_loss("rows of different gradients are scaled as one", "gradient.stride(0) == 0", "True"),
    _in_loss(
        "a second backward pass scales the first one's",
        "prepared, ctx.prepared = ctx.prepared, None",
        "prepared = ctx.prepared",
    ),
    _in_loss("chunks compute softmax in bfloat16", "return torch.promote_types(dtype, torch.float32)", "return dtype"),
    _in_loss("the gradient of z is halved", "on_loss + 2 * on_z", "on_loss + on_z"),
    Fault(
        name="targets that are masked count",
        file="trainer/data/batches/batch.py",
        old="return self.loss_mask & self.valid if",
        new="return self.valid if",
        tests=(PARITY,),
    ),
    Fault(
        name="targets of padding count",
        file="trainer/data/batches/batch.py",
        old="return self.loss_mask & self.valid if",
        new="return self.loss_mask if",
        tests=(PARITY,),
    ),
    Fault(
        name="gate and up are exchanged",
        file="trainer/ops/expert_ffn.py",
        old="return F.silu(gate) * up",
        new="return gate * F.silu(up)",
        tests=(PARITY,),
    ),
    Fault(
        name="the gate is a GELU's",
        file="trainer/ops/expert_ffn.py",
        old="return F.silu(gate) * up",
        new="return F.gelu(gate) * up",
        tests=(PARITY,),
    ),
    _in_shared("the gate of the shared experts has no sigmoid", "self.gate(x).sigmoid() * y", "self.gate(x) * y"),
    _in_shared("the gate of the shared experts takes their output", "self.gate(x).sigmoid()", "self.gate(y).sigmoid()"),
]
