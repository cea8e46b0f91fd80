"""What proves an op: cases, an error budget, a battery of checks, and timing.

    cases           what an op is run on: shapes, dtypes, inputs that can fail; bytes per call
    pairwise        a small sample of the cases that still meets every pair of parameters
    budget          how far a kernel may be from the float64 gold
    battery         the checks that every op passes
    interpreter     Triton kernels on CPU tensors, with the interpreter's bf16 put right
    offline         Triton kernels compiled for sm_80 and sm_90 without a GPU
    attention_cases what paged_attention is run on, and a judge of its results
    rounding_cases  what round_columns is run on, and a judge of its results
    spectra         layers on which methods of quantisation are told apart
    timing          medians over rotating inputs, graph replay on a GPU, the copy roof

Imported by tests and benches, never by the rest of the package.
"""
