"""What scripts/quickstart trains: a small world of orders, and a tiny model that learns to read them.

tasks   the text: what the base model answers, and the two tasks that the adapters learn (no torch)
model   the tokenizer and the untrained model, as a Hugging Face folder
"""
