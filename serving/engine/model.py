"""The base model on its device, and the one forward pass that serves all running requests at once.

The only file that touches transformers' model classes. A folder is loaded with AutoModelForCausalLM, its attention set
to ours (attention.py) and its decoder's linear layers replaced (lora.py, and quantized.py beneath it if asked for);
everything else, from rotary tables to normalisation, is the model's own code, which is why the tokens are those of
`generate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluster.catalogue.remote_code import NO_CODE
from cluster.errors import ModelError
from serving.engine import attention, quantized
from serving.engine.adapter import Target
from serving.engine.kv import BlockAllocator, KvPool
from serving.engine.lora import LoraTable, RowRun, install
from serving.engine.protocol import Quantization
from serving.engine.scheduler import Chunk, Sequence

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# These recompute the rotary table from the longest position of the *batch*, so one request would change another.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True)
class ModelFacts:
    """What the engine must know of a model."""

    vocabulary: int
    max_sequence_tokens: int
    eos_ids: frozenset[int]


class PackedModel:
    """A causal language model that runs packed rows over a paged pool with mixed adapters."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        quantization: Quantization | None,
        device: str,
        allocator: BlockAllocator,
        table: LoraTable,
        max_rank: int,
    ) -> None:
        """Load the folder. Raises ModelError when it is no causal model, or one that the engine cannot serve so."""
        if dtype not in _DTYPES:
            raise ModelError(f"dtype is {dtype!r}; write one of {', '.join(_DTYPES)}")
        attention.register()
        try:
            self._model = _load(folder, _DTYPES[dtype], quantization, device)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
        layers, prefix = _layers(self._model)
        if quantization is not None:
            quantized.replace(layers)
        self._model.to(device).eval().requires_grad_(False)
        self.weight_bytes = sum(each.nbytes for each in (*self._model.parameters(), *self._model.buffers()))
        self.device = torch.device(device)
        self.facts = self._read_facts(folder)
        self.table = table
        self.pool = KvPool(allocator)
        self.target = Target(install(layers, prefix, table), max_rank, _DTYPES[dtype], self.device)
        self._slots: WeakKeyDictionary[Sequence, torch.Tensor] = WeakKeyDictionary()  # gone with the sequence
        self._probe(folder)

    def forward(self, chunks: list[Chunk]) -> torch.Tensor:
        """Run the chunks (single tokens first) and return the logits, float32 [chunks that sample, vocabulary].

        Writes the chunks' keys and values into the pool; the sequences must hold their blocks.
        """
        spans, row = [], 0
        for chunk in chunks:
            spans.append(attention.Span(row, chunk.start, chunk.end, self._slots_of(chunk.sequence)))
            row += chunk.num_tokens
        runs = [RowRun(each.sequence.request.adapter, each.num_tokens) for each in chunks]
        self.table.assign(runs, self.device, self.target.dtype)
        ids = [token for each in chunks for token in each.sequence.tokens[each.start : each.end]]
        positions = [position for each in chunks for position in range(each.start, each.end)]
        last_rows = [span.row + span.num_rows - 1 for span, each in zip(spans, chunks, strict=True) if each.samples]
        return self._run(ids, positions, last_rows, attention.PackedRows(self.pool, spans))

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token as it is, special or not."""
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _slots_of(self, sequence: Sequence) -> torch.Tensor:
        if sequence not in self._slots:
            self._slots[sequence] = self.pool.slots(sequence.blocks, self.device)
        return self._slots[sequence]

    @torch.inference_mode()
    def _run(
        self, ids: list[int], positions: list[int], last_rows: list[int], packed: attention.PackedRows
    ) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.int64, device=self.device),
            packed=packed,
        )
        logits = output.logits[0]
        assert isinstance(logits, torch.Tensor)
        return logits.float()

    def _probe(self, folder: Path) -> None:
        """One row through the model, into the null block: makes the pool's tensors, finds what is unsupported."""
        null_slot = torch.zeros(1, dtype=torch.int64, device=self.device)
        packed = attention.PackedRows(self.pool, [attention.Span(0, 0, 1, null_slot)])
        try:
            self._run([0], [0], [0], packed)
        except (TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{folder}: {type(self._model).__name__} does not run on the native engine: {error}"
            ) from error
        num_layers = int(self._model.config.get_text_config().num_hidden_layers)
        if self.pool.num_layers != num_layers:
            raise ModelError(
                f"{folder}: {self.pool.num_layers} of {num_layers} layers of {type(self._model).__name__} use the "
                "engine's attention; the native engine needs all"
            )
        self.pool.clear_null_block()

    def _read_facts(self, folder: Path) -> ModelFacts:
        config = self._model.config.get_text_config()
        unknown = set(config.to_dict().get("layer_types") or ()) - _LAYER_TYPES
        if unknown:
            raise ModelError(
                f"{folder}: layers of type {', '.join(sorted(unknown))} are not served by the native engine"
            )
        ropes = config.rope_parameters or {}
        kinds = {str(each.get("rope_type")) for each in (ropes, *ropes.values()) if isinstance(each, dict)}
        if kinds & _BATCH_DEPENDENT_ROPE:
            raise ModelError(
                f"{folder}: rope_type {', '.join(sorted(kinds & _BATCH_DEPENDENT_ROPE))} depends on the longest "
                "request of a batch; the native engine does not serve it"
            )
        eos = self._model.generation_config.eos_token_id
        eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
        if self.tokenizer.eos_token_id is not None:
            eos_ids.add(self.tokenizer.eos_token_id)
        return ModelFacts(int(config.vocab_size), int(config.max_position_embeddings), frozenset(eos_ids))


def _load(folder: Path, dtype: torch.dtype, quantization: Quantization | None, device: str) -> Any:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        raise ModelError(
            f"{folder} is stored quantised ({stored['quant_method']}), and the native engine could put no adapter on "
            "that; take the model in full precision, with engine.quantization int8 or nf4"
        )
    more = {}
    if quantization is not None:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        more = quantized.loading(skeleton, _layers(skeleton)[1], quantization, device)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention.NAME,
        local_files_only=True,
        use_safetensors=True,
        **NO_CODE,
        **more,
    )


def _layers(model: Any) -> tuple[nn.Module, str]:
    """The decoder's layers, and their path in the whole model."""
    layers = model.get_decoder().layers
    return layers, next(name for name, module in model.named_modules() if module is layers)
