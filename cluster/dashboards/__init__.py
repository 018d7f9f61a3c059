"""Prometheus alerts and Grafana dashboards, made from the names in `cluster/metrics.py`: `luthier cluster dashboards`.

alerts   what is worth waking somebody for, each with what to do
grafana  what there is to see
"""
