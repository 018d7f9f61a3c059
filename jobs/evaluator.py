"""What versions answer and how well they predict: a base with adapters in memory. One Ray task, and torch.

The base is loaded once, with every adapter on top. The loss is computed as training does, on packed rows; answers are
greedy, whatever the model's own generation settings are, in batches padded on the left.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from jinja2 import TemplateError
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cluster import keys, models, records, secret
from cluster.errors import DataError
from cluster.models import read_shape
from jobs.dataset import Dataset
from jobs.formats import Message, Text
from jobs.kernels import summed_cross_entropy
from jobs.model import load_model, load_tokenizer
from jobs.objectives import pack_row, supervised_logits
from jobs.packing import SampleSchedule
from jobs.questions import Answers, Question, Task


def evaluate(task: Task) -> list[Answers]:
    """What each adapter of the task gives, in their order. Raises DataError, ModelError, StoreError."""
    secret.load(task.secrets)
    torch.set_num_threads(task.cluster.cpus_per_worker)
    transformers.utils.logging.disable_progress_bar()
    folder = models.fetch(task.model, task.base, task.store)
    tokenizer = load_tokenizer(folder)
    longest = read_shape(folder).max_position_embeddings
    encoded = encode(tokenizer, task.questions, longest - task.max_tokens)  # what cannot be asked, before a load
    dataset = Dataset.fetch(task.store, task.dataset) if task.dataset else None
    device = torch.device("cuda" if task.cluster.accelerator == "gpu" else "cpu")
    base = load_model(folder, task.model.dtype)
    model = _with_adapters(base, task).to(device).eval()
    losses: list[float | None] = []
    for record, _ in task.adapters:
        model.set_adapter(_name(record.version))
        losses.append(_loss(model, dataset, task.sequence_length, device) if dataset else None)
    base.set_attn_implementation("sdpa")  # ours is for packed rows, and knows no padding
    base.config.use_cache = True
    base.generation_config = _greedy(base, tokenizer, task.max_tokens)
    found = []
    for (record, groups), loss in zip(task.adapters, losses, strict=True):
        model.set_adapter(_name(record.version))
        texts: dict[int, str] = {}
        cut_off = 0
        for group in groups:
            made, cut = answer(model, tokenizer, [encoded[index] for index in group], task.batch, device)
            texts |= zip(group, made, strict=True)
            cut_off += cut
        found.append(Answers(texts, cut_off, loss, len(dataset) if dataset else 0))
    return found


def _name(version: int) -> str:
    return f"v{version}"


def _with_adapters(base: PreTrainedModel, task: Task) -> PeftModel:
    model: PeftModel | None = None
    with TemporaryDirectory() as temporary:
        for record, _ in task.adapters:
            folder = Path(temporary) / _name(record.version)
            prefix = keys.adapter_version_prefix(record.name, record.version)
            records.fetch_files(task.store, prefix, record.files, folder)
            name = _name(record.version)
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
    assert model is not None
    return model


@torch.no_grad()
def _loss(model: PeftModel, dataset: Dataset, sequence_length: int, device: torch.device) -> float:
    """Mean cross-entropy per supervised token of a dataset, in nats; as the trainer measures it, on one rank."""
    schedule = SampleSchedule(dataset.lengths, 0, sequence_length)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for step in range(schedule.steps_per_epoch):
        (samples,) = schedule.batch(step)
        row = pack_row(dataset, samples).to(device)
        total += summed_cross_entropy(supervised_logits(model, row), row.targets)
    return float(total.item() / dataset.supervised_counts.sum())


def encode(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], longest: int) -> list[list[int]]:
    """Token ids of each question, as a server has them: through the chat template, with the answer's turn opened; of
    text without turns as it is. Raises DataError with every place that has none."""
    found: list[list[int]] = []
    faults: list[str] = []
    for question in questions:
        try:
            found.append(_encoded(tokenizer, question))
        except (TemplateError, TypeError, ValueError, KeyError) as error:  # templates raise what Python has
            faults.append(f"{question.place}: the chat template refuses it: {error}")
            continue
        if not 0 < len(found[-1]) <= longest:
            fit = f"with evaluation.max_tokens {longest:,} fit"
            faults.append(f"{question.place}: {len(found[-1]):,} tokens, and {fit}")
    if faults:
        raise DataError("\n  ".join(["prompts that this model cannot be asked:", *faults[:5]]))
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, question: Question) -> list[int]:
    if isinstance(question.example, Text):
        return list(tokenizer(question.example.prompt)["input_ids"])
    tools = [dict(tool) for tool in question.example.tools] or None
    turns = [turn_of(message) for message in question.example.messages[:-1]]
    text = tokenizer.apply_chat_template(turns, tools=tools, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def turn_of(message: Message) -> dict[str, object]:
    """A turn as clients send it. A control token in it is left as it is: to be asked so is what is tested, perhaps."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    optional = {"tool_calls": calls, "tool_call_id": message.tool_call_id, "name": message.name}
    return {"role": message.role, "content": message.content} | {key: value for key, value in optional.items() if value}


def _greedy(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> GenerationConfig:
    """The likeliest token each time, until a token that ends a turn; none of the model's own penalties."""
    given = base.generation_config.eos_token_id if base.generation_config else None
    ends = {given} if isinstance(given, int) else set(given or ())
    ends.add(tokenizer.eos_token_id)
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )


@torch.no_grad()
def answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], batch: int, device: torch.device
) -> tuple[list[str], int]:
    """A greedy answer to each prompt, and how many had no end within the tokens that an answer may have."""
    texts = [""] * len(prompts)
    settings = model.get_base_model().generation_config
    ends, pad = set(settings.eos_token_id), settings.pad_token_id
    cut_off = 0
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # the one that needs most is first
    for first in range(0, len(prompts), batch):
        chosen = by_length[first : first + batch]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.tensor([[pad] * (width - len(prompts[index])) + prompts[index] for index in chosen])
        mask = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen])
        made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))[:, width:].tolist()
        for index, tokens in zip(chosen, made, strict=True):
            end = next((at for at, token in enumerate(tokens) if token in ends), None)
            cut_off += end is None
            texts[index] = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return texts, cut_off
