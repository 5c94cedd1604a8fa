"""The layer classes that the networks are built from: torch.nn's own, or a host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn


class Ops(Protocol):
    """A namespace of layer classes with the constructors of torch.nn, such as torch.nn itself.

    A host passes its own to cast, offload or quantise weights.
    """

    @property
    def Linear(self) -> Callable[..., nn.Linear]: ...  # noqa: N802 - torch's name

    @property
    def Conv2d(self) -> Callable[..., nn.Conv2d]: ...  # noqa: N802 - torch's name

    @property
    def Conv3d(self) -> Callable[..., nn.Conv3d]: ...  # noqa: N802 - torch's name

    @property
    def GroupNorm(self) -> Callable[..., nn.GroupNorm]: ...  # noqa: N802 - torch's name

    @property
    def RMSNorm(self) -> Callable[..., nn.RMSNorm]: ...  # noqa: N802 - torch's name
