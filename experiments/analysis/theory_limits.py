"""What can no parameters do? The negative statements, computed.

    python -m experiments.analysis.theory_limits --workdir=runs/theory_limits

checks Proposition 1 on random products of Householder factors, bounds how far apart one factor
keeps two states that counting modulo 3 must tell apart, and computes the commutators on which the
argument rests that S5 takes four factors in one layer. ``limits.json`` has the numbers.

Source: https://arxiv.org/abs/2502.10297, proposition 1 and the lower bound on S5;
    https://arxiv.org/abs/2411.12537, on counting modulo 3.
Expect: no violation above 2e-15, and 7e-7 between states after 1M tokens;
    experiments/results/theory/limits.json has the numbers.
Takes: seconds on a CPU.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.theory import limits
from deltaproduct_jax.theory.representations import solid_matrices
from experiments.lib import flags
from experiments.lib.bench.report import command_line, write_json

GROUPS = ("S3", "S4", "S5", "A5")
STEPS = 50  # of one letter, simulated


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """How much is drawn."""

    products: int = setting(
        2000, "random products for Proposition 1, and letters that are repeated", least=1
    )
    lengths: tuple[int, ...] = setting(
        (10, 100, 1000, 10_000, 100_000, 1_000_000),
        "tokens after which modulo 3 is to be counted",
        least=0,
    )
    seed: int = seed_setting("draws the products")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)


def repeated_letters(config: LimitsConfig) -> float:
    """Largest share of the bound that a random letter with one factor, repeated, comes to."""
    rng, largest = np.random.default_rng(config.seed), 0.0
    bound = np.array([limits.most_apart(t) for t in range(STEPS)])
    for _ in range(config.products):
        k = rng.normal(size=4)
        k /= np.linalg.norm(k)
        v, state = rng.normal(size=3), rng.normal(size=(4, 3))
        beta, g = rng.uniform(0, 2), rng.choice([0, -0.01, -1])
        changes = limits.two_step_changes(k, v, beta, g, state, STEPS)
        largest = max(largest, float((changes / bound).max()))
    return largest


def measure(config: LimitsConfig) -> dict[str, Any]:
    """All numbers."""
    icosahedron = solid_matrices("A5")
    return {
        "proposition_1_worst_violation": limits.worst_violations(config.products, config.seed),
        "one_factor_states_apart_at_most": {
            str(length): limits.most_apart(length) for length in config.lengths
        },
        "one_factor_share_of_the_bound": repeated_letters(config),
        "commutator_orders_in_s5": limits.commutators_in_s5(),
        "commutator_orders_of_rotations_by_one_angle": sorted(
            limits.commutators_of_rotations(icosahedron, same_angle=True)
        ),
        "commutator_orders_of_rotations_by_two_angles": sorted(
            limits.commutators_of_rotations(icosahedron, same_angle=False)
        ),
        "factors_of_permutation_matrices": {
            group: limits.least_factors_of_permutations(group) for group in GROUPS
        },
    }


def command(argv: Sequence[str]) -> None:
    """Computes, prints and writes limits.json."""
    parsed = flags.parse(argv, {"limits": LimitsConfig}, {"default": {}})
    found = measure(LimitsConfig(**parsed.sections["limits"]))
    found["command"] = command_line("analysis.theory_limits", argv)
    write_json(parsed.workdir / "limits.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
