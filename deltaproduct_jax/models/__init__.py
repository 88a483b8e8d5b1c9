"""Whole models: configuration and sequence model."""

from deltaproduct_jax.models.config import ModelConfig as ModelConfig
from deltaproduct_jax.models.sequence_model import SequenceModel as SequenceModel
from deltaproduct_jax.models.sequence_model import count_parameters as count_parameters
