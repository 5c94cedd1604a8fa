"""What a training's YAML file may contain, and the error for everything else."""

import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from mochi_core.train.__main__ import main
from mochi_core.train.config import Config, LoraKeys, SampleKeys, parse, read_config

ROOT = Path(__file__).parents[2]
NEEDED = "transformer: dit.safetensors\ndataset: clips\noutput: out\n"
SAMPLE = "sample:\n  prompts: [a kite]\n  vae: vae.safetensors\n  t5: t5.safetensors\n"
# Lists that hold the previous list twice: 60 of them expand to more than any machine could write.
DOUBLED = "[" + ", ".join(["&l0 [x, x]", *(f"&l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 60))]) + "]"


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "c.yaml"

    return write


SECTIONS = {"": (Config, NEEDED), "lora": (LoraKeys, NEEDED + "lora:\n"), "sample": (SampleKeys, NEEDED + SAMPLE)}
PLACES = [(section, key) for section, (keys, _) in SECTIONS.items() for key in keys.model_fields]


@pytest.mark.parametrize(("section", "key"), PLACES)
def test_aliases_of_aliases_are_refused_at_once_at_every_key(written, section, key):
    """The traceback does not expand them either. If a key appears twice, the last one counts."""
    indent = "  " if section else ""
    with pytest.raises(ValueError, match=rf"{key} is .*, but must be") as refusal:
        read_config(written(f"{SECTIONS[section][1]}{indent}{key}: {DOUBLED}\n"))
    lines = [line for line in traceback.format_exception(refusal.value) if not line.startswith("  File")]
    assert len("".join(lines)) < 2000


def test_defaults_are_the_documented_ones(written):
    expected = Config(transformer=Path("dit.safetensors"), dataset=Path("clips"), output=Path("out"))
    assert read_config(written(NEEDED)) == expected
    assert read_config(written(NEEDED + "quantize: null\nlora:\n")) == expected
    assert read_config(written(NEEDED + "lora: {qkv_proj_lora_rank: null}\n")) == expected


def test_numbers_as_people_write_them(written):
    config = read_config(written(NEEDED + "learning_rate: 1e-4\nweight_decay: 0\nlora: {qkv_proj_lora_alpha: 32}\n"))
    assert (config.learning_rate, config.weight_decay) == (1e-4, 0.0)
    assert config.lora == LoraKeys(qkv_proj_lora_alpha=32.0)


def test_the_example_in_the_documentation_is_complete():
    config = read_config(ROOT / "docs" / "train_lora.yaml")
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    assert config.sample is not None
    for keys in (Config, LoraKeys, SampleKeys):
        assert [name for name in keys.model_fields if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("dataset: a\noutput: b\n", "transformer is missing; it is a file or folder."),
        ("transfomer: a\ndataset: b\noutput: c\n", "there is no key transfomer; the keys are transformer,"),
        (NEEDED + "7: 4\n", "there is no key 7; the keys are transformer,"),
        (NEEDED + "rank: 4\n", "there is no key rank; the keys are transformer, dataset, output, steps"),
        (NEEDED + "steps: 100\n", "warmup_steps is 200, but must be less than steps, 100."),
        (NEEDED + "steps: 0\n", "steps is 0, but must be a whole number, 1 or more."),
        (NEEDED + "steps: true\n", "steps is True, but must be a whole number, 1 or more."),
        (NEEDED + "steps: 2.5\n", "steps is 2.5, but must be"),
        (NEEDED + "learning_rate: true\n", "learning_rate is True, but must be a number above 0."),
        (NEEDED + "learning_rate: fast\n", "learning_rate is 'fast', but must be a number above 0."),
        (NEEDED + "learning_rate: .inf\n", "learning_rate is inf, but must be a number above 0."),
        (NEEDED + "caption_dropout: 1.1\n", "caption_dropout is 1.1, but must be a number from 0 to 1."),
        (NEEDED + "gradient_checkpointing: some\n", "gradient_checkpointing is 'some', but must be true, false or a"),
        (NEEDED + "gradient_checkpointing: 'yes'\n", "gradient_checkpointing is 'yes', but must be true, false or a"),
        (NEEDED + "dtype: fp16\n", "dtype is 'fp16', but must be one of bf16, fp32."),
        (NEEDED + "quantize: int4\n", "quantize is 'int4', but must be one of fp8, int8, q4_0."),
        (NEEDED + "output: 3\n", "output is 3, but must be a file or folder."),
        (NEEDED.replace("clips", "~nobody-of-that-name/clips"), "dataset is '~nobody-of-that-name/clips', but must be"),
        (NEEDED + "lora: 16\n", "lora is 16, but must be a section with its own keys."),
        (NEEDED + "lora: {rank: 16}\n", "in lora, there is no key rank; the keys are qkv_proj_lora_rank"),
        (NEEDED + "sample: {vae: a, t5: b}\n", "in sample, prompts is missing; it is a list of strings."),
        (NEEDED + SAMPLE.replace("a kite", "3"), "in sample, prompts is [3], but must be a list of strings."),
        (NEEDED + SAMPLE + "  size: wide\n", "in sample, size is 'wide', but must be a width and a height, such as"),
        (NEEDED + SAMPLE + "  size: 848x470\n", "in sample, height is 470, but Mochi needs a multiple of 16"),
        (NEEDED + SAMPLE + "  frames: 36\n", "in sample, num_frames is 36, but Mochi needs 6k + 1 frames"),
        (NEEDED + "steps: " + "9" * 400 + "\n", "steps is 9999"),
        (NEEDED + "steps: 0x" + "f" * 5000 + "\n", "steps is a number with thousands of digits, but must be"),
        (NEEDED + "learning_rate: " + "9" * 400 + "\n", "learning_rate is 9999"),
        (NEEDED + "learning_rate: " + "9" * 5000 + "\n", "is not a YAML file: Exceeds the limit"),
        (NEEDED + SAMPLE + "  size: " + "9" * 400 + "x16\n", "in sample, size is '9999"),
        (NEEDED + "steps: 2000-99-99\n", "is not a YAML file: month must be in 1..12"),
        (NEEDED + "steps: !!int ''\n", "is not a YAML file: string index out of range"),
        (NEEDED + f"steps: {DOUBLED}\n", "steps is [['x', 'x'], [[...], [...]], [[...], [...]], [[...], [...]]"),
        (NEEDED + f"sample: {DOUBLED}\n", "sample is [['x', 'x'], [[...], [...]]"),
        (NEEDED + f"surprise: {DOUBLED}\n", "there is no key surprise; the keys are"),
        (NEEDED + 'steps: "\\e[31m\\n\\ud800"\n', r"steps is '\x1b[31m\n\ud800', but must be"),
        ("[" * 5000, "is not a YAML file: it is nested too deeply"),
        ("a" * 60_000, "has 60,000 bytes; a training configuration may have at most 50,000."),
        ("just text", "must hold keys and values, such as steps: 2000."),
        ("a: [1", "is not a YAML file: while parsing"),
        ("a: !!python/object/apply:os.system ['x']", "is not a YAML file: could not determine a constructor"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(written, capsys, text, sentence):
    path = written(text)
    assert main(["lora", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}")
    assert sentence in message
    assert message.count("\n") == 1


def test_keys_of_loras_have_no_place_in_full_training(written):
    for text in ("quantize: int8", "lora: {qkv_proj_lora_rank: 4}"):
        with pytest.raises(ValueError, match=r"c.yaml: \w+ is for LoRAs only; remove it to train all weights."):
            read_config(written(f"{NEEDED}{text}\n"), full=True)


def test_the_sections_are_values_too():
    defaults = {"qkv_proj_lora_rank": 16, "qkv_proj_lora_alpha": 16.0}
    assert parse(LoraKeys, {}).model_dump() == {**defaults, "out_proj_lora_rank": 16, "out_proj_lora_alpha": 16.0}


@pytest.mark.slow
def test_without_accelerate_there_is_a_command_to_get_it(written):
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
sys.modules["accelerate"] = None
from mochi_core.train.__main__ import main
sys.exit(main(["lora", {str(written(NEEDED))!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: Training needs accelerate; get it with: python -m pip install accelerate\n"
