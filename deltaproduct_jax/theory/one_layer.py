"""One layer: any group of orthogonal matrices, and permutations with resets by the gate.

Theorem 1(i) of the DeltaProduct paper (https://arxiv.org/abs/2502.10297): n_h = n-1 for S_n; its
Theorem 4: n_h = 2 for groups of rotations of the plane and of space. A word problem's products grow
on the right, ``y_t = y_(t-1) x_t``, and the state's on the left; so the state is ``y_t^T`` times
what BOS wrote, and a letter acts as the transpose of its matrix.
"""

from collections.abc import Sequence

import numpy as np

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.settings import shown
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory.construction import Construction
from deltaproduct_jax.theory.program import Program
from deltaproduct_jax.theory.reflections import completion, factors
from deltaproduct_jax.theory.representations import (
    permutation_matrices,
    plane_matrices,
    solid_matrices,
)

# Vectors as far as can be from their images under the group's rotations: the corners of the snub
# cube and of the snub dodecahedron, whose nearest neighbours stand 44 and 27 degrees apart.
FAR_FROM_IMAGES = {
    "S4": np.array([0.85034, 0.46232, 0.25136]),
    "A5": np.array([-0.51172, 0.76393, 0.39313]),
}


def representation(group: str, kind: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Matrices ``[G, d, d]``, a vector with as many images as elements, and copies in a key.

    Two copies of every coordinate make the key of a transposition (1, 1, -1, -1) / 2, which every
    binary float holds; one copy would need the root of 1/2.

    Args:
        group: Sn or An for "permutations", Zm or Dm for "plane", S4 or A5 for "solid".
        kind: see ``group``.

    Raises:
        ConfigError: there is no such kind, or the group has none of it.
    """
    require_one_of("kind", kind, ("permutations", "plane", "solid"))
    if kind == "permutations":
        matrices = permutation_matrices(group)
        return matrices, np.arange(float(matrices.shape[-1])), 2
    if kind == "plane":
        matrices = plane_matrices(group)
        # Halfway between neighbouring mirrors, or anywhere if there are none.
        angle = np.pi / len(matrices)
        return matrices, np.array([np.cos(angle), np.sin(angle)]), 1
    return solid_matrices(group), FAR_FROM_IMAGES[group], 1


def represented(
    group: str, kind: str, letters: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, list[int]]:
    """What `representation` returns, the letters that are read, and the pads of a key.

    Args:
        group: see `representation`.
        kind: see `representation`.
        letters: elements that are read; None for all.

    Raises:
        ConfigError: as `representation`, or the letters are no elements.
    """
    matrices, start, copies = representation(group, kind)
    letters = np.arange(len(matrices)) if letters is None else np.asarray(letters)
    _require_numbers("letters", letters, 1, len(matrices))
    pads = completion(int(copies * start @ start)) if kind == "permutations" else []
    return matrices, start, copies, letters, pads


def answers_of(images: np.ndarray) -> np.ndarray:
    """Rows of the head ``[G, d]``: unit vectors, so that the true one has the largest product.

    Of vectors with a common mean, as a permutation's images have, the mean tells nothing.
    """
    means = images.mean(-1, keepdims=True)
    images = images - means if np.ptp(means) < 1e-9 else images
    return images / np.linalg.norm(images, axis=-1, keepdims=True)


def group_in_one_layer(name: str, group: str, kind: str, num_householder: int) -> Construction:
    """A group of orthogonal matrices, each letter's factors read from its token.

    Args:
        name: of the construction.
        group: as ``tasks.finite_groups`` names it.
        kind: representation, see `representation`.
        num_householder: factors for every token, the paper's n_h.

    Raises:
        ValueError: a letter takes more factors than ``num_householder``.
        ConfigError: the group has no such representation.
    """
    matrices, start, copies, letters, pads = represented(group, kind)
    task, d = GroupTask(group=group), matrices.shape[-1]
    program = Program(
        vocab_size=task.vocab_size,
        bos=task.bos_id,
        letters=letters,
        features={"image": d},
        num_heads=d,
        head_dim=copies * d + len(pads),
        num_householder=num_householder,
    )
    pairs = [factors(matrices[letter].T, num_householder) for letter in letters]
    keys, beta = (np.array(part) for part in zip(*pairs, strict=True))
    heads = slice(0, d)
    program.factors(0, heads, "token", keys, beta, copies, rows=letters)
    program.read(0, heads, "token", np.eye(d)[None], copies, rows=[*letters, task.bos_id])
    program.orbit(0, heads, "image", start, pads, copies)
    return finished(program, name, group, matrices, start, letters)


def finished(
    program: Program,
    name: str,
    group: str,
    matrices: np.ndarray,
    start: np.ndarray,
    letters: np.ndarray,
) -> Construction:
    """The construction of a group whose program puts ``y_t^T start`` into the feature "image"."""
    images = np.einsum("gij,i->gj", matrices, start) / np.linalg.norm(start)
    weights = answers_of(images)
    elements = np.arange(len(matrices))
    program.head("image", weights, elements)
    program.answer_bos()
    return Construction(
        name=name,
        group=group,
        config=program.config,
        params=program.params,
        bos=program.bos,
        letters=letters,
        step=finite_group(group).table[:, letters],
        answers=elements,
        answer_to_bos=program.bos,
        ideal=images @ weights.T,
    )


def permutation_reset(
    name: str, step: Sequence[Sequence[int]], accepting: Sequence[int]
) -> Construction:
    """An automaton whose letters permute its states or reset them, in one gated layer.

    The state is the present state's unit vector. A permutation takes its Householder factors; a
    reset closes the gate, which forgets all, and writes anew. A regular language is recognised by
    a cascade of such automata (Krohn and Rhodes; Theorem 2 of the paper). The answer after every
    token is 1 where the word so far is in the language, else 0.

    Args:
        name: of the construction.
        step: ``[S, L]``, the next state of each state, 0 first, at each letter.
        accepting: states in which the word is in the language.

    Raises:
        ConfigError: a letter neither permutes nor resets, or a number is no state.
    """
    table = np.asarray(step)
    _require_numbers("step", table, 2, len(table))
    S, L = table.shape
    if len(accepting):
        _require_numbers("accepting", np.asarray(accepting), 1, S)
    permuting, resets = _permuting_and_resets(table)
    states, bos, heads = np.eye(S), max(L, 2), slice(0, S)
    pads = completion(2)
    program = Program(
        vocab_size=bos + 1,
        bos=bos,
        letters=np.arange(L),
        features={"image": S},
        num_heads=S,
        head_dim=2 * S + len(pads),
        num_householder=max(S - 1, 1),
        gated=True,
    )
    pairs = [factors(states[table[:, c]].T, program.R) for c in permuting]
    keys, beta = (np.array(part) for part in zip(*pairs, strict=True))
    program.factors(0, heads, "token", keys, beta, 2, rows=permuting)
    program.read(0, heads, "token", np.eye(S)[None], 2, rows=[*range(L), bos])
    program.gate(0, list(resets))
    new = {letter: states[state] for letter, state in resets.items()}
    program.orbit(0, heads, "image", states[0], pads, 2, resets=new)
    signs = np.where(np.isin(np.arange(S), accepting), 1.0, -1.0)
    program.head("image", np.stack([-signs, signs]), [0, 1])
    answers = (signs > 0).astype(np.int64)
    return Construction(
        name=name,
        group=f"{S} states",
        config=program.config,
        params=program.params,
        bos=bos,
        letters=np.arange(L),
        step=table,
        answers=answers,
        answer_to_bos=int(answers[0]),
        ideal=np.stack([-signs, signs], axis=1),
    )


def _require_numbers(name: str, given: np.ndarray, dimensions: int, limit: int) -> None:
    """ConfigError unless these are whole numbers from 0 and below ``limit``, one at least."""
    is_whole = given.ndim == dimensions and given.size and np.issubdtype(given.dtype, np.integer)
    if not (is_whole and given.min() >= 0 and given.max() < limit):
        raise ConfigError(
            f"{name}={shown(given.tolist())} must be whole numbers from 0 to {limit - 1} in "
            f"{dimensions} dimension{'s' if dimensions > 1 else ''}, one at least"
        )


def _permuting_and_resets(table: np.ndarray) -> tuple[list[int], dict[int, int]]:
    """Letters that permute the states, and those that take all to one, with that state."""
    S, L = table.shape
    permuting = [c for c in range(L) if len(set(table[:, c])) == S]
    resets = {c: int(table[0, c]) for c in range(L) if len(set(table[:, c])) == 1}
    if len(permuting) + len(resets) < L:
        wrong = sorted(set(range(L)) - set(permuting) - set(resets))[0]
        raise ConfigError(
            f"step: letter {wrong} takes the states to {table[:, wrong].tolist()}; a letter must "
            "permute all states or take all to one"
        )
    return permuting, resets
