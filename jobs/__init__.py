"""Training jobs: from a recipe to a published adapter or model.

config      the recipe's schema
plan        batch arithmetic, ZeRO stage and memory, before anything is spent; no torch
formats     files of any common format, to conversations
chat        a conversation, rendered by the model's own template, to supervised tokens
dataset     tokenise once on CPU workers, into the store's dataset cache
packing     sample order, packs and each rank's share; pure
model       the base model and its attention for packed rows
lora        which parameters are trained: LoRA or all
objectives  the loss
schedule    the learning rate
zero        the DeepSpeed engine: the one door to deepspeed
checkpoint  portable training state, manifest last
worker      the training loop
export      trained weights to a folder that peft or transformers loads
publish     check, probe, and hand to the registry
progress    step records: to the store, and to the driver's screen
driver      resolve, plan, tokenise, train, publish
train       `python -m jobs.train RECIPE key=value …`
cli         `luthier jobs …`
"""
