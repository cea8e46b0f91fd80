"""Formats of quantised checkpoints: their tensors and the words of their configuration.

tensors              codes and scales as a checkpoint's tensors, and back
packing              codes of fewer than eight bits in 32-bit words
compressed_tensors   written and read: what Transformers, vLLM and SGLang load
gptq                 read
loading              from a folder of either to a model
"""
