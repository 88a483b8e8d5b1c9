"""What the kernels of short convolutions are held against the oracle on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.convolution.plain import Form, identity

silu = jax.nn.silu


@dataclasses.dataclass(frozen=True)
class Case:
    form: Form
    dtype: str = "float32"
    C: int = 24
    W: int = 4
    T: int = 13
    B: int = 2
    packed: bool = False
    rows: int | None = None  # groups of a program

    def arrays(self, seed=0):
        keys = jax.random.split(jax.random.key(seed), 4)
        draw = lambda i, *shape: jax.random.normal(keys[i], shape)
        tail, dtype = self.W - 1, self.dtype
        u, before = draw(0, self.B, self.T, self.C), draw(1, self.B, tail, self.C)
        taps, dy = draw(2, self.W, self.C), draw(3, self.B, self.T, self.C)
        run = past = None
        if self.packed:  # of one token, of three, and one that goes on behind a piece
            bounds = np.array([[2, 3, 6], [1, 5, 20]])
            run = (np.arange(self.T)[None, :, None] >= bounds[: self.B, None]).sum(-1)
            run, past = jnp.asarray(run, jnp.int32), jnp.zeros((self.B, tail), jnp.int32)
            past = past - (jnp.arange(tail) < 1)  # one of another segment
        return *(x.astype(dtype) for x in (u, before)), taps, run, past, dy.astype(dtype)


CASES = {
    "SiLU and unit length, packed": Case(Form(silu, 8), packed=True, rows=1, T=6),
    "SiLU, three taps": Case(Form(silu), dtype="bfloat16", W=3, T=5, C=20),
    "unit length of 6, two taps": Case(Form(identity, 6), dtype="float16", W=2, T=5, C=18),
    "SiLU and unit length": Case(Form(silu, 8), packed=True, rows=1),
    "SiLU and unit length, bfloat16": Case(Form(silu, 8), dtype="bfloat16", packed=True),
    "SiLU and unit length, float16": Case(Form(silu, 8), dtype="float16", packed=True),
    "SiLU, packed": Case(Form(silu), packed=True, C=12, W=3),
    "sum alone, odd number of channels": Case(Form(identity), C=7, packed=True),
    "fewer tokens than taps": Case(Form(silu, 8), T=2, packed=True),
    "one token": Case(Form(silu, 8), T=1),
    "whole pieces": Case(Form(silu, 8), T=8),
}
QUICK = tuple(CASES)[:3]
# Without taps.
ACTIVATED = {
    "SiLU and unit length alone": Case(Form(silu, 8)),
    "unit length alone, odd": Case(Form(identity, 6), dtype="float16", C=18),
    "SiLU and unit length alone, bfloat16": Case(Form(silu, 24), dtype="bfloat16", T=90),
}
