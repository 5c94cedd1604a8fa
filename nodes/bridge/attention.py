"""The attention function of the denoiser: the host's own, or one of the core's, set as the host's override.

The override is in the MODEL's options, which the host passes to every call; an override that another node sets later replaces it.
"""

from __future__ import annotations

import comfy.ldm.modules.attention as host
import torch
from comfy.cli_args import args

from ...mochi_core.transformer.attention import ATTENTIONS, Attention, choose_attention

HOST = "host"
CHOICES = ["auto", HOST, *(name for name in ATTENTIONS if name != "auto")]
FLAGS = (
    "split_cross_attention",
    "quad_cross_attention",
    "pytorch_cross_attention",
    "sage_attention",
    "flash_attention",
)
"""The server's attention options, without their prefix `use_`."""
MEMORY_EFFICIENT_ON = ("cpu", "cuda")
"""Device types on which PyTorch's attention never materialises the whole tokens x tokens matrix."""
OVERRIDE = "optimized_attention_override"
"""Key in the host's options for an attention function that replaces its own."""
CALL_KEYS = {"skip_reshape", "skip_output_reshape", "transformer_options", "_inside_attn_wrapper"}
"""Keyword arguments of the host's attention when called for the denoiser; the host adds one of them."""


def set_attention(model, name: str, dtype: torch.dtype, head_dim: int) -> str:
    """Set a MODEL's attention by `name`, one of `CHOICES`; returns the choice and its reason, for the log.

    "auto" is the core's fastest exact attention; it is the host's if the server was started with an attention option, or if
    PyTorch's attention would materialise the whole tokens x tokens matrix on this device.

    Raises:
        ValueError: this attention cannot be used here.
    """
    server = host.optimized_attention.__name__.removeprefix("attention_")
    if name == HOST or (name == "auto" and _server_was_asked()):
        return f"{server} (the server's)"
    choice = choose_attention(name, model.load_device, dtype, head_dim)
    if name == "auto" and (model.load_device.type not in MEMORY_EFFICIENT_ON or choice.name == "math"):
        return f"{server} (the server's, because PyTorch's needs too much memory on {model.load_device})"
    model.model_options["transformer_options"][OVERRIDE] = _override(choice.run)
    return f"{choice.name} ({choice.reason}; the server's is {server})"


def _server_was_asked() -> bool:
    return any(getattr(args, f"use_{flag}") for flag in FLAGS)


def _override(attend: Attention):
    def override(function, *arguments, **named):
        """Calls `function` unless the call looks like `host_attention`'s; other nodes make calls of their own."""
        q, k, v, *rest = arguments
        own = (
            len(rest) == 1
            and named.keys() <= CALL_KEYS
            and named.get("skip_reshape")
            and named.get("skip_output_reshape")
        )
        return attend(q, k, v) if own else function(*arguments, **named)

    return override


def host_attention(transformer_options: dict) -> Attention:
    """The host's attention, or its override in these options, as the core's `Attention`."""

    def attend(q, k, v):
        return host.optimized_attention(
            q, k, v, q.shape[1], skip_reshape=True, skip_output_reshape=True, transformer_options=transformer_options
        )

    return attend
