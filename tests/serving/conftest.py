"""Tiny real models, adapters and a tokenizer for the serving tests, and what peft and `generate` say about them.

Everything is random but seeded. The weights are drawn wide (standard deviation 0.2), so that the tiny models say
something different for every prompt and adapter and the best token stands clear of the second.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import ray
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from serving.engine.adapter import read_adapter
from serving.engine.core import EngineCore
from serving.engine.native import NativeOptions, load_core
from serving.engine.protocol import GenerationRequest, SamplingParams, TokenEvent

NEAR_TIE = 1e-3  # logits closer than this may swap with the order of a sum

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog. Naïve café, 東京 and 😀 emoji.",
    "What is the capital of France? The capital of France is Paris.",
    "Sort the numbers 3 1 2 and answer with 1 2 3. Translate: hello, world!",
)
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """peft 0.21 reads a property that transformers 5.23 renames; nothing here can avoid it."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 384 tokens with a chat template; <|end|> ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = _TEMPLATE
    return wrapped


def make_config(architecture: str, **changes: Any) -> Any:
    """A two- to four-layer config: grouped-query attention, and sliding windows much shorter than the prompts."""
    shape = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **changes,
    }
    mixed = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    gemma = {**shape, **mixed, "sliding_window": 7, "query_pre_attn_scalar": 10}
    if architecture == "llama":
        return LlamaConfig(**{**shape, "head_dim": 8, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True)
    if architecture == "qwen3":
        return Qwen3Config(**{**shape, "tie_word_embeddings": True})
    if architecture == "qwen3_moe":
        return Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    if architecture == "mistral":
        return MistralConfig(**shape, sliding_window=9)
    if architecture == "gemma2":
        return Gemma2Config(
            **gemma, attn_logit_softcapping=2.0, final_logit_softcapping=5.0, attn_implementation="eager"
        )
    if architecture == "gemma3":
        return Gemma3TextConfig(**gemma)
    assert architecture == "gemma3_multimodal"
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=gemma, vision_config=vision, mm_tokens_per_image=1, image_token_index=383)


@dataclass(frozen=True, eq=False)
class LoraRecipe:
    """A random adapter; every field reaches peft's LoraConfig."""

    seed: int
    r: int = 4
    alpha: int = 8
    targets: tuple[str, ...] | str = ("q_proj", "v_proj")
    extra: tuple[tuple[str, Any], ...] = ()


