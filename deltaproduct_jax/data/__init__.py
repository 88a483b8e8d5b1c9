"""Text as tokens on disk, and streams of rows drawn from it: README.md beside this file."""

from deltaproduct_jax.data.config import PrepareConfig as PrepareConfig
from deltaproduct_jax.data.config import StreamConfig as StreamConfig
from deltaproduct_jax.data.corpus import Corpus as Corpus
from deltaproduct_jax.data.corpus import open_corpus as open_corpus
from deltaproduct_jax.data.packing import Rows as Rows
from deltaproduct_jax.data.preparation import prepare as prepare
from deltaproduct_jax.data.preparation import verify as verify
from deltaproduct_jax.data.stream import TokenStream as TokenStream
from deltaproduct_jax.data.tokenizer import tokenizer_of as tokenizer_of
