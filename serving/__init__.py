"""Serving: one base model, every published adapter, OpenAI's API. Never imports jobs; no torch outside engine/.

    client → ingress → router → replica → adapter cache → engine (mixed batch) → tokens

config     what `configs/serving/NAME.yaml` holds
protocol   OpenAI's requests and answers, and errors as HTTP (pure)
structured what an answer must be, as requests say it: JSON, a schema, a pattern (pure)
resolver   `model` in a request → the base or an adapter version; aliases are live
permits    what may answer by its licences, and what /v1/models shows for them
calls      what the ingress asks of a replica, and what comes back
ingress    the HTTP side: routes, streaming, headers
page       the chat page, with what licences want shown
replica    one engine with its tokenizer and adapters, as a Serve deployment
prompts    messages or text → token ids, by the model's own chat template
adapters   which adapters are in the engine: single-flight loads, reference counts, eviction
popularity how much each is asked for lately: what leaves first
pins       the adapters that every replica is to hold, by name
demand     which adapters are asked for, and how much
ahead      what a new replica loads before anybody asks it: that, and what nobody holds
downloads  verified adapter files on this node, under a byte budget
routing    which replica a request goes to: queue in tokens, and what loading would cost (pure)
router     that policy behind Serve's router interface
autoscale  how many replicas, from the tokens that wait and that come (pure)
affinity   tells the router which adapters a replica holds
answers    what a replica says, in OpenAI's shapes
gauges     an engine's figures for Prometheus
scrape     /metrics of the whole cluster
app        the Serve application made of the above
service    that application as KubeRay's RayService names it
deploy     putting it on a Ray cluster, and waiting until it answers
client     a small client, for `luthier serving chat`
cli        `luthier serving`
engine/    tokens in, tokens out; knows nothing of the rest
"""
