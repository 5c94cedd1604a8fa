"""Training learns, goes on where it was interrupted, and writes files that mean what was trained."""

import csv
import shutil
import signal

import pytest
import torch

from mochi_core import load_transformer
from mochi_core.quantized import QuantizedLinear
from mochi_core.train.config import LoraKeys
from mochi_core.train.loop import LOG, STATE, learning_rate, new_accelerator, train
from mochi_core.train.lora import add_lora
from mochi_core.train.weights import full_trainee, lora_trainee
from tests.core.test_dit import inputs
from tests.harness.tiny_models import random_dit
from tests.harness.training import config, fixed_loss
from tests.peers.builders import relative_error

INPUTS = inputs([5, 9])
CPU = torch.device("cpu")
UNEQUAL = {"qkv_proj_lora_rank": 8, "qkv_proj_lora_alpha": 4, "out_proj_lora_rank": 4, "out_proj_lora_alpha": 6}


@pytest.fixture(scope="module")
def accelerator():
    return new_accelerator("no")


def run(config, accelerator, make=lora_trainee, **keys):
    trainee = make(config, CPU)
    return train(config, trainee, accelerator, **keys), trainee


def weights_of(trainee):
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}


def assert_same(weights, expected, tolerance=0.0):
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=tolerance, atol=tolerance)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_lora_learns_and_leaves_the_base_alone(tmp_path, accelerator):
    settings = config(tmp_path, steps=30, learning_rate=2e-2, lora=UNEQUAL)
    before, dataset = load_transformer(settings.transformer, torch.float32), settings.dataset
    untrained = fixed_loss(before, dataset)
    _, trainee = run(settings, accelerator)
    print(untrained, fixed_loss(trainee.dit, dataset))
    assert fixed_loss(trainee.dit, dataset) < 0.9 * untrained
    kept = {name: value for name, value in trainee.dit.state_dict().items() if name not in trainee.parameters}
    assert_same(kept, before.state_dict())


def test_full_learns(tmp_path, accelerator):
    settings = config(tmp_path, steps=30, learning_rate=3e-3)
    untrained = fixed_loss(load_transformer(settings.transformer, torch.float32), settings.dataset)
    _, trainee = run(settings, accelerator, full_trainee)
    print(untrained, fixed_loss(trainee.dit, settings.dataset))
