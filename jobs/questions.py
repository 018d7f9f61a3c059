"""What an evaluation asks of adapters in one Ray task, and what comes back. No torch."""

from dataclasses import dataclass

from cluster.models import ModelConfig
from cluster.place import ClusterConfig
from cluster.records import AdapterRecord, BaseModelRef
from cluster.store import Store
from jobs.formats import Example

Group = tuple[int, ...]
"""Questions, by their place in the list."""


@dataclass(frozen=True)
class Question:
    """What is asked, and where it stands."""

    place: str
    example: Example


@dataclass(frozen=True)
class Task:
    """What one Ray task is to find out: of each adapter the loss on `dataset`, and answers to some of the questions.

    An adapter's questions come in groups, which share no batch: so two adapters that are asked the same are asked it in
    the same batches, and rounding makes no difference between them that is not theirs.
    """

    model: ModelConfig
    base: BaseModelRef
    adapters: tuple[tuple[AdapterRecord, tuple[Group, ...]], ...]
    questions: tuple[Question, ...]
    dataset: str | None
    sequence_length: int
    max_tokens: int
    batch: int
    cluster: ClusterConfig
    store: Store
    secrets: dict[str, str]


@dataclass(frozen=True)
class Answers:
    """What one adapter gave: an answer to each question that it was asked, by its place, and its loss on so many
    samples."""

    texts: dict[int, str]
    cut_off: int
    loss: float | None
    samples: int
