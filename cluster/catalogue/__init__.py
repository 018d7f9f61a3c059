"""The model catalogue: which model to take, what is in its folder, and how it comes into the store.

cli        `luthier cluster models …`
source     a Hub model, a folder or another store: its folder, its pin, its licence
add        into the store, past the licence gate, resumable; a config for recipes
inspection  a folder explained: all findings, and whether it may be used
definition  config.json: what the model is
weights    safetensors by their headers alone
tokenizer  the tokenizer, generation settings and chat template, and whether they agree
links      links of a folder that lead out of it: refused
remote_code  Python code that a model brings: never run
convert    pickled weights into safetensors, a sandboxed process a file
sandbox    that process: limits, no network, no files
archive    a torch archive to safetensors, byte by byte
pickles    a torch pickle, read without calling anything
table      what is known of open models, from configs/catalogue.yaml
suggest    which of them to take, and why not the others; pure
tree       base, adapters, merged and distilled models of a store, as a tree
"""
