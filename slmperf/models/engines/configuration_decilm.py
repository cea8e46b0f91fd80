"""Configuration of a decoder with layers of different sizes, as serving engines read it.

This file stands beside the weights of a checkpoint that `slmperf.models.engines` wrote, and is all
of the checkpoint's own code. It needs nothing but Transformers, 4 or 5.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A mapping whose keys are attributes too: `block.attention.n_heads_in_group`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """Llama's configuration and `block_configs`, one for each layer.

    attention   no_op; n_heads_in_group, the number of query heads of each key/value head
    ffn         no_op; intermediate_size, or ffn_mult: 2/3 of it times hidden_size, rounded up to a
                multiple of 256
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), rope_theta: float = 10000.0, **fields: Any) -> None:
        super().__init__(rope_theta=rope_theta, **fields)
        self.rope_theta = rope_theta  # Transformers 5 moves it into rope_parameters; engines look
        self.block_configs = [
            Block({part: Block(sizes) for part, sizes in block.items()}) for block in block_configs
        ]

    def validate_architecture(self) -> None:
        """Llama wants a hidden size that the heads divide; here `head_dim` is always given."""
