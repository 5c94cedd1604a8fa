"""A denoiser with its blocks spread over several devices, for when no single card holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..devices import check_device
from ..transformer.block import AsymmetricJointBlock
from ..transformer.model import AsymmDiT

Place = int | str
"""A device as accelerate names it: the index of a card, "cpu" or "disk"."""


def check_places(device_map: str | Mapping[str, Place]) -> None:
    """Raise a ValueError if `device_map` is another string than "auto", or names a device that this machine does not have."""
    if isinstance(device_map, str):
        if device_map != "auto":
            raise ValueError(f'device_map is {device_map!r}; use "auto", or the device of each module by its name.')
        return
    for place in {*device_map.values()} - {"disk"}:
        check_device(place)


def place_on_devices(
    dit: AsymmDiT, device_map: str | Mapping[str, Place], max_memory: Mapping[Place, int | str] | None = None
) -> AsymmDiT:
    """Move the parts of `dit` to devices already checked by `check_places`; accelerate moves activations between them.

    Args:
        device_map: the device of each module by name; or "auto", to put as much on each card as `max_memory` allows.
        max_memory: bytes for weights on each device, or text such as "12GB"; None for what is free.

    Raises:
        ValueError: accelerate is not installed, or the weights do not fit on the devices.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map  # optional
    except ImportError:
        raise ValueError("device_map needs a package: python -m pip install accelerate.") from None
    places: Mapping[str, Any] = {}
    if isinstance(device_map, str):
        memory: Any = None if max_memory is None else dict(max_memory)
        whole = [AsymmetricJointBlock.__name__]
        places = infer_auto_device_map(dit, max_memory=memory, no_split_module_classes=whole)
    else:
        places = device_map
    several = len({*places.values()}) > 1
    left = [name for name, place in places.items() if str(place) == "disk" or (several and str(place) == "cpu")]
    if left:
        first = left[0] or "all"
        raise ValueError(
            f"The transformer does not fit on the devices ({first} {'is' if len(left) == 1 else 'and others are'} left over); "
            'raise max_memory, quantise it, or keep it in main memory with MochiPipeline(..., offload="stream").'
        )
    return dispatch_model(dit, dict(places))  # pyright: ignore[reportReturnType] - it is `dit`
