"""A denoiser with its blocks on several devices: simulated GPUs, which refuse each other's tensors."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.simulated_gpu import simulated_gpu, text_of_lengths
from mochi_core import AsymmDiT, BlockCache, MochiPipeline, load_transformer
from mochi_core.checkpoints.device_map import place_on_devices
from tests.harness.random_inputs import SIGMAS, velocity
from tests.harness.tiny_models import DIT, random_dit, random_vae

OTHERS = ("x_embedder", "t_embedder", "t5_y_embedder", "t5_yproj", "pos_frequencies")
HALVES = {
    **dict.fromkeys([*OTHERS, "blocks.0"], "cuda:0"),
    **dict.fromkeys(["blocks.1", "blocks.2", "final_layer"], "cuda:1"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("device_map") / "dit.safetensors"
    save_file(random_dit().state_dict(), path)
    return path


@pytest.mark.parametrize("place", ["gpu", "meta", "cpu:1", 64])
def test_a_device_that_is_not_there_is_told_before_weights_are_read(tmp_path, place):
    with pytest.raises(ValueError, match=f"device is {place}, which (is not a device|this machine does not have)"):
        load_transformer(tmp_path / "gone", device_map={"blocks": "cpu", "": place})


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_goes_from_device_to_device(cached, monkeypatch):
    """With a cache, the second step skips blocks; fake tensors have no values to compare."""
    monkeypatch.setattr("mochi_core.sampling.block_cache.relative_change", lambda *_: 0.0)
    dit = AsymmDiT(DIT).requires_grad_(False)
    with simulated_gpu():
        place_on_devices(dit, HALVES)
        assert [str(block.mod_x.weight.device) for block in dit.blocks] == ["cuda:0", "cuda:1", "cuda:1"]
        noise = torch.empty(1, 12, 3, 6, 10, device="cuda:0")
        text = text_of_lengths(dit, 5)
        modulation = dit.schedule_modulation(SIGMAS[:-1], text.pooled)
        blocks_at = [BlockCache("first_block", 0.1).for_condition(1, 5, DIT.depth)] if cached else []
        for step in range(2):
            runs = [at(step) for at in blocks_at] or None
            (made,) = dit.denoise_each(
                noise, [(text, modulation.at(step))], dit.rope(noise.shape, noise.device), run_blocks=runs
            )
            assert made.device == noise.device
            assert made.shape == noise.shape


def test_on_one_device_it_is_the_plain_one(file):
    dit = load_transformer(file, torch.float32, device_map="auto", max_memory={"cpu": "1GB"})
    assert torch.equal(velocity(dit), velocity(random_dit()))


def test_what_does_not_fit_is_refused(file):
    with pytest.raises(
        ValueError, match=r"^The transformer does not fit on the devices \(.* left over\); raise max_memory"
    ):
        load_transformer(file, torch.float32, device_map="auto", max_memory={"cpu": "300KB"})
    with pytest.raises(ValueError, match=r'^device_map is \'both\'; use "auto"'):
        load_transformer(file, device_map="both")


def test_neither_offloading_nor_several_processes_go_with_it(file):
    dit = load_transformer(file, torch.float32, device_map={"": "cpu"})
    for other, options in (("offload", {"offload": True, "device": "cpu"}), ("parallel", {"parallel": "auto"})):
        with pytest.raises(ValueError, match=f"^device_map and {other} exclude each other: a split model "):
            MochiPipeline(dit, random_vae(), None, **options)
