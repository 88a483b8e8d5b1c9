"""Bytes through HBM, of a compiled program written by hand and of a small kernel's grid."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from deltaproduct_jax.compilers import hlo_cost
from deltaproduct_jax.compilers.kernel_traffic import kernel_bytes

# One operation a kind, in rising order of what it moves. S(1) is vector memory.
TEXT = """HloModule jit_f

%fused (p.0: f32[64,256], p.1: f32[1,256], p.2: s32[]) -> f32[64,256] {
  %p.0 = f32[64,256]{1,0} parameter(0)
  %p.1 = f32[1,256]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %doubled = f32[1,256]{1,0} add(%p.1, %p.1)
  ROOT %put = f32[64,256]{1,0} dynamic-update-slice(%p.0, %doubled, %p.2, %p.2)
}

ENTRY %main (x: f32[64,256], y: bf16[64,256], i: s32[]) -> f32[64,256] {
  %x = f32[64,256]{1,0:T(8,128)} parameter(0)
  %y = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:S(1)} parameter(2)
  %near = f32[64,256]{1,0:T(8,128)S(1)} broadcast(%i), dimensions={}
  %same = f32[16384]{0} bitcast(%x)
OPERATION
}
"""
ROW, WHOLE = 4 * 256, 4 * 64 * 256
KERNEL = (
    "%k = (f32[64,256]{1,0}, f32[64,256]{1,0:S(1)}) custom-call(%x, /*index=1*/%near, %y), "
    'custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/vmap(g)/NAME/pallas_call"}'
)


@pytest.mark.parametrize(
    ("operation", "moved"),
    [
        ("%a = f32[64,256]{1,0:S(1)} add(%near, %near)", 0),
        ("%a = f32[64,256]{1,0:S(1)} add(%near, %x)", WHOLE),
        ("%a = f32[64,256]{1,0} convert(%y)", WHOLE + WHOLE // 2),
        ("%a = f32[64,256]{1,0} add(%x, %x)", 3 * WHOLE),
        ("%s = f32[1,256]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,256}", 2 * ROW),
        ("%s = f32[1,256]{1,0:S(1)} dynamic-slice(%x, %i, %i)", ROW),
        ("%c = (f32[64,256]{1,0:S(1)}, f32[64,256]{1,0}, u32[]{:S(2)}) copy-start(%x)", WHOLE),
        ("%p = ((f32[64,256]{1,0}), f32[1,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)", ROW),
        ("%b = f32[64,256]{1,0} custom-call(), custom_call_target=\"AllocateBuffer\"", 0),
        (KERNEL.replace("NAME", "unknown"), 2 * WHOLE + WHOLE // 2),
        # Blocks of x, not those of the array in vector memory; all of y twice; half of a result.
        (KERNEL.replace("NAME", "known"), 7 + WHOLE + WHOLE // 2),
    ],
)  # fmt: skip
def test_bytes_of_an_operation(operation, moved):
    kernels = {"known": [7, 10**9, WHOLE, WHOLE // 2, 10**9]}
    assert hlo_cost.cost(TEXT.replace("OPERATION", "  " + operation), kernels).hbm_bytes == moved


def test_bytes_of_a_fusion_that_updates_in_place():
    """The row is read and written; the array around it is not."""
    row = "  %row = f32[1,256]{1,0:S(1)} slice(%near)\n"
    put = "  ROOT %f = f32[64,256]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%fused"
    moved = hlo_cost.cost(TEXT.replace("OPERATION", row + put)).hbm_bytes
    assert moved == 2 * ROW + 4


def test_a_kernel_moves_the_blocks_that_its_steps_change():
    """x by rows of blocks, y once a row, of 4 slots of the result only the first 2."""

    def copy(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] + y_ref[...]

    def call(x, y):
        return pl.pallas_call(
            copy,
            grid=(2, 3),
            in_specs=[
                pl.BlockSpec((8, 128), lambda i, j: (i, j)),
                pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
            ],
            out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, 0)),
            out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
            name="sums",
        )(x, y)

    x, y = jnp.zeros((16, 384), jnp.bfloat16), jnp.zeros((16, 128))
    jaxpr = jax.make_jaxpr(jax.jit(lambda x, y: jax.lax.cond(True, call, call, x, y)))(x, y)
    block = 8 * 128
    assert kernel_bytes(jaxpr.jaxpr) == {"sums": [6 * 2 * block, 2 * 4 * block, 2 * 4 * block]}


def test_two_kernels_of_one_name_are_told_apart_or_refused():
    def call(x):
        return pl.pallas_call(lambda x_ref, o_ref: None, out_shape=jax.typeof(x), name="nothing")(x)

    jaxpr = jax.make_jaxpr(lambda x: (call(x), call(x[:4])))(jnp.zeros((8, 128)))
    with pytest.raises(ValueError, match="several kernels named nothing"):
        kernel_bytes(jaxpr.jaxpr)
