"""Plans: how several devices divide the work on a video."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

HEADS = 24
"""Mochi's attention heads, which Ulysses distributes."""


@dataclass(frozen=True)
class Plan:
    """Members along three axes; their product is the number of devices."""

    guidance: int = 1
    """2 to run the prompt and the negative prompt in different members."""
    ulysses: int = 1
    """Members that exchange tokens for heads, see `sequence`."""
    ring: int = 1
    """Members, or Ulysses groups, around which keys and values circulate."""

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
        """Parse a plan from text such as "guidance=2,ulysses=4"; ValueError if it is invalid."""
        sizes: dict[str, int] = {}
        for entry in text.split(","):
            name, _, size = (part.strip() for part in entry.partition("="))
            if name not in (field.name for field in fields(cls)) or not size.isascii() or not size.isdecimal():
                raise ValueError(
                    f"{text!r} is not a plan; use auto, or e.g. guidance=2,ulysses=4 or guidance=2,ring=2."
                )
            sizes[name] = int(size)
        return cls(**sizes)

    def check(self, members: int, heads: int = HEADS, *, guided: bool = True) -> None:
        """Raise a ValueError unless the plan suits this number of members and heads, with or without guidance."""
        if self.guidance not in (1, 2) or min(self.ulysses, self.ring) < 1:
            raise ValueError(f"{self} is not a valid plan; guidance must be 1 or 2, ulysses and ring 1 or more.")
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
                f"guidance={self.guidance} is for steps with guidance, but there are none; use --parallel auto "
                f"({choose(members, heads, guided=False)})."
            )


def choose(members: int, heads: int = HEADS, *, guided: bool = True, peers: bool = True) -> Plan:
    """The plan expected to be fastest for this number of members, by the bytes that each method sends.

    Args:
        guided: whether most steps have guidance.
        peers: whether devices can access each other's memory; if everything goes through main memory, the ring replaces
            Ulysses, because it sends while it computes.
    """
    guidance = 2 if guided and members % 2 == 0 else 1
    rest = members // guidance
    ulysses = math.gcd(rest, heads) if peers else 1
    return Plan(guidance, ulysses, rest // ulysses)
