"""Training learns, resumes after interruptions, and writes files that match the trained weights."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_core import load_lora, load_transformer
from mochi_core.autoencoder.latents import LATENTS_MEAN, LATENTS_STD
from mochi_core.checkpoints import is_block_matrix
from mochi_core.quantization.fp8 import quantize_rows
from mochi_core.quantization.weights import QuantizedLinear
from mochi_core.train.dataset import batch_at, example, open_dataset
from mochi_core.train.levels import draw_levels
from mochi_core.train.loop import LOG, STATE, TrainingRun, add_gradients, learning_rate, new_accelerator, train
from mochi_core.train.objective import velocity_loss
from mochi_core.train.weights import full_model, lora_model
from tests.harness.numbers import relative_error
from tests.harness.quantized_files import scaled_fp8
from tests.harness.random_inputs import inputs
from tests.harness.tiny_models import TEXT_WIDTH, random_dit
from tests.harness.training import SHAPES, config, fixed_loss, write_dataset

INPUTS = inputs([5, 9])
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SIZES = {"qkv_proj_lora_rank": 8, "qkv_proj_lora_alpha": 4, "out_proj_lora_rank": 4, "out_proj_lora_alpha": 6}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower with more threads, forty times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def accelerator():
    return new_accelerator()


def run(settings, accelerator, make=lora_model):
    """Train, and return the trained model."""
    model = make(settings, CPU)
    train(settings, model, accelerator)
    return model


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


def saved_weights(settings):
    return torch.load(settings.output / STATE, weights_only=True)["weights"]


def rows_logged(settings):
    with (settings.output / LOG).open(newline="") as file:
        return list(csv.DictReader(file))


def steps_logged(settings):
    return [int(row["step"]) for row in rows_logged(settings)]


def test_lora_learns_and_leaves_the_base_alone(tmp_path, accelerator):
    settings = config(tmp_path, steps=60, learning_rate=2e-2, lora=SIZES)
    base = load_transformer(settings.transformer, torch.float32)
    model = run(settings, accelerator)
    assert fixed_loss(model.dit, settings.dataset) < 0.7 * fixed_loss(base, settings.dataset)
    kept = {name: value for name, value in model.dit.state_dict().items() if name not in model.parameters}
    assert_same(kept, base.state_dict())


def test_both_lora_files_are_what_was_trained(tmp_path, accelerator):
    settings = config(tmp_path, lora=SIZES)
    trained = run(settings, accelerator).dit(*INPUTS)
    for kind in ("lora", "diffusers"):
        dit = load_transformer(settings.transformer, torch.float32)
        base = dit(*INPUTS)
        lora = load_lora(dit, settings.output / f"step_000006.{kind}.safetensors")
        assert relative_error(dit(*INPUTS), trained) <= 1e-5
        assert relative_error(dit(*INPUTS), base) > 1e-3
        lora.strength = 0
        assert torch.equal(dit(*INPUTS), base)


def test_the_log_has_the_loss_and_the_rate_of_every_step(tmp_path, accelerator):
    settings = config(tmp_path, gradient_accumulation=2, caption_dropout=0.5)
    dit = load_transformer(settings.transformer, torch.float32)
    clips = open_dataset(settings.dataset, TEXT_WIDTH)
    first = [velocity_loss(dit, *example(batch_at(clips, 2, 0, i), 0.5, 0, i)).item() for i in range(2)]
    run(settings, accelerator)
    logged = rows_logged(settings)
    assert float(logged[0]["loss"]) == pytest.approx(sum(first) / 2, rel=1e-4)
    rates = [learning_rate(settings, step) for step in range(6)]
    assert [float(row["learning_rate"]) for row in logged] == pytest.approx(rates, rel=1e-4)


def test_genmos_file_has_genmos_names(tmp_path, accelerator):
    settings = config(tmp_path, steps=1, warmup_steps=0, lora=SIZES)
    run(settings, accelerator)
    with safe_open(settings.output / "step_000001.lora.safetensors", "pt") as file:
        kinds = [*(("qkv_x", "qkv_y", "proj_x", "proj_y"),) * 2, ("qkv_x", "qkv_y", "proj_x")]
        layers = [f"blocks.{i}.attn.{kind}" for i, block in enumerate(kinds) for kind in block]
        assert set(file.keys()) == {f"{layer}.lora_{factor}" for layer in layers for factor in "AB"}
        assert file.get_slice("blocks.0.attn.qkv_x.lora_A").get_shape() == [8, 96]
        assert file.get_slice("blocks.0.attn.proj_y.lora_B").get_shape() == [96, 4]
        assert file.metadata()["kwargs"] == str(SIZES).replace("'", '"').replace("4,", "4.0,", 1).replace("6}", "6.0}")


@pytest.mark.parametrize("make", [lora_model, full_model])
def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path, accelerator, make):
    expected = copied(run(config(tmp_path, output=str(tmp_path / "straight")), accelerator, make).parameters)
    settings = config(tmp_path)

    model, begun = make(settings, CPU), []

    def press_ctrl_c(*_):
        begun.append("step")
        if len(begun) == 4:
            signal.raise_signal(signal.SIGINT)

    model.dit.x_embedder.register_forward_pre_hook(press_ctrl_c)
    assert train(settings, model, accelerator) == 4
    assert steps_logged(settings) == [1, 2, 3, 4]
    model = make(settings, CPU)
    assert train(settings, model, accelerator) == 6
    assert_same(copied(model.parameters), expected)
    assert steps_logged(settings) == [1, 2, 3, 4, 5, 6]
    assert train(settings, make(settings, CPU), accelerator) == 6  # nothing left to do
    assert_same(saved_weights(settings), expected)


def test_steps_after_the_saved_state_are_taken_and_logged_again(tmp_path, accelerator):
    settings = config(tmp_path)
    run(config(tmp_path, steps=3), accelerator)
    with (settings.output / LOG).open("a") as file:
        file.write("4,1.0,0.1,0.1\r\n5,")  # killed while writing
    run(settings, accelerator)
    assert steps_logged(settings) == [1, 2, 3, 4, 5, 6]


def test_a_state_of_other_ranks_or_none_at_all_is_refused(tmp_path, accelerator):
    run(config(tmp_path), accelerator)
    with pytest.raises(
        ValueError, match=r"state.pt is from a training with other layers or ranks; choose another output"
    ):
        run(config(tmp_path, lora=SIZES), accelerator)
    with pytest.raises(ValueError, match=r"state.pt is from a training with seed 0, but now it is 7; set it back"):
        run(config(tmp_path, seed=7, steps=8), accelerator)
    (tmp_path / "out" / STATE).write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"state.pt cannot be read; delete it to start from the beginning."):
        run(config(tmp_path), accelerator)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_training_learns_and_its_file_loads(tmp_path, accelerator, dtype):
    settings = config(tmp_path, steps=60, dtype=dtype)
    untrained = fixed_loss(load_transformer(settings.transformer, torch.float32), settings.dataset)
    model = run(settings, accelerator, full_model)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters.values())
    path = settings.output / "step_000060.safetensors"
    loaded = load_transformer(path, torch.float32)
    assert fixed_loss(loaded, settings.dataset) < 0.5 * untrained
    assert relative_error(loaded(*INPUTS), model.dit(*INPUTS)) < 0.02  # rounding to bf16
    wide = {name for name, value in load_file(path).items() if value.dtype == torch.float32}
    assert wide == {name for name in loaded.state_dict() if "_norm_" in name} | {"pos_frequencies"}


@pytest.mark.parametrize("quantize", ["int8", "fp8", "q4_0"])
def test_lora_over_quantised_weights(tmp_path, accelerator, quantize):
    settings = config(tmp_path, quantize=quantize, lora=SIZES)
    model = run(settings, accelerator)
    assert isinstance(model.dit.get_submodule("blocks.0.attn.qkv_x"), QuantizedLinear)
    dit = load_transformer(settings.transformer, torch.float32, quantize=quantize)
    base = dit(*INPUTS)
    load_lora(dit, settings.output / "step_000006.lora.safetensors")
    assert relative_error(dit(*INPUTS), model.dit(*INPUTS)) <= 1e-5
    assert relative_error(dit(*INPUTS), base) > 1e-3


def test_lora_over_weights_stored_for_products_in_fp8(tmp_path, accelerator):
    """fp8 products have no gradient: weights are dequantised while a LoRA is trained."""
    note = torch.tensor(list(b'{"format": "float8_e4m3fn_rowwise"}'), dtype=torch.uint8)
    weights = random_dit().state_dict()
    for name in [name for name, weight in weights.items() if is_block_matrix(name, weight) and ".mod_" not in name]:
        weights[name], weights[f"{name}_scale"] = quantize_rows(weights[name])
        weights[f"{name.removesuffix('.weight')}.comfy_quant"] = note.clone()
    save_file(weights, tmp_path / "rowwise.safetensors")
    assert load_transformer(tmp_path / "rowwise.safetensors").get_submodule("blocks.0.attn.qkv_x").fp8_product
    settings = config(tmp_path, transformer=str(tmp_path / "rowwise.safetensors"), lora=SIZES)
    started = copied(lora_model(settings, CPU).parameters)
    trained = run(settings, accelerator).parameters
    assert any((trained[name] - started[name]).abs().max() > 0 for name in trained)


@pytest.mark.parametrize("make", [lora_model, full_model])
def test_steps_without_any_caption(tmp_path, accelerator, make):
    settings = config(tmp_path, caption_dropout=1, steps=3)
    started = copied(make(settings, CPU).parameters)
    trained = run(settings, accelerator, make).parameters
    assert not any(
        torch.equal(trained[n], started[n]) for n in started if n.endswith(("attn.qkv_x.lora_B", "qkv_x.weight"))
    )


def test_bf16_trains_the_same_lora_but_for_rounding(tmp_path, accelerator):
    exact = run(config(tmp_path, output=str(tmp_path / "exact")), accelerator).parameters
    rounded = run(config(tmp_path, dtype="bf16"), accelerator).parameters
    assert all(parameter.dtype == torch.float32 for parameter in rounded.values())
    changes = [torch.cat([p.flatten() for n, p in one.items() if n.endswith("B")]) for one in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9


def test_accumulated_batches_count_as_one(tmp_path, accelerator):
    settings = config(tmp_path, gradient_accumulation=3, gradient_clip=1e9)
    model = lora_model(settings, CPU)
    clips = open_dataset(settings.dataset, TEXT_WIDTH)
    accumulating = TrainingRun(settings, model, clips, torch.optim.SGD(model.parameters.values()), accelerator)
    losses = [add_gradients(accumulating, i) for i in range(3)]
    together = copied({name: parameter.grad for name, parameter in model.parameters.items()})
    accumulating.optimizer.zero_grad()
    single = replace(accumulating, config=config(tmp_path, gradient_checkpointing=False))
    assert sum(losses) == pytest.approx(sum(add_gradients(single, i) for i in range(3)) / 3)
    for name, parameter in model.parameters.items():
        torch.testing.assert_close(parameter.grad / 3, together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(tmp_path, accelerator):
    alone = config(tmp_path, gradient_accumulation=2)
    expected = run(alone, accelerator).parameters
    keys = {"transformer": "dit.safetensors", "dataset": "dataset", "output": "together"}
    same = ("steps", "warmup_steps", "learning_rate", "batch_size", "dtype")
    keys |= {name: getattr(alone, name) for name in same}
    (tmp_path / "c.yaml").write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "mochi_core.train", "lora", "c.yaml"]
    # Not the exit code: gloo sometimes aborts a process on exit, after everything has been written.
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    weights = saved_weights(config(tmp_path, output=str(tmp_path / "together")))
    for name, parameter in expected.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_learning_rate_warms_up_and_falls_to_nothing(tmp_path):
    settings = config(tmp_path, steps=100, warmup_steps=10, learning_rate=1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_every_round_shows_every_clip_once_in_another_order(tmp_path):
    clips = open_dataset(write_dataset(tmp_path), TEXT_WIDTH)
    rounds = [
        [batch_at(clips, 2, 7, 3 * epoch + i) for i in range(3)] for epoch in range(20)
    ]  # of 2 and 1, and 2 clips
    for batches in rounds:
        assert sorted(map(id, (clip for batch in batches for clip in batch))) == sorted(map(id, clips))
        assert all(len({clip.shape for clip in batch}) == 1 for batch in batches)
    assert len({tuple(id(clip) for batch in batches for clip in batch) for batches in rounds}) > 10
    assert {clip.shape[1:] for clip in clips} == set(SHAPES)


def test_what_is_drawn_has_the_promised_distribution(tmp_path):
    clips = open_dataset(write_dataset(tmp_path), TEXT_WIDTH)[:1]
    drawn = [example(clips, 0.25, 3, i) for i in range(400)]
    latents, _, mask, sigma, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert sigma.aminmax() == pytest.approx((0, 1), abs=0.02)
    assert sigma.mean() == pytest.approx(0.5, abs=0.05)
    assert noise.std() == pytest.approx(1, abs=0.01)
    dropped = ~mask.any(dim=1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.06)
    # One channel, in DiT space: the posterior's logvar is -4.
    mean = clips[0].mean.read()[3, 0, 0, 0].item()
    assert latents[:, 3].mean() == pytest.approx((mean - LATENTS_MEAN[3]) / LATENTS_STD[3], abs=0.01)
    assert latents[:, 3].std() == pytest.approx(math.exp(-2) / LATENTS_STD[3], rel=0.02)
    assert torch.equal(example(clips, 0.25, 3, 9)[4], drawn[9][4])
    assert not torch.equal(example(clips, 0.25, 4, 9)[4], drawn[9][4])


def test_levels_of_frames_have_the_promised_distribution(tmp_path):
    sigma = torch.full((3000,), 0.5)
    levels = draw_levels(sigma, 4, torch.Generator().manual_seed(0))
    assert levels.min() >= 0
    assert levels.max() <= 1
    after_first = (levels[:, -1] == 0.5) & (levels[:, 0] < 0.5)
    between = (levels[:, 1:3] == 0.5).all(dim=1) & (levels[:, 0] < 0.5) & (levels[:, 3] < 0.5)
    independent = ~(after_first | between)
    for kind in (after_first, between, independent):
        assert kind.float().mean() == pytest.approx(1 / 3, abs=0.03)
    assert levels[independent].mean() == pytest.approx(0.5, abs=0.03)
    given = torch.cat([levels[after_first][:, :1], levels[between][:, [0, 3]].reshape(-1, 1)])
    assert (given == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert given.max() <= 0.2

    clips = open_dataset(write_dataset(tmp_path), TEXT_WIDTH)[:1]
    alike, half = ([example(clips, 0.25, 3, i, share) for i in range(200)] for share in (0.0, 0.5))
    for one, other in zip(alike, half, strict=True):
        assert torch.equal(one[4], other[4])
        assert other[3].shape == (1, clips[0].shape[1])
    same = [torch.equal(one[3][:, None].expand_as(other[3]), other[3]) for one, other in zip(alike, half, strict=True)]
    assert sum(same) / len(same) >= 0.45


def test_data_that_does_not_fit_is_refused(tmp_path, accelerator):
    with pytest.raises(
        ValueError, match=r"There are no clips in .*; make them with: python -m mochi_core.train prepare"
    ):
        run(config(tmp_path, dataset=str(tmp_path / "nothing")), accelerator)
    wide = write_dataset(tmp_path / "wide", TEXT_WIDTH + 1)
    with pytest.raises(ValueError, match=r"clip0.* was prepared with a text encoder of width 65, but .* takes 64"):
        run(config(tmp_path, dataset=str(wide)), accelerator)
    save_file({"mean": torch.zeros(1)}, wide / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors is not a clip; keep only files written by `prepare`"):
        run(config(tmp_path, dataset=str(wide)), accelerator)


def test_a_training_that_fails_says_so_and_keeps_the_last_good_state(tmp_path, accelerator):
    settings = config(tmp_path, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(
        ValueError, match=r"The loss is \S+ and its gradient \S+ at step \d: training has diverged; lower"
    ):
        run(settings, accelerator)
    assert all(value.isfinite().all() for value in saved_weights(settings).values())


def test_quantised_weights_cannot_be_trained_themselves(tmp_path, accelerator):
    path = tmp_path / "fp8.safetensors"
    scaled_fp8(random_dit().state_dict(), path)
    with pytest.raises(
        ValueError, match=r"The weights of fp8.safetensors are quantised, so they cannot be trained; dequantise"
    ):
        run(config(tmp_path, transformer=str(path)), accelerator, full_model)


def test_weights_that_know_noise_levels_of_frames_say_so_in_their_file(tmp_path):
    for share in (0.0, 0.5):
        (path,) = full_model(config(tmp_path, frame_levels=share), torch.device("cpu")).write(tmp_path / f"of {share}")
        assert load_transformer(path).has_frame_levels == (share > 0)
