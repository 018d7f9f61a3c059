"""A metric as Ray's own object, which every node's agent shows to Prometheus."""

from ray.util import metrics as ray_metrics

from cluster.metrics import Metric


def counter(metric: Metric) -> ray_metrics.Counter:
    return ray_metrics.Counter(metric.name, metric.description, metric.labels)


def histogram(metric: Metric) -> ray_metrics.Histogram:
    return ray_metrics.Histogram(metric.name, metric.description, list(metric.buckets), metric.labels)


def gauge(metric: Metric) -> ray_metrics.Gauge:
    return ray_metrics.Gauge(metric.name, metric.description, metric.labels)
