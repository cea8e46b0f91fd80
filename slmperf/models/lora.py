"""LoRA (peft) on a quantised model, whose own weights stay as they are.

    settings = on_quantized(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = peft.get_peft_model(load(folder), settings)
    model = peft.PeftModel.from_pretrained(load(folder), adapter, config=settings)

peft has to be told of `QuantizedLinear` by every configuration, which are not stored with it: of an
adapter on_quantized(LoraConfig.from_pretrained(adapter)). DistillationTrainer(peft_config=...) does
so itself. Layers are named: "all-linear" means torch's own.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from slmperf.models.quantized import QuantizedLinear


def on_quantized(config: LoraConfig) -> LoraConfig:
    """The configuration, for quantised layers as well; it is changed."""
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


class LoraQuantizedLinear(Linear):
    """A QuantizedLinear, and beside it adapters on its device.

    NotImplementedError for what reads or changes the base's weight: other first values than zeros
    or random ones, DoRA and its like (peft's ValueError), and merging.
    """

    def __init__(self, base_layer: QuantizedLinear, *arguments: Any, **settings: Any) -> None:
        with warnings.catch_warnings():  # of a class that peft does not know
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, *arguments, **settings)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None but the plain one."""
        return {(): None}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **settings: Any
    ) -> None:
        """Add an adapter."""
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise NotImplementedError(
                f"LoRA on a quantised layer: init_lora_weights is {config.init_lora_weights!r}, "
                "wanted True, False, 'gaussian' or 'orthogonal'"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **settings)

    def merge(self, *arguments: Any, **settings: Any) -> None:
        """Not possible: the sum is not on the weight's grid."""
        raise NotImplementedError(
            "LoRA on a quantised layer: wanted a dense base to merge into, found QuantizedLinear"
        )
