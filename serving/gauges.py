"""An engine's counters as Ray metrics, which every node's agent shows to Prometheus."""

from ray.util import metrics as ray_metrics

from cluster import metrics
from cluster.gauges import counter, gauge
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
