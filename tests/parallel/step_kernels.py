"""Lowers training steps for GPUs and counts their kernels; a program of its own.

``python -m tests.parallel.step_kernels MIXER MESH ...``, over meshes of up to 8 GPUs, none of which
is there, as ``--mesh`` has them. How many devices there are must be settled before JAX starts,
hence the program. Triton (``--extra=gpu`` of tests/run.py) must be importable; cuDNN is taken to be
there. It prints a JSON object a mesh: how often the program of a device calls each kernel.
"""

import json
import os
import sys
import types

MIXER, *MESHES = sys.argv[1:]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from jax._src.cudnn import fused_attention_stablehlo

from deltaproduct_jax.compilers.gpu import kernels_of
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.text import TextTask
from experiments.lib.pod.step_program import step_program

FIELDS = {"use_short_conv": True, "num_householder": 2}
MODEL = ModelConfig(
    vocab_size=96, mixer=MIXER, hidden_size=512, num_heads=4, head_dim=128, dtype="bfloat16",
    **{name: value for name, value in FIELDS.items() if MIXERS[MIXER].takes(name)},
)  # fmt: skip
RUN = RunConfig(
    TextTask(train_length=1024, eval_lengths=(1024,)), MODEL, TrainConfig(batch_size=16)
)


def main() -> None:
    """Lowers and prints."""
    there = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    fused_attention_stablehlo.cuda_versions = there
    for mesh in MESHES:
        program = step_program(RUN, DeviceConfig(mesh=mesh), jax.devices())
        lowered = program.traced.lower(lowering_platforms=("cuda",))
        print(json.dumps(kernels_of(lowered)), flush=True)


main()
