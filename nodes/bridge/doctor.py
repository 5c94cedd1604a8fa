"""The core's report about this machine, in the host's log."""

from __future__ import annotations

import asyncio
import logging
import os

import comfy.model_management as mm

from ...mochi_core.doctor import examine, render

VARIABLE = "MOCHI_DOCTOR"
"""Environment variable that asks for the report.

Bug reports include the console from its start, so the report belongs there. A route would let any page in the browser start work
on the device, even during a run.
"""


async def log_report_if_asked() -> None:
    """Log what `python -m mochi_core doctor` prints for the transformer's device, if the environment asks for it."""
    if os.environ.get(VARIABLE, "0") in ("", "0"):
        return
    try:
        device = mm.get_torch_device()
        logging.info("%s", await asyncio.to_thread(lambda: render(examine(device))))
    except Exception:  # the nodes work without it
        logging.exception("The report that %s asks for could not be made.", VARIABLE)
