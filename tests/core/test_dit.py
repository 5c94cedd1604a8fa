"""AsymmDiT against itself: every shortcut must change nothing."""

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiT, load_lora, load_transformer, sdpa
from mochi_core.transformer.conditioning import crop_to_valid
from mochi_core.transformer.layers import apply_chunked
from mochi_core.transformer.rope import Rope
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.random_inputs import inputs
from tests.harness.tiny_models import DIT, random_dit

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def dit():
    return random_dit()


def test_default_configuration_is_released_mochi():
    dit = AsymmDiT(device="meta")
    assert sum(p.numel() for p in dit.parameters()) == 10_027_677_744
    shapes = {name: tuple(p.shape) for name, p in dit.named_parameters()}
    assert shapes["blocks.0.mod_y.weight"] == (6144, 3072)
    assert shapes["blocks.47.mod_y.weight"] == (1536, 3072)
    assert shapes["t5_y_embedder.to_kv.weight"] == (8192, 4096)
    assert shapes["pos_frequencies"] == (3, 24, 64)
    assert "blocks.47.attn.proj_y.weight" not in shapes
    assert "blocks.47.mlp_y.w1.weight" not in shapes


def test_prompts_of_different_lengths_do_not_touch_each_other(dit):
    latents, sigma, embeds, mask = inputs([16, 5, 0, 1])
    together = dit(latents, sigma, embeds, mask)
    for i in range(4):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], dit(latents[one], sigma[one], embeds[one], mask[one]), **TOLERANCE)


def test_padding_never_matters(dit):
    latents, sigma, embeds, mask = inputs([7, 3])
    expected = dit(latents, sigma, embeds, mask)
    garbage = torch.where(mask[..., None], embeds, torch.full_like(embeds, 1e4))
    assert torch.equal(dit(latents, sigma, garbage, mask), expected)
    torch.testing.assert_close(dit(latents, sigma, embeds[:, :7], mask[:, :7]), expected, **TOLERANCE)


def test_valid_tokens_may_be_anywhere(dit):
    latents, sigma, embeds, mask = inputs([5])
    expected = dit(latents, sigma, embeds, mask)
    torch.testing.assert_close(dit(latents, sigma, embeds.roll(4, dims=1), mask.roll(4, dims=1)), expected, **TOLERANCE)


def test_empty_prompt_has_no_text_tokens_but_a_pooled_vector(dit):
    latents, sigma, embeds, mask = inputs([0])
    text = dit.prepare_text(embeds, mask)
    assert text.tokens.shape == (1, 0, DIT.hidden_size_y)
    pooler = dit.t5_y_embedder
    value_of_zero_token = pooler.to_kv(torch.zeros(1, DIT.text_width))[:, DIT.text_width :]
    torch.testing.assert_close(text.pooled, pooler.to_out(value_of_zero_token))
    assert dit(latents, sigma, embeds, mask).isfinite().all()


@pytest.mark.parametrize("size", [(1, 5, 8), (2, 6, 7), (1, 1, 3)])
def test_odd_latents_are_padded_and_cropped(dit, size):
    latents, sigma, embeds, mask = inputs([4], size)
    height, width = size[1:]
    padded = torch.nn.functional.pad(latents, (0, width % 2, 0, height % 2, 0, 0), mode="replicate")
    velocity = dit(latents, sigma, embeds, mask)
    assert velocity.shape == latents.shape
    torch.testing.assert_close(velocity, dit(padded, sigma, embeds, mask)[..., :height, :width])


