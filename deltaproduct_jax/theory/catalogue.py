"""The constructions that the experiment and the tests run, by name."""

from collections.abc import Callable

from deltaproduct_jax.errors import require_one_of
from deltaproduct_jax.theory.construction import Construction
from deltaproduct_jax.theory.layered import by_blocks, two_layers
from deltaproduct_jax.theory.one_layer import group_in_one_layer, permutation_reset
from deltaproduct_jax.theory.representations import permutation_matrices

# Words over a, b, c in which the a's less the b's since the last c are a multiple of 3.
TURNS_SINCE_RESET = ([[1, 2, 0], [2, 0, 0], [0, 1, 0]], [0])
# Three states: a turns them, b swaps the first two, c and d go to the first and to the last.
SWAPS_AND_RESETS = ([[1, 1, 0, 2], [2, 0, 0, 2], [0, 2, 0, 2]], [1])


def generators(group: str) -> list[int]:
    """The letters (1 2) and (1 2 ... n), which generate S_n."""
    perms = permutation_matrices(group).argmax(1)
    n = perms.shape[1]
    wanted = [1, 0, *range(2, n)], [*range(1, n), 0]
    return [int((perms == each).all(1).argmax()) for each in wanted]


def _one(group: str, kind: str, num_householder: int) -> Callable[[str], Construction]:
    return lambda name: group_in_one_layer(name, group, kind, num_householder)


def _blocks(group: str, num_householder: int, *, full: bool) -> Callable[[str], Construction]:
    return lambda name: by_blocks(name, group, num_householder, None if full else generators(group))


# Name -> function that builds it under that name.
CATALOGUE: dict[str, Callable[[str], Construction]] = {
    "permutations_S3": _one("S3", "permutations", 2),
    "permutations_S4": _one("S4", "permutations", 3),
    "permutations_S5": _one("S5", "permutations", 4),
    "cube_S4": _one("S4", "solid", 2),
    "icosahedron_A5": _one("A5", "solid", 2),
    "plane_Z5": _one("Z5", "plane", 2),
    "plane_D5": _one("D5", "plane", 2),
    "two_layers_Z5": lambda name: two_layers(name, "Z5"),
    "two_layers_S3": lambda name: two_layers(name, "S3"),
    "two_layers_D5": lambda name: two_layers(name, "D5"),
    "three_layers_S3": _blocks("S3", 2, full=True),
    "three_layers_S4": _blocks("S4", 2, full=False),
    "three_layers_S5": _blocks("S5", 2, full=False),
    "three_layers_S5_full": _blocks("S5", 4, full=True),
    "four_layers_S3": _blocks("S3", 1, full=True),
    "four_layers_S4": _blocks("S4", 1, full=False),
    "four_layers_S5": _blocks("S5", 1, full=False),
    "gated_turns": lambda name: permutation_reset(name, *TURNS_SINCE_RESET),
    "gated_swaps": lambda name: permutation_reset(name, *SWAPS_AND_RESETS),
}


def construct(name: str) -> Construction:
    """The construction of that name in the catalogue; ConfigError where there is none."""
    require_one_of("name", name, CATALOGUE)
    return CATALOGUE[name](name)
