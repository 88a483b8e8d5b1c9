import jax, jax.numpy as jnp
from deltaproduct_jax.ops.kernels.gluon import launch as L, prepare
PLACE = jax.ShapeDtypeStruct((1,), jnp.float32)

def sizes(tokens):
    B, T, R, H, K = tokens.k.shape
    HV, V = tokens.v.shape[-2:]
    NG = -(-T // 64)
    return B, T, R, H, K, HV, V, NG

def inverse(tokens, s):
    B, T, R, H, K, HV, V, NG = sizes(tokens)
    NB = NG * R
    return L.launch(prepare.inverse, (tokens.k, tokens.beta, s), [jax.ShapeDtypeStruct((B, HV, NB, 2, 64, 64), jnp.bfloat16)],
                 (-(-NB // 4), B * HV), warps=4, T=T, R=R, H=H, HV=HV, K=K, NG=NG, HAS_G=tokens.g is not None, HAS_RESETS=tokens.resets is not None)[0]

def sums(tokens):
    B, T, R, H, K, HV, V, NG = sizes(tokens)
    has_g, has_r = tokens.g is not None, tokens.resets is not None
    if not (has_g or has_r):
        return jnp.zeros(1, jnp.float32)
    g = tokens.beta if not has_g else tokens.g
    r = tokens.resets.astype(jnp.int8) if has_r else jnp.zeros((1,), jnp.int8)
    heads = min(4, 1 << (HV - 1).bit_length())
    return L.launch(prepare.gate_sums, (g, r), [jax.ShapeDtypeStruct((B, HV, NG, 3, 64), jnp.float32)],
                 (NG, B, -(-HV // heads)), warps=1, T=T, HV=HV, HEADS=heads, NG=NG, HAS_G=has_g, HAS_RESETS=has_r)[0]

def run_walk(walk, tokens, x, s, start, scale, pieces=1, has_o=True, has_v=True, S=3):
    B, T, R, H, K, HV, V, NG = sizes(tokens)
    if not has_v: V = K
    o = jax.ShapeDtypeStruct((B, T, HV, V), tokens.v.dtype) if has_o else jax.ShapeDtypeStruct((8,), tokens.v.dtype)
    final = jax.ShapeDtypeStruct((B, HV, pieces, K, V), jnp.float32)
    return L.launch(walk, (tokens.q, tokens.k, tokens.v, tokens.beta, x, s, start), [o, final], (B * HV, pieces), warps=4,
        SCALE=scale, T=T, R=R, H=H, HV=HV, K=K, V=V, NG=NG, STEPS=-(-NG // pieces), PIECES=pieces, S=S,
        HAS_G=tokens.g is not None, HAS_RESETS=tokens.resets is not None, HAS_O=has_o, HAS_V=has_v)

def forward(walk, tokens, initial, scale, S=3):
    s = sums(tokens)
    o, final = run_walk(walk, tokens, inverse(tokens, s), s, initial[:, :, None], scale, S=S)
    return o, final[:, :, 0]
