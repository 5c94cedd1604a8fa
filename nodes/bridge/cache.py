"""A block cache for the sampling runs of a MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...mochi_core import AsymmDiT, BlockCache
from ...mochi_core.parallel.sequence import TokenSplit
from ...mochi_core.sampling.block_cache import CachedBlocks, CacheState
from ...mochi_core.transformer.block import RunBlock
from .patches import mixes_samples
from .sampling import step_at

KEY = "mochi_cache"


@dataclass
class RunCache:
    """The cache of one sampling run, kept in the options that the host passes to every forward of the run.

    With several GPUs the host calls the denoiser from one thread per GPU, so shared state is guarded by a lock.
    """

    settings: BlockCache
    num_videos: int
    last_used: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """The last step in which each of `states` was requested."""
    states: dict[tuple[Any, ...], CacheState] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    """Guards `last_used` and `states`; each state itself is used by one thread only."""
    counts: list[BlockCache] = field(default_factory=list)
    """The counters of each forward."""
    batch_was_split: bool = False
    """Whether another node has split a batch, so that the prompt of a forward is unknown."""
    was_patched: bool = False
    """Whether another node's patches see whole batches, from which the cache would remove samples."""

    def use_states(self, keys: list[tuple[Any, ...]], step: int) -> list[CacheState]:
        """The states for `keys` (video, prompt and context window each), for use in `step`.

        States not used in the previous step either are dropped: context windows may move in every step and never come back.
        """
        with self.lock:
            self.last_used |= dict.fromkeys(keys, step)
            self.last_used = {key: used for key, used in self.last_used.items() if used >= step - 1}
            self.states = {key: self.states.get(key) or CacheState() for key in self.last_used}
            return [self.states[key] for key in keys]

    def forward_cache(self, *, counted: bool = True) -> BlockCache:
        """The settings for one forward, with its own counters, which are included in the report if `counted`."""
        cache = replace(self.settings)
        if counted:
            self.counts.append(cache)
        return cache

    def report(self) -> str:
        total = replace(self.settings)
        total.forwards, total.hits = sum(each.forwards for each in self.counts), sum(each.hits for each in self.counts)
        return total.report()


def add_cache(model, cache: BlockCache):
    """A copy of a MODEL that skips blocks as `cache` says; replaces any cache that the MODEL already has.

    Raises:
        ValueError: the MODEL is not from our loader.
    """
    if not isinstance(model.model.diffusion_model, AsymmDiT):
        raise ValueError(
            f"The MODEL is {type(model.model).__name__} from another loader, whose blocks Mochi Cache cannot skip; "
            "connect Load Mochi Transformer."
        )
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, partial(_with_cache, cache))
    return patched


def _with_cache(settings: BlockCache, executor, noise, *arguments, **named):
    """Wraps the host's sampling; its options are the host's copy for this run, so they can be changed."""
    run = RunCache(settings, len(noise))
    options = executor.class_obj.model_options.setdefault("transformer_options", {})
    options[KEY] = run
    try:
        return executor(noise, *arguments, **named)
    finally:
        options.pop(KEY)
        if run.batch_was_split:
            logging.warning("Mochi cache: off where another node runs the prompts of a batch one by one.")
        if run.was_patched:
            logging.warning("Mochi cache: off where another node's patches work on attention or blocks.")
        logging.info("Mochi cache: %s.", run.report())


def cached_run_block(
    run_block: RunBlock, x: torch.Tensor, options: dict, depth: int, group: TokenSplit | None = None
) -> RunBlock:
    """How to call blocks in a forward of latents `x` (B, 12, T, H, W): through the run's cache if any, else by `run_block`.

    With a `group`, blocks see this member's share of the tokens, and the members decide together.
    """
    run: RunCache | None = options.get(KEY)
    if run is None:
        return run_block
    sigmas, prompts = options["sample_sigmas"], options["uuids"]
    if len(x) != run.num_videos * len(prompts):
        run.batch_was_split = True
        return run_block
    if mixes_samples(options):
        run.was_patched = True
        return run_block
    # A prompt's forward may differ from the previous step's in its window, patches, size, device or tokens.
    window = getattr(options.get("context_window"), "index_list", ())
    replaced = options.get("patches_replace", {}).get("dit", {})
    share = group and (group.size, group.rank)
    kind = (tuple(window), frozenset(replaced), x.shape[1:], x.device, share)
    step = step_at(sigmas, options["sigmas"])
    states = run.use_states([(prompt, video, *kind) for prompt in prompts for video in range(run.num_videos)], step)
    cache = run.forward_cache(counted=group is None or group.rank == 0)
    can_skip = cache.can_skip(step, len(sigmas) - 1)
    return CachedBlocks(cache, states, can_skip, depth, run_block, group and group.total)
