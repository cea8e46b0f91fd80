"""Stands in for SGLang's compiled kernels, which have no wheel for CPUs.

Six of its modules import names from here also where the CPU runs them otherwise. Called, every one
but those below raises.
"""


def assign_req_to_token_pool_cpu(requests, pool, starts, ends, locations, count):
    """Where the tokens of each request lie: pool[r, start:end] = the next of `locations`."""
    used = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        pool[request, start:end] = locations[used : used + end - start].to(pool.dtype)
        used += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments, **options):
        raise NotImplementedError(f"sgl_kernel.{name} is compiled, and not on this machine")

    return missing
