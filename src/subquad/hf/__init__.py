"""Importing this makes ``transformers``' Auto classes load our checkpoints."""

from transformers import AutoConfig, AutoModelForCausalLM

from subquad.hf.modeling import SubquadCache, SubquadConfig, SubquadForCausalLM

__all__ = ["SubquadCache", "SubquadConfig", "SubquadForCausalLM"]

AutoConfig.register(SubquadConfig.model_type, SubquadConfig, exist_ok=True)
AutoModelForCausalLM.register(SubquadConfig, SubquadForCausalLM, exist_ok=True)
