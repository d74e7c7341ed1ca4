"""Published checkpoints in transformers: after `import crystal.interop.hf` the Auto classes load them, no remote code.

`CrystalConfig` and `CrystalForCausalLM` are registered for `model_type: crystalcoder`, LLM360's own directories
included; what they save holds their code, so it loads elsewhere too. `parameter_groups` gives AdamW, and through
`optimizers=` transformers' Trainer, muP's learning rates and weight decay for such a model or a LLaMA.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from crystal.interop.hf.groups import parameter_groups
from crystal.interop.hf.modeling_crystal import CrystalConfig, CrystalForCausalLM, CrystalModel

__all__ = ["CrystalConfig", "CrystalForCausalLM", "CrystalModel", "parameter_groups"]

AutoConfig.register(CrystalConfig.model_type, CrystalConfig, exist_ok=True)
AutoModel.register(CrystalConfig, CrystalModel, exist_ok=True)
AutoModelForCausalLM.register(CrystalConfig, CrystalForCausalLM, exist_ok=True)
CrystalConfig.register_for_auto_class()
CrystalModel.register_for_auto_class("AutoModel")
CrystalForCausalLM.register_for_auto_class("AutoModelForCausalLM")
