"""T5 in ComfyUI's own Mochi CLIP, in its own process: only code can make that CLIP small."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core.__main__ import main
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.quantized_files import SAFETENSORS
from tests.harness.tiny_models import T5_HEADS, TEXT_WIDTH, random_t5

SCRIPT = """
import json
from pack.nodes.bridge.text import encode_prompt, load_clip

*paths, config, result = arguments
options = {"t5xxl_model_config": json.loads(config)}
comfy.sd.detect_te_model = lambda _: comfy.sd.TEModel.T5_XXL  # it knows the encoder by the width of its MLPs
long = " ".join(f"w{i}" for i in range(200))
huge = " ".join(f"w{i}" for i in range(200_000))
out = {}
for i, path in enumerate(paths):
    stock = comfy.sd.load_clip([path], clip_type=comfy.sd.CLIPType.MOCHI, model_options=options)
    for name, clip in (("stock", stock), ("ours", load_clip(path))):
        for kind, prompt in (("text", "a (blue:1.5) kite"), ("empty", ""), ("long", long), ("huge", huge))[:1 if i else 4]:
            (embeds, extra), = encode_prompt(clip, prompt)
            out[f"{i} {name} {kind}"] = embeds.contiguous()
            out[f"{i} {name} {kind} mask"] = extra["attention_mask"].contiguous()
        try:
            encode_prompt(clip, "a kite\\ud83d")
        except ValueError as problem:
            print(problem)
save_file(out, result)
"""
CONVERTED = ("fp32", "fp8_scaled")


@pytest.fixture(scope="module")
def done(comfy_path, tmp_path_factory):
    """Results for a file as users have it and for `convert`'s output: the log, and all conditioning."""
    folder = tmp_path_factory.mktemp("t5")
    source, result = folder / "t5.safetensors", folder / "out.safetensors"
    tensors = {name: tensor.half() for name, tensor in random_t5().items()}
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, source)
    converted = [folder / f"{dtype}.safetensors" for dtype in CONVERTED]
    for path in converted:
        assert main(["convert", str(source), str(path), "--to", "canonical", "--dtype", path.stem]) == 0
    config = {"d_model": TEXT_WIDTH, "d_kv": TEXT_WIDTH // T5_HEADS, "d_ff": 2 * TEXT_WIDTH, "num_heads": T5_HEADS}
    run = run_in_comfyui(comfy_path, SCRIPT, source, *converted, json.dumps(config), result)
    return run.stdout + run.stderr, load_file(result)


def test_stock_clip_and_ours_condition_alike(done):
    log, out = done
    assert "Mochi reads 256; cut off" in log
    for kind, valid in (("text", None), ("empty", 0), ("long", 256), ("huge", 256)):
        ours, theirs = out[f"0 ours {kind}"], out[f"0 stock {kind}"]
        assert ours.shape == (1, 256, TEXT_WIDTH)
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(out[f"0 ours {kind} mask"], out[f"0 stock {kind} mask"])
        if valid is not None:
            assert out[f"0 ours {kind} mask"].sum() == valid
    assert not out["0 ours empty"].any()
    assert torch.equal(out["0 ours huge"], out["0 ours long"])


def test_what_a_prompt_has_too_much_is_told_in_a_line(done):
    log, _ = done
    warnings = [line for line in log.splitlines() if "cut off" in line]
    assert len(warnings) == 4  # two prompts, two CLIPs
    assert max(map(len, warnings)) < 300
    assert sum("w199" in line for line in warnings) == sum("w199999" in line for line in warnings) + 2 == 4
    assert "indexing errors" not in log
    assert log.count("The prompt has half of a character, U+D83D, at position 7;") == 2 * (1 + len(CONVERTED))


@pytest.mark.parametrize("dtype", CONVERTED)
def test_stock_clip_loads_what_convert_writes(done, dtype):
    log, out = done
    number = CONVERTED.index(dtype) + 1
    torch.testing.assert_close(out[f"{number} ours text"], out[f"{number} stock text"])
    # Float32 represents the file's values exactly.
    assert torch.equal(out[f"{number} stock text"], out["0 stock text"]) == (dtype == "fp32")
    assert "missing" not in log.replace("clip missing: ['logit_scale']", "")
    assert "unexpected" not in log


MERGES = """
import json
from comfy_extras.nodes_model_merging import CLIPMergeSimple
from pack.nodes.bridge.text import encode_prompt, load_clip

encode = lambda clip: encode_prompt(clip, "a kite")[0][0]
difference = lambda one, other: ((one - other).norm() / other.norm()).item()
plain, *quantised = map(load_clip, arguments)
found = []
for second in quantised:
    for clips in ((plain, second), (second, plain)):
        alone = [encode(clip) for clip in clips]
        for ratio in (0.0, 0.5, 1.0):
            (merged,) = CLIPMergeSimple().merge(*clips, ratio)
            made = encode(merged)
            found.append([ratio, *(difference(made, one) for one in alone), difference(*alone)])
        assert all(difference(encode(clip), one) < 1e-5 for clip, one in zip(clips, alone)), "a merge is a copy"
print(json.dumps(found))
"""
QUANTISED = ("int8", "Q8_0 in safetensors")


def test_merges_with_a_quantised_t5(comfy_path, tmp_path):
    """All of the first, all of the second, or a mix, according to the node's ratio.

    If the first is quantised, the result is quantised too, which the many layers amplify.
    """
    save_file(random_t5(), plain := tmp_path / "plain.safetensors")
    paths = [tmp_path / f"{form}.safetensors" for form in QUANTISED]
    for form, path in zip(QUANTISED, paths, strict=True):
        SAFETENSORS[form](random_t5(seed=1), path)
    found = json.loads(run_in_comfyui(comfy_path, MERGES, plain, *paths).stdout.splitlines()[-1])
    assert len(found) == 2 * 3 * len(QUANTISED)
    for i, (ratio, from_first, from_second, apart) in enumerate(found):
        same = 1e-4 if i // 3 % 2 == 0 else 0.25
        assert (from_first < same * apart) == (ratio == 1)
        assert (from_second < same * apart) == (ratio == 0)
        assert 1 < max(from_first, from_second) < 1.5
