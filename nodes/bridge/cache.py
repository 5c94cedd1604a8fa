"""A block cache for the sampling runs of a MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...mochi_core import AsymmDiT, BlockCache
from ...mochi_core.sampling.block_cache import CachedBlocks, Memory
from ...mochi_core.transformer.model import RunBlock
from .sampling import step_at

KEY = "mochi_cache"


@dataclass
class RunCache:
    """Lives as long as one run of a sampler, in the options that the host passes to every forward of it."""

    cache: BlockCache
    num_videos: int
    used: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """The last step in which each of `memories` was asked for."""
    memories: dict[tuple[Any, ...], Memory] = field(default_factory=dict)
    cannot_tell: bool = False
    """Whether another node has split a batch, so that nothing says which prompt a forward is for."""

    def memory(self, key: tuple[Any, ...], step: int) -> Memory:
        self.used[key] = step
        return self.memories.setdefault(key, Memory())

    def forget_before(self, step: int) -> None:
        """Context windows may lie elsewhere in every step: what nobody came back to is not kept."""
        self.used = {key: used for key, used in self.used.items() if used >= step}
        self.memories = {key: self.memories[key] for key in self.used}


def add_cache(model, cache: BlockCache):
    """A copy of a MODEL that leaves out blocks, as `cache` says; of several caches, the last counts.

    Raises:
        ValueError: the MODEL is not from our loader.
    """
    if not isinstance(model.model.diffusion_model, AsymmDiT):
        raise ValueError(
            f"The MODEL is {type(model.model).__name__} from another loader, whose blocks Mochi Cache cannot leave out; "
            "connect Load Mochi Transformer."
        )
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, partial(_with_cache, cache))
    return patched


def _with_cache(settings: BlockCache, executor, noise, *arguments, **named):
    """Wraps the host's sampling. The options are of this run alone: the host has copied them."""
    run = RunCache(replace(settings), len(noise))
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    options[KEY] = run
    try:
        return executor(noise, *arguments, **named)
    finally:
        options.pop(KEY)
        if run.cannot_tell:
            logging.warning("Mochi cache: off where another node runs the prompts of a batch one by one.")
        logging.info("Mochi cache: %s.", run.cache.report())


def cached_run_block(run_block: RunBlock, x: torch.Tensor, options: dict, depth: int) -> RunBlock:
    """`run_block`, or what leaves out blocks in this forward of latents `x` (B, 12, T, H, W), if the run has a cache."""
    run: RunCache | None = options.get(KEY)
    if run is None:
        return run_block
    sigmas, prompts = options["sample_sigmas"], options["uuids"]
    if len(x) != run.num_videos * len(prompts):
        run.cannot_tell = True
        return run_block
    # Whatever makes a forward another one than that of the same prompt in the step before.
    window = getattr(options.get("context_window"), "index_list", ())
    replaced = options.get("patches_replace", {}).get("dit", {})
    kind = (tuple(window), frozenset(replaced), x.shape[1:], x.device)
    step = step_at(sigmas, options["sigmas"])
    run.forget_before(step - 1)
    memories = [run.memory((prompt, video, *kind), step) for prompt in prompts for video in range(run.num_videos)]
    return CachedBlocks(run.cache, memories, run.cache.may_reuse(step, len(sigmas) - 1), depth, run_block)
