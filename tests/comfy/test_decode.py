"""Decoding in a real server: every node gives the same frames; nothing is left behind if cancelled or out of memory."""

import sys
from itertools import count, pairwise

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.harness.graphs import SAMPLER, VAE, assert_healthy, give_back_memory, node, upto_sampler
from tests.harness.tiny_models import random_vae

MIB = 2**20
# A decode must find room for two of its widest tensors: frames of 192 x 256 in 32 channels.
SIZE = {"width": 256, "height": 192, "num_frames": 13, "steps": 1}
SMALL = {**SIZE, "width": 128, "height": 96}
NAMES = (f"frames{i}.safetensors" for i in count())


@pytest.fixture
def frames_of(comfy_client, comfy_server):
    """Run a graph, and read the IMAGE from each source."""

    def run(graph, *sources):
        names = {source[0]: next(NAMES) for source in sources}
        saves = {f"save {key}": node("ProbeSaveTensor", images=[key, 0], name=name) for key, name in names.items()}
        done = comfy_client.run({**graph, **saves})
        assert done.outcome == "execution_success", done.error
        return [load_file(comfy_server.base / "output" / name)["images"] for name in names.values()]

    return run


def decoder(source=SAMPLER, **inputs):
    return node("Mochi1TiledVAEDecode", samples=[source, 0], vae=[VAE, 0], **inputs)


def test_every_node_decodes_to_the_same_frames(frames_of):
    graph = upto_sampler(**SMALL)
    graph["ours"] = decoder()
    graph["little memory"] = decoder(memory=0.02)
    graph["stock"] = node("VAEDecode", samples=[SAMPLER, 0], vae=[VAE, 0])
    tiles = {"tile_size": 64, "overlap": 32, "temporal_size": 8, "temporal_overlap": 4}
    graph["stock tiled"] = node("VAEDecodeTiled", samples=[SAMPLER, 0], vae=[VAE, 0], **tiles)
    ours, *others = frames_of(graph, *([name] for name in ("ours", "little memory", "stock", "stock tiled")))
    assert ours.shape == (13, 96, 128, 3)
    assert ours.dtype == torch.float32
    assert 0 <= ours.min() < 0.1 < 0.9 < ours.max() <= 1
    for frames in others:
        torch.testing.assert_close(frames, ours, rtol=0, atol=1e-4)


def test_frames_are_those_of_the_core(frames_of, latents_of):
    graph = upto_sampler(**SMALL, batch_size=2)
    (latents,) = latents_of(graph, [SAMPLER, 0])
    graph["ours"] = decoder()
    (frames,) = frames_of(graph, ["ours"])
    vae = random_vae()
    vae.load_state_dict({name: tensor.bfloat16().float() for name, tensor in vae.state_dict().items()})
    expected = vae.decode(latents).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 4, 1).flatten(0, 1)
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-3), ("fp16", 0.01), ("bf16", 0.05)])
def test_dtypes(frames_of, dtype, error):
    graph = upto_sampler(width=32, height=32, num_frames=7)  # half-precision convolutions are slow on a CPU
    graph["ours"] = decoder()
    graph["loaded"] = node("Mochi1LoadVAE", vae_name="mochi_vae.safetensors", dtype=dtype)
    graph["other"] = node("Mochi1TiledVAEDecode", samples=[SAMPLER, 0], vae=["loaded", 0])
    auto, chosen = frames_of(graph, ["ours"], ["other"])
    assert (chosen - auto).norm() <= error * auto.norm()
    assert torch.equal(chosen, auto) == (dtype == "fp32")  # auto on a CPU


def test_every_node_encodes_the_same_part_of_any_video(latents_of, comfy_server):
    """23 frames of 60 x 43 become 19 of 56 x 40, for a latent of 7 x 5."""
    graph = upto_sampler(width=64, height=48, num_frames=25, steps=1)
    graph["decode"] = decoder()
    graph["scale"] = node(
        "ImageScale", image=["decode", 0], width=60, height=43, upscale_method="area", crop="disabled"
    )
    graph["frames"] = node("ImageFromBatch", image=["scale", 0], batch_index=0, length=23)
    graph["start"] = node("ImageFromBatch", image=["frames", 0], batch_index=0, length=19)
    graph["part"] = node("ImageCrop", image=["start", 0], width=56, height=40, x=2, y=1)
    graph["mask"] = node("SolidMask", value=0.0, width=60, height=43)
    encode = {"pixels": ["frames", 0], "vae": [VAE, 0]}
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 8, "temporal_overlap": 4}
    graph |= {
        "exact": node("Mochi1VAEEncode", pixels=["part", 0], vae=[VAE, 0]),
        "ours": node("Mochi1VAEEncode", **encode),
        "stock": node("VAEEncode", **encode),
        "tiled": node("VAEEncodeTiled", **encode, **tiles),
        "inpaint": node("VAEEncodeForInpaint", **encode, mask=["mask", 0], grow_mask_by=0),
    }
    before = comfy_server.log.stat().st_size
    exact, *others = latents_of(graph, ["exact", 0], ["ours", 0], ["stock", 0], ["tiled", 0], ["inpaint", 0])
    assert exact.shape == (1, 12, 4, 5, 7)
    for latents in others:
        torch.testing.assert_close(latents, exact)
    log = comfy_server.log.read_bytes()[before:].decode()
    assert log.count("Mochi encode: 23 frames of 60 x 43 given, 19 (6k + 1) of 56 x 40 encoded.") == 3
    assert (
        log.count("Mochi encode: 23 frames of 56 x 40 given, 19 (6k + 1) of 56 x 40 encoded.") == 1
    )  # cropped by the host first


