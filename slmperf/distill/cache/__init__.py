"""A teacher's outputs on disk: computed once, read at every epoch of every training from then on.

At the tokens that count, and nowhere else, a cache holds one of

    hidden   hidden states (D,) as the teacher's output layer gets them, with that layer: exact,
             2 D bytes a token in bf16, so 8 GB for a million answer tokens at D = 4096
    top_k    the k likeliest tokens and their log-probabilities, 6 or 8 bytes each; what stands for
             the other tokens (TeacherTopK's `tail`) is chosen by whoever reads

Training then loads the teacher's output layer at most. Files, safetensors and JSON alone:

    <folder>/
        manifest.json         written last: settings, hashes of teacher and tokenizer, and each
                              file's examples, tokens, bytes and SHA-256
        index-*.safetensors   keys (N,) int64 ascending; shard, example (N,) int32: where each is;
                              the manifest names the one that counts
        head.safetensors      weight (V, D), bias (V,) of a cache of hidden states
        part-<i>-of-<n>.json  what worker i of n has finished
        part-<i>-of-<n>-<number>.safetensors, a shard of E examples with R tokens together
            keys, digests     (E,) int64 (of integers, keys are themselves, of strings a hash)
            starts            (E + 1,) int64, the examples' rows
            positions         (R,) int32, of the tokens within their example, ascending
            hidden            (R, D); or indices (R, K) int32 and log_probs (R, K)

A position counts an example's own tokens from 0, padding left out, so that it does not depend on
how examples were batched, padded or packed. Row p is the teacher's prediction of token p + 1.
"""

from slmperf.distill.cache.files import CachedHead, CachedTopK, hash_of_model, hash_of_tokenizer
from slmperf.distill.cache.reader import CachedRows, TeacherCache
from slmperf.distill.cache.writer import TeacherCacheWriter

__all__ = [
    "CachedHead",
    "CachedRows",
    "CachedTopK",
    "TeacherCache",
    "TeacherCacheWriter",
    "hash_of_model",
    "hash_of_tokenizer",
]
