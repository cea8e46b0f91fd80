"""A serving load: members arrive, each with k prompts on one long prefix; how long they wait.

workloads  which prompts are released when; the loads of the paper's tables
load       the generator: releases, clocks, what came back
endpoints  which endpoint a text names; a function of one's own
http       servers: OpenAI's /v1/completions, SGLang's /v1/score
engine     this process's engine
report     percentiles, table, rows, plot
"""
