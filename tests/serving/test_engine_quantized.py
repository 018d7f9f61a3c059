"""A quantised base: peft's answers on the same one, what its weights stand for, and the memory that they take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import Qwen3Config

from cluster.errors import ModelError
from serving.engine.kv import BlockAllocator
from serving.engine.lora import LoraTable
from serving.engine.model import PackedModel
from serving.engine.native import NativeOptions, load_core
from serving.engine.protocol import GenerationRequest, Quantization, SamplingParams
from serving.engine.quantized import Nf4Linear, QuantizedLinear, replace
from serving.engine.scheduler import Limits, Scheduler, Sequence
from tests.serving.conftest import make_config, make_tokenizer
from tests.serving.quantized import QuantizedTiny

if TYPE_CHECKING:
    from tests.serving.conftest import CoreDriver, LoraRecipe, TinyModel

    Tiny = Callable[[str], TinyModel]
    Drive = Callable[..., CoreDriver]

ROOT = Path(__file__).parents[2]
KINDS: tuple[Quantization, ...] = ("int8", "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3_multimodal"])
def test_mixed_adapters_on_a_quantised_base_answer_as_peft_does(
    architecture: str, kind: Quantization, tmp_path: Path, drive: Drive, recipes: tuple[LoraRecipe, ...]
) -> None:
    model = QuantizedTiny(tmp_path, architecture, kind)
    driver = drive(model, quantization=kind)
    plain = tuple(recipe for recipe in recipes if ("use_dora", True) not in recipe.extra)
    for recipe in plain:
        driver.load(recipe)
    choices = (None, *plain)
    wanted: dict[str, tuple[LoraRecipe | None, list[int]]] = {}
    # From one token to longer than a step; arrivals one step apart, so that prefill meets decode.
    for index, length in enumerate((1, 5, 60, 33, 2, 110, 17)):
        recipe, prompt = choices[index % len(choices)], model.prompt(index, length)
        wanted[str(index)] = (recipe, prompt)
        driver.add(str(index), prompt, model.digest(recipe), SamplingParams(max_tokens=12, temperature=0))
        driver.step()
    driver.run()
    for id_, (asked, prompt) in wanted.items():
        model.expected(asked, prompt, 12).check(driver.tokens(id_))
    assert driver.core.stats().max_adapters_in_step >= 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.05), ("nf4", 0.5)])
def test_the_logits_stay_near_those_of_full_precision(kind: Quantization, most: float, dtype: str, tiny: Tiny) -> None:
    """Their error over their spread. A wrong scale, an order of levels or a shifted block would make it 1 or more."""
    folder, prompts = tiny("llama").folder, [tiny("llama").prompt(seed, 40) for seed in range(8)]
    exact = logits(folder, prompts, "float32", None)
    error = float((logits(folder, prompts, dtype, kind) - exact).std() / exact.std())
    print(f"{kind} {dtype}: {error:.4f}")
    assert 0 < error < most


def logits(folder: Path, prompts: list[list[int]], dtype: str, kind: Quantization | None) -> torch.Tensor:
    """What the engine makes of each prompt's end, [prompts, vocabulary], all prompts in one step."""
    allocator = BlockAllocator(256, 4)
    model = PackedModel(
        folder,
        dtype=dtype,
        quantization=kind,
        device="cpu",
        allocator=allocator,
        table=LoraTable(1),
        max_rank=8,
    )
    scheduler = Scheduler(Limits(512, 64, 64, 512, True), allocator)
    for index, prompt in enumerate(prompts):
        request = GenerationRequest(str(index), prompt, None, SamplingParams(max_tokens=1))
        scheduler.add(Sequence(request, weights=""))
    return model.forward(scheduler.plan())


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    outputs=st.integers(1, 1500),
    inputs=st.one_of(st.integers(1, 700), st.integers(1, 20).map(lambda each: 32 * each)),
    rows=st.integers(1, 5),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_layer_multiplies_with_what_its_weights_stand_for(
    kind: Quantization, outputs: int, inputs: int, rows: int, has_bias: bool, seed: int
) -> None:
    """Whatever the sizes: pieces and blocks need not fit them. A row is not changed by a large one beside it."""
    torch.manual_seed(seed)
    plain, x = nn.Linear(inputs, outputs, bias=has_bias).double(), torch.randn(1, rows, inputs)
    theirs = quantize(plain, kind)
    weight = restored(theirs)
    plain.weight.data = weight
    layers = nn.Sequential(theirs)
    replace(layers)
    ours = layers[0]
    assert isinstance(ours, QuantizedLinear)
    with torch.inference_mode():
        wanted = plain(x.double()).float()
        made = ours(x)
        crowded = ours(torch.cat([x, 1e4 * torch.randn(1, 2, inputs)], 1))[:, :rows]
        assert made.is_contiguous()
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(crowded, wanted, rtol=1e-4, atol=1e-4)
        if isinstance(ours, Nf4Linear) and inputs % 64 == 0:  # else bitsandbytes 0.50 is wrong on a CPU
            torch.testing.assert_close(ours.at_once(x), wanted, rtol=1e-4, atol=1e-4)


