"""The config of a Molmo2 checkpoint, for programs that take it from the checkpoint (vLLM).

Written into exported folders by NanoMolmo2, which it does not need. transformers 5.23 and newer
have a class of their own and take this one only with ``trust_remote_code=True``.
"""

from typing import Any

from transformers import PretrainedConfig


class Molmo2TextConfig(PretrainedConfig):
    """The decoder: Qwen3's, with rows for tokens that are read and never written."""

    model_type = "molmo2_text"
    base_config_key = "text_config"

    def __init__(self, **fields: Any) -> None:
        # Before version 5 the base of the rotary angles stood alone; servers read both spellings.
        theta = fields.pop("rope_theta", None)
        given = fields.pop("rope_parameters", None) or fields.pop("rope_scaling", None)
        fields.pop("rope_scaling", None)
        rope = {"rope_type": "default", "rope_theta": theta, **(given or {})}
        super().__init__(rope_parameters=rope, **fields)
        self.rope_theta = rope["rope_theta"]


class Molmo2VitConfig(PretrainedConfig):
    """The vision encoder: SigLIP 2's, as many blocks as were trained, stored or not."""

    model_type = "molmo2_vit"
    base_config_key = "vit_config"


class Molmo2AdapterConfig(PretrainedConfig):
    """What pools patches to image tokens, and the blocks of the vision encoder that it reads."""

    model_type = "molmo2_adapter"
    base_config_key = "adapter_config"


class Molmo2Config(PretrainedConfig):
    """The whole model, its three parts spelled as in the released checkpoints."""

    model_type = "molmo2"
    sub_configs = {
        "text_config": Molmo2TextConfig,
        "vit_config": Molmo2VitConfig,
        "adapter_config": Molmo2AdapterConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vit_config: Any = None,
        adapter_config: Any = None,
        **fields: Any,
    ) -> None:
        given = {
            "text_config": text_config,
            "vit_config": vit_config,
            "adapter_config": adapter_config,
        }
        for name, values in given.items():
            setattr(self, name, self._part(name, values))
        super().__init__(**fields)

    def _part(self, name: str, values: Any) -> PretrainedConfig:
        if isinstance(values, PretrainedConfig):
            return values
        # Its own class tells the kind; the released files name the whole model's in every part.
        fields = {key: value for key, value in (values or {}).items() if key != "model_type"}
        return self.sub_configs[name](**fields)
