"""The peer: the same fine-tuning by TRL's SFTTrainer. Run by TRL's own environment; imports nothing of Luthier.

    .venv-trl/bin/python scripts/benchmarks/peers/trl_train.py --model FOLDER --samples FILE --settings JSON --out FILE

TRL's defaults are for a GPU that is short of memory. What is set otherwise, each because it is faster here:

    gradient_checkpointing   off: recomputing the forward pass costs a third
    bf16                     off: all contestants compute in fp32
    logging, saving, tqdm    off
    packing                  `bfd`, whose padding-free rows keep samples apart by their positions
    batch                    `micro_batch` packs at a time, accumulated to the step's: SFTTrainer makes one row of them,
                             whose mask is dense, so that on a CPU one pack at a time is the fastest
    attention                sdpa: what transformers has for a CPU; from the positions it makes a block-diagonal mask
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]


class Clock(TrainerCallback):  # type: ignore[misc]
    """Processor and wall time from the end of one step to the end of the next, as one reads a clock at laps."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._lap()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._lap()

    def _lap(self) -> None:
        self.laps.append((time.process_time(), time.perf_counter()))


class CountingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that remembers the loss and the tokens (there is no padding in padding-free rows) of each step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        count = inputs["input_ids"].numel()
        loss: torch.Tensor = super().training_step(model, inputs, *arguments, **named)
        self.tokens.append(count)
        self.losses.append(loss.item())
        return loss


def train(model_folder: Path, samples: list[dict[str, list[Any]]], settings: dict[str, Any]) -> list[dict[str, float]]:
    """One record a step: loss, tokens, processor seconds, wall seconds."""
    torch.set_num_threads(1)
    rows = [
        {
            "input_ids": sample["input_ids"],
            "labels": [
                token if mark else -100 for token, mark in zip(sample["input_ids"], sample["supervised"], strict=True)
            ],
        }
        for sample in samples
    ]
    micro_batch = settings["micro_batch"]
    accumulation = settings["global_batch"] // micro_batch
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=settings["sequence_length"],
            packing=True,
            packing_strategy="bfd",
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=settings["clip_norm"],
            optim="adamw_torch_fused",
            seed=settings["seed"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        )
        clock = Clock()
        trainer = CountingTrainer(
            model=str(model_folder),
            args=config,
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear"
            ),
            callbacks=[clock],
        )
        trainer.train()
    return [
        {
            "loss": sum(trainer.losses[step * accumulation : (step + 1) * accumulation]),
            "tokens": sum(trainer.tokens[step * accumulation : (step + 1) * accumulation]),
            "cpu_s": clock.laps[step + 1][0] - clock.laps[step][0],
            "wall_s": clock.laps[step + 1][1] - clock.laps[step][1],
        }
        for step in range(settings["steps"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "samples", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    given = parser.parse_args()
    records = train(given.model, json.loads(given.samples.read_text()), given.settings)
    given.out.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
