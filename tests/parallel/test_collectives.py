"""What the devices of a mesh send each other in a whole step of training, by its size and axis."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from children import printed

ROOT = Path(__file__).resolve().parents[2]
MESHES = (
    "data:16",
    "data:4,fsdp:4",
    "data:8,tensor:2",
    "data:8,sequence:2",
    "data:2,fsdp:2,tensor:2,sequence:2",
)


def most_of(kind: str, axes: set[str], most: dict[str, int]) -> int:
    """Bytes of the largest array that devices along these axes must exchange."""
    if axes == {"tensor"}:
        return most["residual"]  # sums of what each has of the heads, or of the MLP
    if axes == {"sequence"} and kind == "all-to-all":
        return most["heads"]  # attention's, for tokens
    if axes == {"sequence"}:
        return max(most[name] for name in ("state", "past", "parameter"))
    # Parameters, gradients, norms, and counts; no activation of any token.
    return most["parameter"]


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("mixer", ["gated_delta_product", "transformer"])
def test_nothing_is_larger_than_what_its_axis_must_exchange(platform, mixer):
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the compiler for TPUs (tests/run.py --extra=tpu)")
    command = [sys.executable, "-m", "tests.parallel.step_collectives", platform, mixer, *MESHES]
    lines = printed(command, cwd=ROOT).splitlines()[-len(MESHES) :]
    for mesh, line in zip(MESHES, lines, strict=True):
        found = json.loads(line)
        most = found["most"]
        assert max(most["parameter"], most["past"], most["state"]) < most["residual"] / 2, mesh
        over = [name.split(":") for name in mesh.split(",")]
        used = {axis for _, _, axes, _ in found["sent"] for axis in axes}
        assert used == {axis for axis, size in over if int(size) > 1}
        for kind, size, axes, _ in found["sent"]:
            assert size <= most_of(kind, set(axes), most), (mesh, kind, size, axes)
