"""What a large model costs the host while it is read and written: itself and one tensor."""

import json
import subprocess
import sys

import pytest
from interop.golden_models import drawn

from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig

# 320 MB, half of it one tensor; the largest of the others have 8.
CONFIG = ModelConfig(
    vocab_size=40000, hidden_size=1024, num_layers=4, num_heads=8, head_dim=128, num_householder=2,
    intermediate_size=2048, tie_embeddings=True, use_short_conv=True,
)  # fmt: skip

CHILD = """
import json, resource, sys
import jax
from flax import nnx
from deltaproduct_jax.interop import fla

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.numpy.zeros(4) + 1)
before = peak()
model = fla.load(sys.argv[1])
sizes = [x.nbytes for x in jax.tree.leaves(jax.block_until_ready(nnx.state(model)))]
read = peak() - before
fla.save(model, sys.argv[2])
print(json.dumps([sum(sizes), max(sizes), read, peak() - before]))
"""


@pytest.mark.slow
def test_memory_is_the_models_and_one_tensors(tmp_path):
    fla.save(drawn(CONFIG), tmp_path / "large")
    arguments = [sys.executable, "-c", CHILD, str(tmp_path / "large"), str(tmp_path / "again")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    model, tensor, read, written = json.loads(done.stdout)
    assert model > 300e6
    slack = 60e6  # what tracing the model's shapes takes, and the allocator
    assert read < model + tensor + slack, (model, tensor, read)
    assert written < model + tensor + slack, (model, tensor, written)
    files = [tmp_path / name / "model.safetensors" for name in ("large", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
