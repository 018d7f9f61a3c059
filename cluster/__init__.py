"""The ground that jobs and serving stand on. No torch in here.

errors     every error, drawn as a tree; exit codes
env        every environment variable that Luthier reads
config     strict YAML: one schema, references between files, key=value, all faults together
secret     secrets by name: where each is kept, read only where it is needed
models     which base model: folder, Hub id or store; pinned, mirrored, its shape read without torch
hub        a model's files from the Hub, and what its refusals mean
catalogue/  base models: added, inspected, suggested, converted from pickles, drawn as a tree
objects    what an object may be called, and how it is listed
store      the object store's protocol; folder.py and s3.py keep it
patient    a store that sits out what passes, for whoever must go on in the middle of a long run
keys       every key in the store, each made by one function
records    what is written under those keys
made       luthier.json: how the weights in a folder came to be
registry   adapters: publish, resolve, aliases with history, list
evaluation  the gate before an alias moves: reports on versions, and whether one suffices
metrics    every metric's name
gauges     a metric as Ray's own object
dashboards/  Grafana dashboards and Prometheus alerts, made from these names
logs       what a job prints: progress, plain lines, the last JSON line
licences/  what a use is allowed, and obliges to: facts, policy, verdicts, the gate of every command
gpus       GPU types: memory, speed, dated prices
prices     what an hour costs of what a job holds, and where that figure is from
ledger     what runs have held and spent: entries that never change, exact sums
meter      time that is held, turned into such entries by one driver
place      WHERE a job runs: what `configs/clusters/NAME.yaml` holds
launch/    a cluster from its file: AWS, Google Cloud, Azure, SSH, Kubernetes
session    joining a Ray cluster, always by address, with room for the job
package    what a submitted job takes along, looked at before Ray zips it
submit     handing a job to a cluster by its dashboard: checked, sent once, followed
who        who a job is for: who is logged in, or submitted it
processes  Ray nodes as processes: started, seen to live, ended
queue      whose turn it is on a shared cluster; pure, and one actor
nodes      a Ray cluster of local processes, always with a token
provider   local nodes behind Ray's autoscaler: the cloud of a laptop and of the tests
spot       on each spot node: asks the cloud whether it will be taken, and drains it
market     on the head: on-demand nodes where the cloud has no spot ones
doctor/    what a live cluster has wrong: facts from every node, rules, all findings
why/       why nothing happens: facts by the dashboard's REST, rules, one answer
cli        the `luthier` command
"""

__version__ = "0.1.0"
