"""Plans: what each of several devices does of a video."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .group import Group
from .sequence import TokenSplit

HEADS = 24
"""Heads of Mochi's attention, which Ulysses shares out."""


@dataclass(frozen=True)
class Plan:
    """Members along three axes; their product is the number of devices."""

    guidance: int = 1
    """2 for the prompt and the negative prompt in different members."""
    ulysses: int = 1
    """Members that exchange tokens for heads, see `sequence`."""
    ring: int = 1
    """Members, or groups of those, that keys and values go round in."""

    @property
    def size(self) -> int:
        return self.guidance * self.ulysses * self.ring

    def __str__(self) -> str:
        return self._joined(", ")

    def _joined(self, separator: str) -> str:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return separator.join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "guidance=1"

    @classmethod
    def parse(cls, text: str) -> Plan:
        """A plan from text such as "guidance=2,ulysses=4"; ValueError if it is none."""
        sizes: dict[str, int] = {}
        for entry in text.split(","):
            name, _, size = (part.strip() for part in entry.partition("="))
            if name not in (field.name for field in fields(cls)) or not size.isascii() or not size.isdecimal():
                raise ValueError(
                    f"{text!r} is no plan; use auto, or one such as guidance=2,ulysses=4 or guidance=2,ring=2."
                )
            sizes[name] = int(size)
        return cls(**sizes)

    def check(self, members: int, heads: int = HEADS, *, guided: bool = True) -> None:
        """Raise a ValueError unless the plan is for so many members and heads, with guidance or without."""
        if self.guidance not in (1, 2) or min(self.ulysses, self.ring) < 1:
            raise ValueError(f"{self} is no plan; guidance is 1 or 2, ulysses and ring are 1 or more.")
        if heads % self.ulysses:
            divisors = [str(count) for count in range(1, heads + 1) if heads % count == 0]
            raise ValueError(
                f"ulysses={self.ulysses} does not divide Mochi's {heads} heads; use {', '.join(divisors[:-1])} or "
                f"{divisors[-1]}, or ring={self.ulysses}."
            )
        if self.size != members:
            raise ValueError(
                f"{members} GPU{'s' * (members != 1)}: {self._joined(' x ')} needs {self.size}; use --parallel auto "
                f"({choose(members, heads, guided=guided)})."
            )
        if self.guidance > 1 and not guided:
            raise ValueError(
                f"guidance={self.guidance} is for steps with guidance, and there are none; use --parallel auto "
                f"({choose(members, heads, guided=False)})."
            )


def choose(members: int, heads: int = HEADS, *, guided: bool = True, peers: bool = True) -> Plan:
    """The plan that is expected to be the fastest for so many members, by the bytes that each way sends.

    Args:
        guided: whether most steps have guidance.
        peers: whether devices read each other's memory; where all goes through main memory, the ring, which sends while it
            computes, takes the place of Ulysses.
    """
    guidance = 2 if guided and members % 2 == 0 else 1
    rest = members // guidance
    ulysses = math.gcd(rest, heads) if peers else 1
    return Plan(guidance, ulysses, rest // ulysses)


@dataclass(frozen=True)
class Members:
    """The groups of a plan that one member belongs to."""

    plan: Plan
    world: Group
    """All members."""
    guidance: Group
    """Members with the same tokens, under different prompts."""
    tokens: TokenSplit
    """Members with the same prompt."""

    @classmethod
    def of(cls, world: Group, plan: Plan) -> Members:
        """Groups for a plan; all members of `world` call it."""
        guidance, ring, ulysses = world.grid(plan.guidance, plan.ring, plan.ulysses)
        return cls(plan, world, guidance, TokenSplit(ulysses, ring))

    def any(self, said: bool) -> bool:
        """Whether one of the members says yes."""
        return bool(self.world.total(_number(said)))


class Team:
    """Members who make videos together, by one plan or by the one that suits each video."""

    def __init__(self, world: Group, plan: Plan | str, heads: int = HEADS, *, peers: bool = True) -> None:
        """`plan` is a `Plan`, its text, or "auto"; `peers` is that of `choose`, and false for all if it is for one.

        Raises:
            ValueError: the plan is none, or for another number of members or heads.
        """
        self.world, self.heads = world, heads
        self.peers = bool(world.total(_number(peers)) == world.size)
        self.plan = Plan.parse(plan) if isinstance(plan, str) and plan != "auto" else plan
        if isinstance(self.plan, Plan):
            self.plan.check(world.size, heads)
        self.groups: dict[Plan, Members] = {}

    def members(self, *, guided: bool) -> Members:
        """The groups for a video with or without guidance; all members call it."""
        plan = self.plan
        if not isinstance(plan, Plan):
            plan = choose(self.world.size, self.heads, guided=guided, peers=self.peers)
        if plan not in self.groups:
            self.groups[plan] = Members.of(self.world, plan)
        return self.groups[plan]

    def report(self) -> str:
        """How the last video was shared out."""
        reason = "as asked for" if isinstance(self.plan, Plan) else "chosen"
        if self.plan == "auto" and not self.peers:
            reason += " for GPUs that reach each other through main memory"
        return f"{self.world.size} members: {[*self.groups][-1]}, {reason}"


def agree(group: Group, facts: dict[str, str], place: str = "") -> None:
    """Raise a ValueError, in every member, that names what of the `facts`, text by name, differs among the members.

    `place` says where this member is.
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