def test_modulation_of_a_whole_schedule_equals_one_step_at_a_time(dit):
    _, _, embeds, mask = inputs([4, 9])
    pooled = dit.prepare_text(embeds, mask).pooled
    sigmas = torch.tensor([1.0, 0.7, 0.2])
    schedule = dit.schedule_modulation(sigmas, pooled)
    for i, sigma in enumerate(sigmas):
        step, expected = schedule.at(i), dit.modulation(sigma.expand(2), pooled)
        torch.testing.assert_close(step.final, expected.final, **TOLERANCE)
        for ours, theirs in zip(step.blocks, expected.blocks, strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_attention_is_passed_down_the_call(dit):
    shapes = []

    def recording(q, k, v):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return sdpa(q, k, v)

    latents, sigma, embeds, mask = inputs([4])
    expected = dit(latents, sigma, embeds, mask)
    assert torch.equal(dit(latents, sigma, embeds, mask, attention=recording), expected)
    assert shapes == [((1, 3, 24 + 4, 32), (1, 3, 24 + 4, 32))] * DIT.depth


def test_a_cpu_gets_the_keys_and_values_of_a_head_in_one_piece_for_the_same_bits(dit):
    def token_by_token(q, k, v):
        assert k.is_contiguous() and v.is_contiguous()
        return sdpa(q, *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)))

    arguments = inputs([4, 4])
    assert torch.equal(dit(*arguments, attention=token_by_token), dit(*arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_in_chunks_change_nothing(batch, dtype):
    feed_forward, x = random_dit(dtype=dtype).blocks[0].mlp_x, torch.randn(batch, 20, DIT.hidden_size_x, dtype=dtype)
    lengths = []

    def recording(tokens):
        lengths.append(tokens.shape[1])
        return feed_forward(tokens)

    torch.testing.assert_close(apply_chunked(recording, x, tokens=7), feed_forward(x), **TOLERANCE)
    assert lengths == {1: [7, 7, 6], 3: [2] * 10}[batch]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_of_a_large_latent_is_what_it_is_in_a_small_one(dtype):
    """Without attention, tokens do not interact, so every frame is as if alone, however the tokens are split."""
    dit, (latents, sigma, embeds, mask) = random_dit(dtype=dtype), inputs([4], (3, 60, 106))
    text, latents = dit.prepare_text(embeds.to(dtype), mask), latents.to(dtype)
    modulation, rope = dit.modulation(sigma, text.pooled), dit.rope(latents.shape, latents.device)

    def velocity(frames):
        part = Rope(rope.frames[frames], rope.spatial)
        return dit.denoise(latents[:, :, frames], text, modulation, part, attend=lambda q, k, v: q + k + v)

    together = velocity(slice(3))
    for i in range(3):
        frame = slice(i, i + 1)
        torch.testing.assert_close(together[:, :, frame], velocity(frame), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
@pytest.mark.parametrize("lengths", [(4,), (16, 5, 0)])
def test_a_compiled_block_equals_the_plain_one(lengths):
    plain, compiled = random_dit(), random_dit()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    arguments = inputs(lengths)
    torch.testing.assert_close(compiled(*arguments), plain(*arguments), **TOLERANCE)


def test_velocity_depends_on_everything(dit):
    latents, sigma, embeds, mask = inputs([6])
    base = dit(latents, sigma, embeds, mask)
    for changed in (
        dit(latents + 0.1, sigma, embeds, mask),
        dit(latents, sigma - 0.1, embeds, mask),
        dit(latents, sigma, embeds + 0.1, mask),
        dit(latents, sigma, embeds, mask & (torch.arange(16) != 5)),
    ):
        assert (changed - base).abs().max() > 1e-3


def test_bf16_model_keeps_positions_and_qk_norms_in_float32():
    dit = AsymmDiT(DIT, dtype=torch.bfloat16, device="meta")
    kept = {name.split(".")[-2:][0] for name, p in dit.named_parameters() if p.dtype == torch.float32}
    assert kept == {"pos_frequencies", "q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"}


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_rowwise", "int8", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_converted_model_is_one_loaded_in_that_dtype(tmp_path, dtype, quantize):
    path, arguments = tmp_path / "dit.safetensors", inputs([6, 2])
    save_file(random_dit().state_dict(), path)
    loaded = load_transformer(path, dtype, quantize=quantize)
    converted = load_transformer(path, torch.float64, quantize=quantize).to(dtype)
    assert loaded.dtype == converted.dtype == dtype
    expected = loaded.state_dict()
    for name, tensor in converted.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor.float(), expected[name].float()), name
    assert torch.equal(converted(*arguments), loaded(*arguments))


def test_half_and_float_convert_loras_too(tmp_path):
    dit, exact = random_dit(), random_dit()
    adapter = write_adapter(tmp_path / "a.safetensors", random_adapter(dit.state_dict(), dora=True), "comfyui")
    for model in (dit, exact):
        load_lora(model, adapter)
    expected = exact(*inputs([6]))
    assert dit.half().dtype == torch.float16
    assert (dit(*inputs([6])) - expected).norm() < 0.01 * expected.norm()
    assert dit.float().dtype == torch.float32
    assert {p.dtype for p in dit.parameters()} == {torch.float32}
    assert (dit(*inputs([6])) - expected).norm() < 0.01 * expected.norm()


def test_positions_and_norms_are_not_rounded_but_move():
    dit = random_dit()
    exact = {name: p.clone() for name, p in dit.named_parameters() if "norm" in name or name == "pos_frequencies"}
    dit.to(torch.bfloat16)
    assert len(exact) == 1 + 4 * DIT.depth
    for name, tensor in exact.items():
        assert torch.equal(dit.get_parameter(name), tensor), name
    assert {p.device.type for p in dit.to("meta", torch.float16).parameters()} == {"meta"}


def test_gradients_are_converted_with_their_parameters():
    dit = random_dit().requires_grad_()
    dit(*inputs([6])).square().mean().backward()
    optimizer = torch.optim.AdamW(dit.to(torch.bfloat16).parameters())
    before = dit.blocks[0].attn.q_norm_x.weight.clone()
    optimizer.step()  # refuses gradients of another dtype
    assert before.dtype == torch.float32
    assert not torch.equal(dit.blocks[0].attn.q_norm_x.weight, before)


def test_crop_to_valid():
    embeds = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[False, True, False], [True, False, True]])
    tokens, valid = crop_to_valid(embeds, mask)
    assert tokens.tolist() == [[[2, 3], [0, 0]], [[6, 7], [10, 11]]]
    assert valid.tolist() == [[True, False], [True, True]]
