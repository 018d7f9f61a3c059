"""The engine: tokens for many requests, and many adapters, from one base model in one forward pass.

    protocol    what an engine is; requests, parameters, events (no torch)
    native      our engine: a thread around the core, streams for asyncio
    core        the engine without its thread: plan, execute, commit
    scheduler   who is in the next step, with how many tokens
    fairness    whose turn it is among those who wait        pace   how long more work will take
    model       the base model and its one packed forward pass
    attention   attention over a packed row, from the paged pool
    kv          the pool: blocks, who shares them, and the tensors behind them
    adapter     reads and checks a peft LoRA folder
    lora        linear layers that mix adapters row by row
    kernels     the two products of decode that torch has no fast way for on a CPU (kernels.c)
    sampling    logits → token        text    tokens → text that may be shown
    grammar     which tokens may follow in an answer that must be JSON, or match a pattern

Import what you need from its module; this package imports nothing, so that protocol stays free of torch.
"""
