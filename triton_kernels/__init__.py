"""Triton kernels, installed as slmperf.triton_kernels.

Other projects own the top-level name `triton_kernels`: imported under it (from the checkout's root,
say), this package refuses, so that nobody takes our kernels for theirs.
"""

if __name__ != "slmperf.triton_kernels":
    raise ImportError(f"{__name__} found slmperf's kernels: they live in slmperf.triton_kernels")
