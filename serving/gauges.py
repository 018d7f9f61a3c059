"""What a replica shows to Prometheus, as Ray metrics: its engine's counters, and the time that answers take."""

import time
from collections.abc import Sequence

from ray.util import metrics as ray_metrics

from cluster import metrics
from cluster.gauges import counter, gauge, histogram
from cluster.records import AdapterRecord
from serving.calls import ChoiceEvent
from serving.engine.protocol import EngineStats


class EngineGauges:
    """The metrics of one replica."""

    def __init__(self, model: str) -> None:
        self._labels = {"model": model}
        self._last = EngineStats()
        self._prompt_tokens = counter(metrics.PROMPT_TOKENS)
        self._shared_tokens = counter(metrics.SHARED_TOKENS)
        self._generated_tokens = counter(metrics.GENERATED_TOKENS)
        self._steps = counter(metrics.ENGINE_STEPS)
        self._mixed_steps = counter(metrics.MIXED_STEPS)
        self._loads = counter(metrics.ADAPTER_LOADS)
        self._batch_adapters = gauge(metrics.BATCH_ADAPTERS_MAX)
        self._adapters = gauge(metrics.ADAPTERS_LOADED)
        self._weight_bytes = gauge(metrics.WEIGHT_BYTES)
        self._kv_bytes = gauge(metrics.KV_BYTES)
        self._adapter_bytes = gauge(metrics.ADAPTER_BYTES)
        self._adapter_bytes_budget = gauge(metrics.ADAPTER_BYTES_BUDGET)
        self._running = gauge(metrics.RUNNING_SEQUENCES)
        self._waiting = gauge(metrics.WAITING_SEQUENCES)
        self._blocks_used = gauge(metrics.KV_BLOCKS_USED)
        self._blocks = gauge(metrics.KV_BLOCKS)

    def export(self, stats: EngineStats, adapter_bytes_budget: int | None) -> None:
        """Add what was counted since the last call, and show the state."""
        last, self._last = self._last, stats
        self._add(self._prompt_tokens, stats.prompt_tokens - last.prompt_tokens)
        self._add(self._shared_tokens, stats.shared_tokens - last.shared_tokens)
        self._add(self._generated_tokens, stats.generated_tokens - last.generated_tokens)
        self._add(self._steps, stats.steps - last.steps)
        self._add(self._mixed_steps, stats.mixed_steps - last.mixed_steps)
        self._add(self._loads, stats.adapter_loads - last.adapter_loads)
        self._batch_adapters.set(stats.max_adapters_in_step, self._labels)
        self._adapters.set(len(stats.adapters), self._labels)
        self._weight_bytes.set(stats.weight_bytes, self._labels)
        self._kv_bytes.set(stats.kv_bytes, self._labels)
        self._adapter_bytes.set(stats.adapter_bytes, self._labels)
        self._adapter_bytes_budget.set(adapter_bytes_budget or 0, self._labels)
        self._running.set(stats.running, self._labels)
        self._waiting.set(stats.waiting, self._labels)
        self._blocks_used.set(stats.kv_blocks_used, self._labels)
        self._blocks.set(stats.kv_blocks_total, self._labels)

    def _add(self, metric: ray_metrics.Counter, amount: int) -> None:
        if amount:  # Ray's counters refuse 0
            metric.inc(amount, self._labels)


class AnswerGauges:
    """How long one replica's answers take, and of how many tokens they are."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._first_token = histogram(metrics.FIRST_TOKEN_SECONDS)
        self._token = histogram(metrics.TOKEN_SECONDS)
        self._tokens = counter(metrics.ADAPTER_TOKENS)

    def export(self, answer: "AnswerClock") -> None:
        """Count an answer that has ended, whole or not."""
        labels = {"model": self._model}
        if answer.first_token_s is not None:
            self._first_token.observe(answer.first_token_s, labels)
        if answer.token_s is not None:
            self._token.observe(answer.token_s, labels)
        for kind, tokens in (("prompt", answer.prompt_tokens), ("answer", answer.tokens)):
            if tokens:
                self._tokens.inc(tokens, {**labels, "adapter": answer.adapter, "kind": kind})


class AnswerClock:
    """Measures one answer from now on, over all its choices."""

    def __init__(self, adapter: AdapterRecord | None) -> None:
        self.adapter = f"{adapter.name}@{adapter.version}" if adapter else ""
        self.prompt_tokens = 0
        self.tokens = 0
        self._began = self._first_at = self._last_at = time.monotonic()
        self._first_tokens = 0

    def saw(self, events: Sequence[ChoiceEvent]) -> None:
        """Some events have come."""
        tokens = sum(each.event.token_id is not None for each in events)
        if not tokens:
            return
        self._last_at = time.monotonic()
        if not self.tokens:
            self._first_at, self._first_tokens = self._last_at, tokens
        self.tokens += tokens

    @property
    def first_token_s(self) -> float | None:
        """Until the first token; None before there is one."""
        return self._first_at - self._began if self.tokens else None

    @property
    def token_s(self) -> float | None:
        """The mean time of each token that came after the first ones; None without any."""
        later = self.tokens - self._first_tokens
        return (self._last_at - self._first_at) / later if later else None
