"""Several layers, where one does not suffice: fewer factors, down to n_h = 1.

- `two_layers`: dihedral and cyclic groups with n_h = 1 (the paper's Theorem 7, after Grazzi et
  al., https://arxiv.org/abs/2411.12537, Theorem 6).
- `by_blocks`: any group of permutations with three layers and n_h >= 2, or four and n_h = 1 (the
  paper's Theorem 1(ii), (iii)): count positions, keep the last tokens, look up what to do.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from deltaproduct_jax.errors import require_at_least
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory.clock import make_clock
from deltaproduct_jax.theory.construction import Construction
from deltaproduct_jax.theory.one_layer import finished, represented
from deltaproduct_jax.theory.program import Program, Table
from deltaproduct_jax.theory.reflections import factors, product

Word = tuple[int, ...]


def two_layers(name: str, group: str) -> Construction:
    """Dm or Zm, or S3, with n_h = 1, in two layers.

    The first counts rotations modulo 2, p. The second keeps ``S^p y^T`` for one of the group's
    reflections, or swaps, S: each letter changes it by a matrix of determinant -1, which is one
    reflection. The query undoes ``S^p``. S3 is D3, by permutations, and so exact in every float.

    Args:
        name: of the construction.
        group: Dm, Zm or S3.

    Raises:
        ConfigError: the group is no other.
    """
    kind = "permutations" if group == "S3" else "plane"
    matrices, start, copies, letters, pads = represented(group, kind)
    task, d = GroupTask(group=group), matrices.shape[-1]
    program = Program(
        vocab_size=task.vocab_size,
        bos=task.bos_id,
        letters=letters,
        features={"parity": 1, "key": d, "query": d * d, "image": d},
        num_layers=2,
        num_heads=d,
        head_dim=copies * d + len(pads),
        num_householder=1,
        units=2 * len(letters),
        energy_bos=2,
    )
    turns = (np.linalg.det(matrices[letters]) > 0).astype(int)
    one, heads = slice(0, 1), slice(0, d)
    ones = np.ones((len(letters), 1, 1))
    program.factors(0, one, "token", ones, 2.0 * turns[:, None], 1, rows=letters)
    program.read(0, one, "token", np.ones((1, 1, 1)), 1)
    program.orbit(0, one, "parity", np.ones(1), [], 1)

    swap = np.eye(3)[[1, 0, 2]] if kind == "permutations" else np.diag([1.0, -1.0])
    power = lambda p: np.linalg.matrix_power(swap, p % 2)
    cases = [(i, p) for i in range(len(letters)) for p in (0, 1)]
    keys = [
        factors(power(p) @ matrices[letters[i]].T @ power(p - turns[i]), 1)[0][0] for i, p in cases
    ]
    token = np.zeros((len(cases), task.vocab_size))
    token[np.arange(len(cases)), [letters[i] for i, _ in cases]] = 1
    parity = np.array([[(-1.0) ** p] for _, p in cases])
    queries = np.array([power(p) for _, p in cases]).reshape(len(cases), -1)
    outputs = {"key": np.array(keys), "query": queries}
    program.lookup(0, Table({"token": token, "parity": parity}, 2, 1, outputs))

    program.factors_of_feature(1, heads, "key", None, copies)
    program.read_by_query(1, heads, d, copies)
    program.orbit(1, heads, "image", start, pads, copies)
    return finished(program, name, group, matrices, start, letters)


def by_blocks(
    name: str, group: str, num_householder: int, letters: Sequence[int] | None = None
) -> Construction:
    """Sn or An with any ``R = num_householder``, in three layers, or in four if it is one.

    Blocks of ``m`` tokens: the state's factors are those of the block before, spread over the ``m``
    tokens of the present one, and the query applies what is missing. So the layers are a clock
    modulo ``P = 2 m``, a buffer of ``P`` tokens with two lookups, and the state. Keys depend on the
    block before alone, and the query of a block's last token, with which nothing is missing, on the
    present block alone. So about ``2 m |letters|^m`` units suffice for keys and ``2 |letters|^(2 m
    - 1)`` for queries, where one table of all would take ``2 |letters|^(2 m)``. With one factor a
    token the clock takes two layers.

    Args:
        name: of the construction.
        group: Sn or An.
        num_householder: factors for every token, the paper's n_h.
        letters: elements that are read; None for all.

    Raises:
        ConfigError: the group is no other, a letter is no element, or there is no factor.
    """
    require_at_least("num_householder", num_householder, 1)
    matrices, start, copies, letters, pads = represented(group, "permutations", letters)
    task, d, R = GroupTask(group=group), matrices.shape[-1], num_householder
    L, m = len(letters), block_length(d - 1, R)
    P, empty, V = 2 * m, len(letters), len(letters) + 1
    clock = make_clock(P, R)
    of_keys, of_queries = list(key_cases(m, L)), list(query_cases(m, L))
    program = Program(
        vocab_size=task.vocab_size,
        bos=task.bos_id,
        letters=letters,
        features={
            **clock.features, "clock": P, "slots": P * V,
            "key": R * d, "beta": R, "query": d * d, "image": d,
        },
        num_layers=clock.num_layers + 2,
        num_heads=max(P, d, clock.num_heads),
        head_dim=max(copies * d + len(pads), P, clock.head_dim),
        value_dim=V,
        num_householder=R,
        units=max(len(of_keys) + len(of_queries), P),
        energy_bos=1 + clock.energy + P,
    )  # fmt: skip
    clock.write(program, letters)
    last = clock.num_layers + 1
    codes = {int(letter): code for code, letter in enumerate(letters)}
    program.buffer(last - 1, "clock", codes, empty, "slots")

    acts = [matrices[letter].T for letter in letters]
    keys, beta = _keys_of_blocks(of_keys, acts, m, R)
    queries = _queries_of_blocks(of_queries, acts, m, R)
    tables = [
        Table(_seen(of_keys, m, empty), P + 1, P, {"key": keys, "beta": beta - 1}),
        Table(_seen(of_queries, m, empty), P + 1, P, {"query": queries}),
    ]
    flat = lambda rows: {name: row.reshape(len(row), -1) for name, row in rows.items()}
    program.lookup(last - 1, *(table._replace(outputs=flat(table.outputs)) for table in tables))
    heads = slice(0, d)
    program.factors_of_feature(last, heads, "key", "beta", copies)
    program.read_by_query(last, heads, d, copies)
    program.orbit(last, heads, "image", start, pads, copies)
    return finished(program, name, group, matrices, start, letters)


def _keys_of_blocks(cases, acts, m: int, R: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``[cases, R, d]`` and step sizes ``[cases, R]``: a token's of the block before."""
    d = acts[0].shape[-1]
    keys, beta = np.zeros((len(cases), R, d)), np.zeros((len(cases), R))
    for unit, (position, before) in enumerate(cases):
        first = (position - 1) % m * R
        made = factors(_product(acts, before or (), d), m * R)
        keys[unit], beta[unit] = (part[first : first + R] for part in made)
    return keys, beta


