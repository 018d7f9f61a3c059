"""The ground that jobs and serving stand on. No torch in here.

errors     every error, drawn as a tree; exit codes
env        every environment variable that Luthier reads
config     strict YAML: one schema, references between files, key=value, all faults together
models     which base model: folder, Hub id or store; pinned, mirrored, its shape read without torch
store      the object store's protocol; folder.py and s3.py keep it
patient    a store that sits out what passes, for whoever must go on in the middle of a long run
keys       every key in the store, each made by one function
records    what is written under those keys
registry   adapters: publish, resolve, aliases with history, list
metrics    every metric's name
logs       what a job prints: progress, plain lines, the last JSON line
gpus       GPU types: memory, speed, dated prices
place      WHERE a job runs: what `configs/clusters/NAME.yaml` holds
session    joining a Ray cluster, always by address, with room for the job
nodes      a Ray cluster of local processes, always with a token
cli        the `luthier` command
"""

__version__ = "0.1.0"
