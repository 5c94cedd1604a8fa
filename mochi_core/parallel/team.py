"""Put plans into practice: the groups that a member belongs to, and teams that make videos together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Group
from .plan import HEADS, Plan, choose
from .sequence import TokenSplit


@dataclass(frozen=True)
class Members:
    """The groups of a plan that one member belongs to."""

    plan: Plan
    world: Group
    """All members."""
    guidance: Group
    """Members with the same tokens but different prompts."""
    tokens: TokenSplit
    """Members with the same prompt."""

    @classmethod
    def of(cls, world: Group, plan: Plan) -> Members:
        """Create the groups of a plan; all members of `world` must call this."""
        guidance, ring, ulysses = world.grid(plan.guidance, plan.ring, plan.ulysses)
        return cls(plan, world, guidance, TokenSplit(ulysses, ring))

    def any(self, said: bool) -> bool:
        """Whether `said` is true in any member."""
        return bool(self.world.total(_number(said)))


class Team:
    """Members that make videos together, by a fixed plan or one chosen for each video."""

    def __init__(self, world: Group, plan: Plan | str, heads: int = HEADS, *, peers: bool = True) -> None:
        """`plan` is a `Plan`, its text, or "auto"; `peers` is as for `choose`, and false for all if it is false in any member.

        Raises:
            ValueError: the plan is invalid, or for another number of members or heads.
        """
        self.world, self.heads = world, heads
        self.peers = bool(world.total(_number(peers)) == world.size)
        self.plan = Plan.parse(plan) if isinstance(plan, str) and plan != "auto" else plan
        if isinstance(self.plan, Plan):
            self.plan.check(world.size, heads)
        self.groups: dict[Plan, Members] = {}

    def members(self, *, guided: bool) -> Members:
        """The groups for a video with or without guidance; all members must call this."""
        plan = self.plan
        if not isinstance(plan, Plan):
            plan = choose(self.world.size, self.heads, guided=guided, peers=self.peers)
        if plan not in self.groups:
            self.groups[plan] = Members.of(self.world, plan)
        return self.groups[plan]

    def report(self) -> str:
        """How the work on the last video was divided."""
        reason = "as requested" if isinstance(self.plan, Plan) else "chosen"
        if self.plan == "auto" and not self.peers:
            reason += " for GPUs that reach each other through main memory"
        return f"{self.world.size} members: {[*self.groups][-1]}, {reason}"


def agree(group: Group, facts: dict[str, str], place: str = "") -> None:
    """Raise a ValueError in every member if one of the `facts`, text by name, differs between members.

    `place` describes where this member runs.
    """
    for name, fact in facts.items():
        said = _texts(group, fact)
        places = _texts(group, f"on member {group.rank} {place}".strip())
        for other, there in zip(said, places, strict=True):
            if other != said[0]:
                raise ValueError(f"Members differ: {name} {said[0]} {places[0]}, {other} {there}.")


def _texts(group: Group, text: str) -> list[str]:
    """The texts of all members by rank."""
    encoded = torch.tensor([*text.encode()], dtype=torch.uint8)
    lengths = group.gather(_number(len(encoded)))
    return [bytes(said.tolist()).decode() for said in group.gather(encoded, [(int(length),) for length in lengths])]


def _number(value: int) -> Tensor:
    return torch.tensor(int(value))