def _queries_of_blocks(cases, acts, m: int, R: int) -> np.ndarray:
    """What queries apply, ``[cases, d, d]``: the rest of the block before, and all of this one."""
    d = acts[0].shape[-1]
    queries = np.zeros((len(cases), d, d))
    for unit, (_, before, now) in enumerate(cases):
        made = factors(_product(acts, before or (), d), m * R)
        rest = product(*(part[len(now) * R :] for part in made))
        queries[unit] = _product(acts, now, d) @ rest
    return queries


def block_length(needed: int, num_householder: int) -> int:
    """Tokens in a block, so that theirs are at least as many factors as its product may take.

    Of two tokens, positions would be counted modulo 4, which one layer with several factors cannot
    do exactly (see `clock`): three are taken then.
    """
    m = -(-needed // num_householder)
    return 3 if m == 2 and num_householder > 1 else m


def key_cases(m: int, L: int) -> Iterator[tuple[int, Word | None]]:
    """What keys depend on: position modulo 2 m and the block before, None in the first block."""
    for position in range(2 * m):
        for before in itertools.product(range(L), repeat=m):
            yield position, before
        if 1 <= position <= m:
            yield position, None


def query_cases(m: int, L: int) -> Iterator[tuple[int, Word | None, Word]]:
    """What a query depends on: position, the block before, and the present block's letters so far.

    The block before is ``()`` at a block's last token, where it does not matter.
    """
    for position in range(2 * m):
        offset = (position - 1) % m
        befores: list[Word | None] = list(itertools.product(range(L), repeat=m))
        befores += [None] if 1 <= position <= m else []
        for before in befores if offset < m - 1 else [()]:
            for now in itertools.product(range(L), repeat=offset + 1):
                yield position, before, now


def _seen(cases: Sequence[tuple], m: int, empty: int) -> dict[str, np.ndarray]:
    """Rows of the features "clock" ``[U, P]`` and "slots" ``[U, P * V]`` that single cases out."""
    P, V = 2 * m, empty + 1
    where, slots = np.zeros((len(cases), P)), np.zeros((len(cases), P, V))
    for unit, (position, before, *now) in enumerate(cases):
        age = (position - 1) % m + 1  # of the last token of the block before
        blocks = [(age, [empty] * m if before is None else before), *((0, word) for word in now)]
        for first, word in blocks:
            for code_age, code in enumerate(reversed(word), first):
                slots[unit, (position - code_age) % P, code] = 1
        # Units look at more slots or fewer; all are to be on by the same amount.
        where[unit, position] = P + 1 - slots[unit].sum()
    return {"clock": where, "slots": slots.reshape(len(cases), -1)}


def _product(acts: Sequence[np.ndarray], word: Word, d: int) -> np.ndarray:
    """What the letters of a word do to a state, one after the other."""
    found = np.eye(d)
    for letter in word:
        found = acts[letter] @ found
    return found