# Differing ranks, targets and scalings; the last is given as a pattern, with another rank and alpha for some modules.
RECIPES = (
    LoraRecipe(1),
    LoraRecipe(2, r=2, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    LoraRecipe(3, r=8, alpha=6, targets=("down_proj", "o_proj"), extra=(("use_rslora", True),)),
    LoraRecipe(4, r=3, targets=r".*layers\.1\..*(gate_proj|v_proj)"),
    LoraRecipe(
        5,
        r=4,
        targets=("k_proj", "up_proj"),
        extra=(("rank_pattern", {"up_proj": 6}), ("alpha_pattern", {"layers.0.self_attn.k_proj": 20})),
    ),
)


# The same with DoRA: on every linear layer, and on a few, scaled by √r; of about one rank, so that they share a shelf.
DORAS = (
    LoraRecipe(
        6,
        r=6,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        extra=(("use_dora", True),),
    ),
    LoraRecipe(
        7,
        r=3,
        alpha=5,
        targets=("v_proj", "up_proj"),
        extra=(("use_dora", True), ("use_rslora", True), ("rank_pattern", {"v_proj": 5})),
    ),
)


@dataclass(frozen=True)
class Expected:
    """What `generate` answers greedily, and by how much each token beat the second best."""

    tokens: list[int]
    margins: list[float]

    def first(self, count: int) -> "Expected":
        """What `generate` would have answered with at most `count` tokens."""
        return Expected(self.tokens[:count], self.margins[:count])

    def check(self, tokens: Sequence[int]) -> None:
        """`tokens` are these, or leave them only at a near tie (after which nothing can be said)."""
        for place, (ours, theirs, margin) in enumerate(zip(tokens, self.tokens, self.margins, strict=False)):
            if ours != theirs:
                assert margin < NEAR_TIE, f"token {place} is {ours}, generate says {theirs} by a margin of {margin}"
                return
        assert len(tokens) == len(self.tokens), f"{len(tokens)} tokens, generate gives {len(self.tokens)}"


class TinyModel:
    """A base model folder with its adapters, and peft's answers for them."""

    def __init__(self, root: Path, architecture: str, **changes: Any) -> None:
        self.architecture = architecture
        self.folder = root / architecture
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(make_config(architecture, **changes), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
        model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
        model.save_pretrained(self.folder)
        make_tokenizer().save_pretrained(self.folder)
        self._root = root
        self._adapters: dict[LoraRecipe, Path] = {}
        self._references: dict[LoraRecipe | None, Any] = {}
        self._expected: dict[tuple[LoraRecipe | None, tuple[int, ...], int], Expected] = {}

    def load(self) -> Any:
        """The base model by transformers alone."""
        attention = "eager" if self.architecture == "gemma2" else "sdpa"
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation=attention
        ).eval()

    def adapter(self, recipe: LoraRecipe) -> Path:
        """The folder of a random adapter, made by peft."""
        if recipe not in self._adapters:
            torch.manual_seed(recipe.seed)
            extra = dict(recipe.extra)
            targets = recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets)
            if self.architecture == "gemma3_multimodal":
                names = recipe.targets if isinstance(recipe.targets, str) else f".*({'|'.join(recipe.targets)})"
                targets = f".*language_model{names}"
            config = LoraConfig(
                r=recipe.r,
                lora_alpha=recipe.alpha,
                target_modules=targets,
                task_type="CAUSAL_LM",
                init_lora_weights=False,
                **extra,
            )
            model = get_peft_model(self.load(), config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_magnitude" in name:
                        parameter.mul_(torch.empty_like(parameter).uniform_(0.4, 1.6))
                    elif "lora_" in name:
                        parameter.normal_(0, 0.3)
            name = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
            self._adapters[recipe] = self._root / f"{self.architecture}-adapters" / name
            model.save_pretrained(self._adapters[recipe])
        return self._adapters[recipe]

    def prompt(self, seed: int, length: int) -> list[int]:
        """A random prompt without special tokens."""
        return torch.randint(5, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()

    def digest(self, recipe: LoraRecipe | None) -> str | None:
        """A stable digest for an adapter; None for the base."""
        return None if recipe is None else f"sha256:{self.adapter(recipe).name}"

    def reference(self, recipe: LoraRecipe | None) -> Any:
        """peft's model with that adapter alone, or the bare base."""
        if recipe not in self._references:
            base = self.load()
            folder = recipe and self.adapter(recipe)
            self._references[recipe] = base if folder is None else PeftModel.from_pretrained(base, folder).eval()
        return self._references[recipe]

    def expected(self, recipe: LoraRecipe | None, prompt: Sequence[int], max_tokens: int) -> Expected:
        """The greedy answer of peft (or of the bare base) alone, by `generate`."""
        key = (recipe, tuple(prompt), max_tokens)
        if key not in self._expected:
            with torch.inference_mode():
                output = self.reference(recipe).generate(
                    input_ids=torch.tensor([list(prompt)]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            best = [logits[0].topk(2).values for logits in output.logits]
            self._expected[key] = Expected(
                output.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best]
            )
        return self._expected[key]


class CoreDriver:
    """Steps an EngineCore by hand and collects what each request gets."""

    def __init__(self, model: TinyModel, options: NativeOptions) -> None:
        self.model = model
        self.core: EngineCore = load_core(model.folder, options)
        self.events: dict[str, list[TokenEvent]] = {}

    def load(self, recipe: LoraRecipe) -> bool:
        digest = self.model.digest(recipe)
        assert digest is not None
        return self.load_folder(digest, self.model.adapter(recipe))

    def load_folder(self, digest: str, folder: Path) -> bool:
        return self.core.load(read_adapter(digest, folder, self.core.target))

    def add(self, id_: str, prompt: Sequence[int], adapter: str | None, params: SamplingParams) -> None:
        self.core.add(GenerationRequest(id_, list(prompt), adapter, params))
        self.events[id_] = []

    def step(self) -> None:
        for request_id, event in self.core.step():
            self.events[request_id].append(event)

    def run(self) -> None:
        """Step until nothing is left; every request must end within the steps that its tokens need."""
        for _ in range(10_000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the core does not come to an end")

    def tokens(self, id_: str) -> list[int]:
        return [event.token_id for event in self.events[id_] if event.token_id is not None]

    def text(self, id_: str) -> str:
        return "".join(event.text for event in self.events[id_])

    def finish(self, id_: str) -> str | None:
        """The finish reason; every request has exactly one, on its last event."""
        reasons = [event.finish_reason for event in self.events[id_]]
        assert reasons, f"{id_} got no event"
        assert reasons[-1] is not None, f"{id_} did not end"
        assert not any(reasons[:-1]), f"{id_} went on after its end"
        return reasons[-1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """`tiny("qwen3")` is that architecture's tiny model, made once a session."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, TinyModel] = {}

    def get(architecture: str) -> TinyModel:
        if architecture not in made:
            made[architecture] = TinyModel(root, architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A private Ray on this machine; tests/conftest.py has set token authentication."""
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).parents[2])
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1"
        )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def recipes() -> tuple[LoraRecipe, ...]:
    """Five adapters that differ in rank, targets and scaling."""
    return RECIPES


@pytest.fixture(scope="session")
def every_recipe() -> tuple[LoraRecipe, ...]:
    """Those five, and two of DoRA."""
    return RECIPES + DORAS


@pytest.fixture(scope="session")
def drive() -> Callable[..., CoreDriver]:
    """`drive(model, kv_tokens=…)` is a core with small default limits, so that chunking and waiting really happen."""

    def make(model: TinyModel, **changes: Any) -> CoreDriver:
        limits = {"kv_tokens": 2048, "block_tokens": 4, "max_batch_tokens": 48, "max_running": 12}
        return CoreDriver(model, NativeOptions(**{**limits, **changes}))

    return make