def restored(layer: Any) -> torch.Tensor:
    """What the weight of a library's layer stands for, by the formats' definitions, in double precision."""
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return layer.weight.CB.double() * (layer.weight.SCB.double() / 127)[:, None]
    state, packed = layer.weight.quant_state, layer.weight.data.view(-1)
    values = get_4bit_type("nf4", "cpu")[torch.stack([packed >> 4, packed & 15], 1).long()].view(-1)
    largest = dequantize_blockwise(state.absmax, state.state2) + state.offset
    count = state.shape[0] * state.shape[1]
    return (values[:count] * largest.repeat_interleave(64)[:count]).double().view(state.shape)


def quantize(layer: nn.Linear, kind: Quantization) -> nn.Module:
    """The library's layer with these weights."""
    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight = layer.weight.data.float()
    if kind == "int8":
        theirs = bitsandbytes.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=0.0)
        theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        theirs = bitsandbytes.nn.Linear4bit(*sizes, bias, quant_type="nf4")
        theirs.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if bias:
        theirs.bias = nn.Parameter(layer.bias.data.float())
    return theirs.to("cpu").requires_grad_(False)


def test_the_base_takes_the_bytes_of_its_format(tiny: Tiny) -> None:
    """Counted from the shapes; embeddings, norms and lm_head are as they were."""
    folder = tiny("llama").folder
    shapes = load_core(folder, NativeOptions()).target.shapes.values()
    full = sum(4 * outputs * inputs for outputs, inputs in shapes)
    int8 = sum(outputs * inputs + 4 * outputs for outputs, inputs in shapes)
    blocks = [-(outputs * inputs // -64) for outputs, inputs in shapes]
    nf4 = sum(32 * each + each + 4 * -(each // -256) + 4 * 256 + 4 for each in blocks)
    held = {kind: load_core(folder, NativeOptions(quantization=kind)).stats().weight_bytes for kind in (None, *KINDS)}
    assert held[None] - held["int8"] == full - int8
    assert held[None] - held["nf4"] == full - nf4


_LOAD = """
import resource, sys
from pathlib import Path
from serving.engine.native import NativeOptions, load_core
from serving.engine.quantized import _library
_library()
kind, room = sys.argv[2] or None, int(sys.argv[3])
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
core = load_core(Path(sys.argv[1]), NativeOptions(quantization=kind, num_threads=1, kv_tokens=64))
print(core.stats().weight_bytes)
"""


def test_loading_never_holds_the_whole_base_in_full_precision(tmp_path: Path) -> None:
    """In a process that may allocate half of that, beside the mapped files: 101 million parameters, 202 MB in bfloat16
    on disk, 404 MB as float32."""
    config = make_config(
        "qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
    )
    assert isinstance(config, Qwen3Config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    make_tokenizer().save_pretrained(tmp_path)
    full = 4 * sum(each.numel() for each in model.parameters())
    room = full // 2 + sum(each.stat().st_size for each in tmp_path.glob("*.safetensors"))
    del model

    def load(kind: str) -> subprocess.CompletedProcess[str]:
        # glibc keeps what is freed in pieces below this size, and asks for more.
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", _LOAD, str(tmp_path), kind, str(room)],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )

    assert "Cannot allocate memory" in load("").stderr, "the limit does not limit"
    for kind, most in (("int8", 0.26), ("nf4", 0.14)):
        loaded = load(kind)
        assert loaded.returncode == 0, loaded.stderr[-2000:]
        assert int(loaded.stdout) < most * full


def test_what_would_stay_large_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.\w+ \(4, .* leave engine\.quantization out"):
        load_core(tiny("qwen3_moe").folder, NativeOptions(quantization="nf4"))


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_base_that_is_stored_quantised_is_refused(kind: Quantization | None, tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config | stored))
    with pytest.raises(ModelError, match=r"stored quantised \(gptq\).*take the model in full precision"):
        load_core(tmp_path, NativeOptions(quantization=kind))


def test_without_the_library_it_says_what_to_install(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"install luthier\[quantized\]"):
        load_core(tiny("llama").folder, NativeOptions(quantization="int8"))
    load_core(tiny("llama").folder, NativeOptions())
