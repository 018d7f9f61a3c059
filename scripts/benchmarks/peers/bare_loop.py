"""The floor to stand beside: supervised LoRA fine-tuning as one flat loop over torch and peft, with nothing around it.

    python -m scripts.benchmarks.peers.bare_loop --model FOLDER --batches FILE --settings JSON --out FILE

What an expert writes by hand for one process: samples laid end to end, with position ids from which transformers keeps
them apart in attention; logits at supervised positions alone; the fused AdamW. It reads ready batches of token ids, so
it spends nothing on data, and it knows nothing of Luthier.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

Sample = dict[str, list[Any]]


def train(model_folder: Path, batches: list[list[list[Sample]]], settings: dict[str, Any]) -> list[dict[str, float]]:
    """One record a step: loss, tokens, processor seconds, wall seconds.

    Args:
        batches: steps of packs of samples; a sample has `input_ids` and, as long, `supervised`.
    """
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(settings["seed"])
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear"
    )
    model = get_peft_model(model, config)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0, fused=True)
    records = []
    for batch in batches:
        began, cpu_began = time.perf_counter(), time.process_time()
        supervised = sum(sum(sample["supervised"]) for pack in batch for sample in pack)
        total, tokens = 0.0, 0
        for pack in batch:
            ids = torch.tensor([[token for sample in pack for token in sample["input_ids"]]])
            places = torch.cat([torch.arange(len(sample["input_ids"])) for sample in pack])[None]
            marks = torch.tensor(list(itertools.chain.from_iterable(sample["supervised"] for sample in pack)))
            targets = marks.nonzero()[:, 0]
            logits = model(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=targets - 1).logits[0]
            loss = F.cross_entropy(logits, ids[0, targets], reduction="sum") / supervised
            torch.autograd.backward(loss)
            total += loss.item()
            tokens += ids.numel()
        torch.nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        cpu_s, wall_s = time.process_time() - cpu_began, time.perf_counter() - began
        records.append({"loss": total, "tokens": tokens, "cpu_s": cpu_s, "wall_s": wall_s})
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "batches", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    given = parser.parse_args()
    records = train(given.model, json.loads(given.batches.read_text()), given.settings)
    given.out.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
