"""Benchmarks: Luthier beside the alternatives, on this machine, in paired runs. `scripts/bench NAME`.

train      fine-tuning: a whole job's steps beside TRL's SFTTrainer and beside a bare torch + peft loop
report     what every benchmark prints: a table, or one JSON object
workload   the model and the chat rows that `train` uses, made from nothing
data       tokenising, near duplicates, personal data found: beside datasets, datasketch, Presidio
data_planted, data_values    texts with values planted in them, and the values
peers/     the other contestants; each runs in a process of its own, TRL in an environment of its own
"""
