"""Native part of slmperf, built from csrc/module.cpp."""

def build_facts() -> dict[str, str]:
    """What was compiled: revision, compiler, cpu_isas, cuda, cuda_archs, torch, python.

    A part that was left out is an empty string.
    """
