"""Tokens after tokens: sampling, reading of prompts, decoding of many rows at once, text."""

from deltaproduct_jax.models.generation.generator import Completion as Completion
from deltaproduct_jax.models.generation.generator import Generator as Generator
from deltaproduct_jax.models.generation.requests import Piece as Piece
from deltaproduct_jax.models.generation.requests import Prefix as Prefix
from deltaproduct_jax.models.generation.requests import Request as Request
from deltaproduct_jax.models.generation.sampling import Sampling as Sampling
