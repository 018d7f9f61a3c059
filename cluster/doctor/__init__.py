"""Whether a live cluster keeps the safe defaults, and has what jobs need; each finding with its fix.

    gather (asks the dashboard, submits visit) → Facts → examine (pure) → every Finding

finding    what each check may say
facts      what is known of a cluster and its nodes at one moment
examine    all rules, in the order in which they are shown
closed     rules: who may come in, and what a job may do
versions   rules: Ray, Python, packages, image
machines   rules: whether nodes answer; clocks, disk, memory, GPUs
store      rules: what each node may do in the store
fabric     rules: from node to node
described  rules: what configs/clusters/NAME.yaml says, beside what is there
gather     the edge on the laptop: the dashboard's REST, and one job
visit      the job: asks a probe on every node, and measures between them
probe      on a node: reads its facts. Standard library and Ray alone, since a sick node may lack the rest
sockets    on a node: which of Ray's ports listen where, and whether each asks for a token
links      on a node: listening to the others, and measuring the way to them
devices    what nvidia-smi says
cli        `luthier cluster doctor`

This file imports nothing: it is imported on nodes.
"""
