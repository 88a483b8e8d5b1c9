"""A model as two programs and its parameters, which JAX alone runs: no code of ours is needed.

=======================  ===================================================================
prefill.bin              ``(parameters, state, tokens [b, P], mask [b, P]) -> logits, state``
step.bin                 ``(parameters, state, tokens [b]) -> logits, state``
model.safetensors        the parameters, by the names that both programs take them under
serving.json             shapes and dtypes of the state and of what else the programs take
=======================  ===================================================================

Parameters and state are dicts of arrays. Any number of rows ``b`` will do. Logits are
``[b, vocab]``, in ``prefill`` those behind each row's last token that counts. ``interop/README.md``
shows a server.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_at_least
from deltaproduct_jax.files import errors_as_one_line, user_path, whole_or_absent, write_file
from deltaproduct_jax.interop.tensor_files import INDEX, SINGLE, Writing, write_tensors
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.ops.selection import PLATFORMS
from deltaproduct_jax.settings import require_kind, shown
from deltaproduct_jax.strict_json import to_json

PREFILL, STEP, SERVING = "prefill.bin", "step.bin", "serving.json"
Arrays = dict[str, jax.Array]


def export(
    model: SequenceModel,
    directory: str | os.PathLike[str],
    *,
    piece: int = 128,
    platforms: Sequence[str] | None = None,
) -> None:
    """Writes the programs of a model for servers that do not have this package.

    Args:
        model: any model; for several platforms one that names its ``implementation``.
        directory: a folder that holds no model yet; it is made if need be.
        piece: tokens P that ``prefill`` reads at once.
        platforms: some of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``, such as ``("cuda",)``;
            None for this machine's.

    Raises:
        ConfigError: an argument cannot be honoured; the text names it.
        RunDirectoryError: the folder holds something of this name, or cannot be written.
    """
    require_kind("model", model, SequenceModel)
    require_kind("piece", piece, int)
    require_at_least("piece", piece, 1)
    _check_platforms(platforms)
    folder = user_path(directory, "directory")
    with errors_as_one_line(folder, "read"):
        names = (SERVING, PREFILL, STEP, SINGLE, INDEX)
        taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise RunDirectoryError(f"{folder} holds {', '.join(taken)}; give another folder")
    graph, variables = nnx.split(model, nnx.Param)
    params = _flat(nnx.to_pure_dict(variables))
    rows = jax.export.symbolic_shape("b")[0]
    state, structure = _state_of(model, rows)
    tokens = jax.ShapeDtypeStruct((rows, piece), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, piece), bool)
    prefill, step = _programs(graph, structure, tuple(state))
    described = {
        "piece": piece,
        "vocab_size": model.config.vocab_size,
        "state": {name: _described(x) for name, x in state.items()},
    }
    with whole_or_absent(lambda: [folder / name for name in names]):
        for name, program, arguments in (
            (PREFILL, prefill, (tokens, mask)),
            (STEP, step, (jax.ShapeDtypeStruct((rows,), jnp.int32),)),
        ):
            made = jax.export.export(jax.jit(program), platforms=platforms)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
            write_file(folder / name, bytes(made(shapes, state, *arguments).serialize()))
        write_tensors(folder, {name: _writing(x) for name, x in params.items()}, 2**63)
        write_file(folder / SERVING, to_json(described))  # last, with it the folder is whole


def _check_platforms(platforms: Any) -> None:
    """ConfigError unless these are names of platforms; of a text JAX would take the letters."""
    if platforms is None:
        return
    is_list = isinstance(platforms, Sequence) and not isinstance(platforms, str)
    if not (is_list and platforms and all(name in PLATFORMS for name in platforms)):
        raise ConfigError(
            f"platforms={shown(platforms)} must be a list of {', '.join(map(repr, PLATFORMS))}, "
            "or None for this machine's"
        )


def _flat(tree: Any) -> Arrays:
    """Leaves by the names on their paths."""
    flat = traverse_util.flatten_dict(tree)
    return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def _unflat(arrays: Arrays) -> Any:
    paths = {tuple(int(k) if k.isdigit() else k for k in n.split(".")): n for n in arrays}
    return traverse_util.unflatten_dict({path: arrays[name] for path, name in paths.items()})


def _state_of(model: SequenceModel, rows: Any) -> tuple[dict[str, Any], Any]:
    """Shapes of a state by name, and the structure that its leaves are put back into."""
    leaves, structure = jax.tree.flatten_with_path(jax.eval_shape(lambda: model.init_state(1)))
    named = {}
    for path, leaf in leaves:
        name = ".".join(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)
        named[name] = jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
    return named, structure


def _programs(graph: Any, structure: Any, names: tuple[str, ...]) -> tuple[Callable, Callable]:
    def ready(params: Arrays, state: Arrays) -> tuple[SequenceModel, Any]:
        return nnx.merge(graph, _unflat(params)), structure.unflatten([state[n] for n in names])

    def named(state: Any) -> Arrays:
        return dict(zip(names, jax.tree.leaves(state), strict=True))

    def prefill(params, state, tokens, mask):
        model, state = ready(params, state)
        logits, state = model.forward(tokens, state=state, mask=mask)
        place = jnp.arange(tokens.shape[1])[None]
        last = jnp.max(jnp.where(mask, place, 0), axis=1)
        logits = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
        return logits, named(state)

    def step(params, state, tokens):
        model, state = ready(params, state)
        logits, state = model.step(state, tokens)
        return logits, named(state)

    return prefill, step


def _described(shape: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """As JSON has it; "b" is the number of rows."""
    return {"shape": ["b", *shape.shape[1:]], "dtype": jnp.dtype(shape.dtype).name}


def _writing(leaf: jax.Array) -> Writing:
    return Writing(leaf.shape, np.dtype(leaf.dtype), lambda: np.asarray(leaf))
