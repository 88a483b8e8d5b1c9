"""Language models by name: one for a CPU, and the paper's sizes with their training."""

from typing import Any

# What is the same in all presets, so that no other default changes what they give.
COMMON: dict[str, Any] = {
    "mixer": "delta_product",
    "expand_v": 1.0,
    "use_output_gate": False,
    "allow_neg_eigval": True,
    "qk_activation": "silu",
    "use_short_conv": True,
    "conv_size": 4,
    "hidden_ratio": 4.0,
    "norm_eps": 1e-6,
    "tie_embeddings": True,
    "param_dtype": "float32",
    "clip_norm": 1.0,
    "decayed": "matrices",  # the paper's is all
    "packing": "concatenate",
}

TINY: dict[str, Any] = COMMON | {
    "train_length": 256,
    "eval_lengths": (256,),
    "mixer": "gated_delta_product",
    "num_householder": 2,
    "num_layers": 2,
    "hidden_size": 192,
    "num_heads": 6,
    "head_dim": 32,
    "intermediate_size": 512,
    "chunk_size": 16,  # half again as fast as the op's own choice, on a CPU
    "initializer": "paper",
    "initializer_range": 0.02,
    "dtype": "float32",
    "remat": "none",
    "batch_size": 4,
    "steps": 560,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "adam_b2": 0.99,
    "log_every": 20,
    "eval_every": 280,
    "checkpoint_every": 280,
    "eval_sequences": 128,
    "eval_batch_size": 8,
    "select_length": 256,
}

# MLP's width, steps, and width D and heads for each n_h from 1 to 3.
SIZES: dict[str, tuple[int, int, tuple[tuple[int, int], ...]]] = {
    "213m": (2048, 36_240, ((768, 8), (736, 6), (768, 4))),
    "340m": (2816, 66_758, ((1024, 8), (1024, 4), (1024, 4))),
    "392m": (2816, 66_758, ((1024, 12), (1024, 8), (1024, 6))),
    "700m": (2816, 66_758, ((1024, 36), (1024, 24), (1024, 18))),
    "805m": (4096, 104_905, ((1536, 16), (1468, 12), (1536, 8))),
    "1300m": (5632, 104_905, ((2048, 16), (2048, 12), (2048, 8))),
}


def of_size(name: str, num_householder: int) -> dict[str, Any]:
    """A model of the paper's and its training, at its context of 4,096 tokens."""
    mlp, steps, shapes = SIZES[name]
    width, heads = shapes[num_householder - 1]
    return COMMON | {
        "train_length": 4096,
        "eval_lengths": (4096,),
        "num_householder": num_householder,
        "num_layers": 24,
        "hidden_size": width,
        "num_heads": heads,
        "head_dim": 128,
        "intermediate_size": mlp,
        "initializer": "fla",
        "initializer_range": 0.006,
        "dtype": "bfloat16",
        "remat": "products",
        "loss_chunk_size": 4096,
        "batch_size": 128,
        "accumulation_steps": 16,
        "steps": steps,
        "learning_rate": 3e-4,
        "end_learning_rate": 3e-5,
        "warmup_steps": 512,
        "weight_decay": 0.01,
        "adam_b2": 0.95,
        "log_every": 10,
        "eval_every": 1000,
        "checkpoint_every": 500,
        "eval_sequences": 256,
        "eval_batch_size": 8,
    }


PRESETS: dict[str, dict[str, Any]] = {"default": TINY, "tiny": TINY}
PRESETS |= {f"{name}_{n}": of_size(name, n) for name in SIZES for n in (1, 2, 3)}
