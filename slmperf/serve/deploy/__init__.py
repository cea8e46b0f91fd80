"""`slmperf deploy`: how many of which GPUs serve a checkpoint, and what starts them.

SGLang with its own router and vLLM do all the work; nothing here runs when they serve.

checkpoint   what a folder's config.json says of weights, cache and time
sizing       tensor-parallel size, replicas, cache and times to the first token, by slmperf.plan
lines        the command lines of engines and router
kubernetes   the manifests
report       tables and notes
commands     the command
"""
