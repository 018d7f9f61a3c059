"""The engine: tokens for many requests, and many adapters, from one base model in one forward pass.

    protocol    what an engine is; requests, parameters, events (no torch)
    native      our engine: a thread around the core
    streams     an engine's events, handed to whoever asked in an asyncio loop
    core        the engine without its thread: plan, execute, commit
    scheduler   who is in the next step, with how many tokens
    fairness    whose turn it is among those who wait        pace   how long more work will take
    model       the base model and its one packed forward pass
    attention   attention over a packed row, from the paged pool
    kv          the pool: blocks, who shares them, and the tensors behind them
    adapter     reads and checks a peft LoRA folder     dora   how DoRA's trained lengths become a scale
    lora        linear layers that mix adapters row by row
    quantized   linear layers with weights in 8 or 4 bits, beneath those
    kernels     the two products of decode that torch has no fast way for on a CPU (kernels.c)
    block       the memory that they read adapters from
    sampling    logits → token        text    tokens → text that may be shown
    grammar     which tokens may follow in an answer that must be JSON, or match a pattern

    vllm            the second engine: vLLM in a process of its own
    vllm_life       it is started, watched and restarted
    vllm_server     one run of it: start, health, requests, end
    vllm_facts      what its model can answer        vllm_api   its HTTP API in our terms
    vllm_answer     its tokens → our events, by the native engine's rules
    vllm_grammar    grammars, made by it and judged by us
    vllm_adapters   what it serves, before and after a restart
    vllm_zero       an adapter that changes nothing, for the base on a CPU
    vllm_command    its command line and what it sees of our environment
    guard           runs it, and ends all of it when we end

Import what you need from its module; this package imports nothing, so that protocol stays free of torch.
"""