def resident(server):
    return psutil.Process(server.process.pid).memory_info().rss


def smallest_growth(held):
    """Memory that every run leaves behind; the first may, and sometimes one leaves memory that the next reuses."""
    return min(after - before for before, after in pairwise(held[1:]))


def test_progress_counts_frames_and_cancel_ends_within_one(comfy_client, comfy_server):
    give_back_memory(comfy_client)
    before = resident(comfy_server)
    graph = upto_sampler(**{**SIZE, "num_frames": 163})
    graph["decode"] = decoder()
    graph["save"] = node("ProbeSaveTensor", images=["decode", 0], name=next(NAMES))
    seen, pressed = [], []

    def press_cancel(name, data):
        if name == "progress" and data["node"] == "decode":
            seen.append((data["value"], data["max"]))
            if data["value"] >= 5 and not pressed:
                pressed.append(data["value"])
                comfy_client.interrupt()

    run = comfy_client.run(graph, on_event=press_cancel)
    assert run.outcome == "execution_interrupted"
    assert {total for _, total in seen} == {163}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] <= pressed[0] + 12
    give_back_memory(comfy_client)
    assert resident(comfy_server) - before < 64 * MIB
    assert_healthy(comfy_client)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
@pytest.mark.parametrize("mib", [400, 250, 150])
def test_decodes_the_same_with_too_little_memory_for_its_plan(frames_of, comfy_client, mib):
    graph = upto_sampler(**SIZE)
    graph["plenty"] = decoder()
    graph["scarce"] = node("ProbeLimitMemory", value=[SAMPLER, 0], mib=mib)
    graph["decode"] = decoder("scarce")
    graph["again"] = node("ProbeLimitMemory", value=["decode", 0], mib=0)
    try:
        plenty, scarce = frames_of(graph, ["plenty"], ["again"])
    finally:
        lift_limit(comfy_client)
    torch.testing.assert_close(plenty, scarce, rtol=0, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_hopeless_lack_of_memory_is_one_sentence_and_leaves_nothing(comfy_client, comfy_server):
    held = []
    for _ in range(4):
        run = run_out_of_memory(comfy_client)
        assert run.outcome == "execution_error"
        assert "Out of memory: frames of 160 x 200 latents need" in run.error
        give_back_memory(comfy_client)
        held.append(resident(comfy_server))
    assert smallest_growth(held) < 16 * MIB
    assert_healthy(comfy_client)


def with_empty_latents(**size):
    """A graph for tests that decode many times, for which sampling would take too long."""
    return {VAE: upto_sampler()[VAE], "latents": node("EmptyMochiLatentVideo", **size, batch_size=1)}


def run_out_of_memory(client):
    graph = with_empty_latents(width=1600, height=1280, length=7)
    graph["scarce"] = node("ProbeLimitMemory", value=["latents", 0], mib=250)  # the video itself takes 164
    graph["decode"] = decoder("scarce")
    graph["save"] = node("ProbeSaveTensor", images=["decode", 0], name=next(NAMES))
    try:
        return client.run(graph)
    finally:
        lift_limit(client)


def lift_limit(client):
    graph = {"make": node("EmptyImage", width=16, height=16, batch_size=1, color=0)}
    graph["lift"] = node("ProbeLimitMemory", value=["make", 0], mib=0)
    graph["save"] = node("ProbeSaveTensor", images=["lift", 0], name=next(NAMES))
    assert client.run(graph).outcome == "execution_success"


def test_two_in_a_row_hold_no_more_than_one(frames_of, comfy_client, comfy_server):
    held = []
    for _ in range(4):
        graph = with_empty_latents(width=SIZE["width"], height=SIZE["height"], length=19)
        graph["decode"] = decoder("latents")
        frames_of(graph, ["decode"])
        give_back_memory(comfy_client)
        held.append(resident(comfy_server))
    assert smallest_growth(held) < 8 * MIB  # less than its frames
