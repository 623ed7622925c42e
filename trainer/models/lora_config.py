"""The `model.lora` section: low-rank adapters. Imports no torch."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import Field

from trainer.config.base import Config, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Factor, Width
from trainer.config.wording import near
from trainer.models.parameter_patterns import PatternText, unknown_role
from trainer.models.projections import GROUPS, Projection


class LoRAConfig(Config):
    """Low-rank adapters (LoRA, arXiv 2106.09685): W becomes W + s B A, where A has `rank` rows, and A and B learn.

    All other weights are frozen. B is 0 at first, so that a run begins with the model that it adapts (`init_from`).
    Each expert has its own A and B. Queries, keys and values are one matrix here and share their A, as the gate and the
    other factor of a feed-forward network do.
    """

    rank: Width = 16
    """Rows of A and columns of B, r."""
    alpha: Factor = 32.0
    """Factor s is alpha / rank."""
    use_rslora: bool = False
    """Factor s is alpha / sqrt(rank), so that a larger rank needs no other learning rate (arXiv 2312.03732)."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """What gets adapters: attention, dense, shared, experts, or single matrices of these, such as attention.qkv or
    experts.w_out. Null: all of these that the model has."""
    trains: Annotated[tuple[PatternText, ...], Field(strict=False)] = ()
    """Further weights that learn, whole: roles and patterns as in train.freeze, such as router or norms."""

    @property
    def scale(self) -> float:
        """Factor s of the product B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def chosen(self, projections: Iterable[Projection]) -> list[Projection]:
        """Return those of a model's matrices that get adapters."""
        return [each for each in projections if self.targets is None or {each.group, each.target} & set(self.targets)]

    def weights(self, projections: Iterable[Projection]) -> tuple[int, int]:
        """Count the parameters of the adapters outside the routed experts, and those of one expert in all layers."""
        dense, expert = 0, 0
        for each in self.chosen(projections):
            size = each.count * self.rank * (each.rows + each.columns)
            dense, expert = (dense, expert + size) if each.group == "experts" else (dense + size, expert)
        return dense, expert

    def problems(self) -> Iterator[Problem]:
        """Check that each target is given once, and the roles of what else learns."""
        for target in repeated(self.targets or ()):
            yield Problem("targets", f"{shown(target)} is listed twice; list each target once")
        for index, entry in enumerate(self.trains):
            if (wrong := unknown_role(entry)) is not None:
                yield Problem(f"trains.{index}", wrong)

    def problems_in(self, projections: Sequence[Projection]) -> Iterator[Problem]:
        """Check targets and rank against the matrices of a model."""
        known = [*dict.fromkeys(each.group for each in projections), *(each.target for each in projections)]
        for index, target in enumerate(self.targets or ()):
            if target not in known:
                yield Problem(f"targets.{index}", _wrong_target(target, known))
        chosen = self.chosen(projections)
        most = min((min(each.rows, each.columns) for each in chosen), default=self.rank)
        if self.rank > most:
            narrowest = next(each for each in chosen if min(each.rows, each.columns) == most)
            shape = f"{narrowest.target} is {narrowest.rows} x {narrowest.columns}"
            yield Problem("rank", f"{self.rank} is more than a matrix can have ({shape}); use at most {most}")


def _wrong_target(target: str, known: list[str]) -> str:
    allowed = f"use some of {', '.join(known)}"
    group = target.partition(".")[0]
    if group == "router":
        return f"{target}: a router is small and has no adapter; to train it, use lora.trains: [router]"
    if group in GROUPS and group not in known:
        lacks = {"experts": "experts (model.moe: null)", "shared": "shared experts", "dense": "dense blocks"}
        return f"{target}: this model has no {lacks[group]}; {allowed}"
    if group == "attention" and "attention.kv_b" in known:
        return f"{target}: latent attention has other matrices; {allowed}"
    meant = near(target, known, cutoff=0.6)
    return f"{target} is no matrix of this model; " + (f"did you mean {meant}?" if meant else allowed)
