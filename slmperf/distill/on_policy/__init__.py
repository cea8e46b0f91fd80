"""On-policy distillation: the student learns from the teacher on text that it wrote itself.

OnPolicySampler       which batches are the student's own text, and the batches made of it
Generator             what such text comes from: a protocol
PaddedGeneration      the model itself, batches of left-padded prompts
ContinuousBatching    the model itself, through Transformers' continuous batching
ServerGenerator       a model behind an OpenAI-compatible server
stop_tokens           the tokens that end a text of a model
"""

from slmperf.distill.on_policy.generators import (
    ContinuousBatching,
    Generator,
    PaddedGeneration,
    ServerGenerator,
    default_generator,
    stop_tokens,
)
from slmperf.distill.on_policy.sampler import OnPolicySampler

__all__ = [
    "ContinuousBatching",
    "Generator",
    "OnPolicySampler",
    "PaddedGeneration",
    "ServerGenerator",
    "default_generator",
    "stop_tokens",
]
