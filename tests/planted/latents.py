"""Faults of latent attention: its scores, its cache, and what it saves."""

from tests.planted.fault import Fault
from tests.planted.model import PARITY

CACHE = "tests/unit/models/test_kv_cache.py"


def _fault(name: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name=name, file="trainer/models/latent_attention.py", old=old, new=new, tests=tests)


FAULTS = [
    _fault("a latent is not normalised", "self.kv_b(self.kv_norm(latent))", "self.kv_b(latent)", PARITY),
    _fault("a cache holds latents before their norm", "q, self.kv_norm(latent), k_rope", "q, latent, k_rope", CACHE),
    _fault(
        "scores over latents are divided by the root of their width",
        "q = q * (q.shape[-1] / width) ** 0.5",
        "q = q",
        CACHE,
    ),
    _fault(
        "a shared key is not rotated",
        "rotate(k_rope[:, None], rotary)",
        "k_rope[:, None]",
        PARITY,
    ),
    _fault("a query sees what another head's may see", "repeat(1, 1, H, 1)", "repeat_interleave(H, 2)", CACHE),
    _fault("scores of latents forget YaRN's scale", "q * self.score_scale", "q", PARITY),
    _fault(
        "compressed queries are saved after their norm",
        "checkpointed(self._queries, q, recompute=again)",
        "self._queries(q)",
        "tests/laws/test_recompute.py::test_each_setting_saves_less_than_the_one_before",
    ),
]
