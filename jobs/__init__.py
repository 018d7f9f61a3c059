"""Training jobs: from a recipe to a published adapter or model.

config      the recipe's schema
plan        what a run would do: batch, ZeRO stage, whether it fits, what would; no torch
memory      the most memory that a worker holds, by part; no torch
tensors     what it is made of: trained parameters, what forward keeps, logits; no torch
cost        tokens, steps, hours, money, bytes on disks and in the store; no torch
terms       what the result is made from, and whether the licences of that allow what is meant
brief       a plan as text
rows        the rows of a data file, each with its place
data/       data that can be answered for: looked at, cleaned and described before anything is trained on it
formats     a row of any common format, to a conversation
template    the model's own chat template: a conversation's text, and where in it the answers stand
truth       whether what it writes is still the conversation that was given; pure
chat        a conversation or a text, to supervised tokens
data        what is in the rows: checked, cleaned and described before anything is trained on them
tasks       Ray tasks, a few at a time
dataset     tokenise once on CPU workers, into the store's dataset cache
packing     sample order, packs and each rank's share; pure
model       the base model and its attention for packed rows
lora        which parameters are trained: LoRA or all
kernels     the LoRA product and the loss, each with its gradient, as one function
objectives  packed rows, and what a step's loss is normalised by
schedule    the learning rate
zero        the DeepSpeed engine: the one door to deepspeed
checkpoint  portable training state, manifest last: its layout, how it is read back, what of it stays
saver       checkpoints behind training's back: copy, upload, commit
job         what the driver hands to every worker
trainer     the training loop
worker      one worker of one attempt: prepare, train, publish
export      trained weights to a folder that peft or transformers loads
watchdog    whether a worker's loop still moves, and if not, where it stands
merge       an adapter merged into its base, compared with the trainer's own logits
delivery    an adapter version out of the store into a folder, with all that goes along
card        the model card of what a run has made
publish     check, probe, and hand to the registry
progress    step records to the store; the board between driver and workers
screen      what the driver shows of them
gauges      and what Prometheus is shown
runs        a run's life in the store: events, attempts, state, stop requests
history     all that the store has of one run, put together
report      a run as one HTML file
chart       one of its charts, as SVG; pure
markup      elements of a page, every text in them escaped
pulse       the driver's heartbeat, and what it tells the workers: stop, or move
account     what the run holds and has spent, for the cost ledger
limits      of hours and money: looked at before anything is spent, and while it runs
network     the address by which workers find one another
turn        its place in the queue of a shared cluster
suites      the prompts that a version is evaluated by: read, checked, kept in the store
scorers     how good an answer is: exact match, one's own function, a refusal
measures    from answers and losses to a report's figures; pure
evaluation  measure a version by what it must show, beside the one in stable, and write the report
questions   what that asks in a Ray task, and what comes back
evaluator   the Ray task of that: the base with adapters, losses, greedy answers; torch
release     evaluate, then move the alias or leave it
attempts    one start of the workers after another, until the run has an end
run_record  run.json: the recipe, and digests of all that the run was made of
driver      resolve, plan, tokenise, train, publish, release
train       `python -m jobs.train RECIPE key=value …`
evaluate    `python -m jobs.evaluate NAME@V|RUN store=URL key=value …`
resume      `python -m jobs.resume RUN store=URL key=value …`
references  what a reference stands for: a run, a version, a model
lineage     where an adapter, a model or a run comes from, followed through the store's records
lineage_tree  the same as a tree for a terminal
reproduction  a run done again from its record, and its losses beside the original's
reproduce   `python -m jobs.reproduce NAME@3|RUN store=URL key=value …`
submission  a job, handed to a cluster from a laptop
views       `luthier jobs list|show|logs|report|diff|export`: what runs have left
cli         `luthier jobs …`
"""
