"""Word problems of finite groups: after every element, name the product of all so far.

Inputs x_1..x_L are drawn uniformly, the target is y_t = x_1 * ... * x_t, and a BOS token stands
before both, so that a sequence of L elements has T = L + 1 positions. Sequences are drawn on the
fly; the published data are files of distinct sequences, which matters only where few exist.
Sources: Merrill et al., https://arxiv.org/abs/2404.08819; the variants are those of the
DeltaProduct paper, https://arxiv.org/abs/2502.10297, and of Grazzi et al.,
https://arxiv.org/abs/2411.12537.

Dimension key: ``B`` sequences, ``L`` elements per sequence, ``T`` = L + 1 positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_ascending, require_at_least
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.tasks.finite_groups import FiniteGroup, finite_group
from deltaproduct_jax.tasks.registry import register_task
from deltaproduct_jax.tasks.task import Batch, Score, score_positions

SPECIAL_TOKENS = ("PAD", "BOS", "UNK", "EOS", "SEP", "CLS", "MASK")
FILLERS = ("element", "symbol", "input_symbol")
EVAL_MULTIPLES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class GroupTask:
    """The word problem of one group; raises ConfigError where the fields make no sense."""

    group: str = setting("S3", "group: Sn, An, Zn, Dn (2n elements), or a product such as A5_x_Z9")
    train_length: int = setting(32, "elements per training sequence; BOS comes on top", least=1)
    eval_lengths: tuple[int, ...] | None = setting(
        None,
        "elements per sequence in evaluations; none: 1, 2, 4 and 8 times train_length",
        least=1,
    )
    max_displaced: int | None = setting(
        None, "draw only permutations that move at most so many points; 2: the identity and swaps"
    )
    merge_elements: int = setting(
        1,
        "multiply so many drawn elements into one token, followed by identities in their places; "
        "targets come as many tokens late as identities follow (with max_displaced=2 and 4: "
        "the paper's hard swaps)",
        least=1,
    )
    repeat_elements: int = setting(
        1, "tokens that every element takes; targets come repeat_elements - 1 tokens late", least=1
    )
    filler: str = setting(
        "element",
        "what a repeated element's further tokens are: element (itself), symbol (one more token, "
        "in inputs and targets), input_symbol (the same, in inputs only)",
        one_of=FILLERS,
    )

    def __post_init__(self):
        check_fields(self)
        group = finite_group(self.group)
        if self.eval_lengths is not None:
            require_ascending("eval_lengths", self.eval_lengths)
        self._check_combinations(group)

    def _check_combinations(self, group: FiniteGroup) -> None:
        if self.max_displaced is not None:
            if group.displaced is None:
                raise ConfigError(
                    f"max_displaced={self.max_displaced} counts the points that permutations move; "
                    f"group={self.group!r} has none: it may be Sn or An"
                )
            smallest, largest = np.unique(group.displaced)[[1, -1]]
            if not smallest <= self.max_displaced < largest:
                raise ConfigError(
                    f"max_displaced={self.max_displaced} must be at least {smallest} (the identity "
                    f"is not alone) and less than {largest} (all of {self.group})"
                )
        if self.merge_elements > 1 and self.repeat_elements > 1:
            raise ConfigError(
                f"merge_elements={self.merge_elements} and repeat_elements={self.repeat_elements} "
                "exclude each other; one of them must be 1"
            )
        if self.filler != "element" and self.repeat_elements == 1:
            raise ConfigError(
                f"filler={self.filler!r} fills nothing: repeat_elements must be at least 2"
            )

    @property
    def num_elements(self) -> int:
        """Order of the group; elements have the ids below it, whatever subset is drawn."""
        return finite_group(self.group).order

    @property
    def pad_id(self) -> int:
        """First special token; before it come the elements and, if used, the filler symbol."""
        return self.num_elements + (self.filler != "element")

    @property
    def bos_id(self) -> int:
        """The token before every sequence, in inputs and targets."""
        return self.pad_id + SPECIAL_TOKENS.index("BOS")

    @property
    def answers_every_token(self) -> bool:
        """Unless elements take several tokens."""
        return self.merge_elements == self.repeat_elements == 1

    @property
    def vocab_size(self) -> int:
        """Elements, the filler symbol if used, and the special tokens."""
        return self.pad_id + len(SPECIAL_TOKENS)

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Lengths at which a run is evaluated, ascending."""
        if self.eval_lengths is not None:
            return self.eval_lengths
        return tuple(multiple * self.train_length for multiple in EVAL_MULTIPLES)

    def check_length(self, name: str, length: int) -> None:
        """Raises ConfigError, naming the field, unless ``length`` is positive."""
        require_at_least(name, length, 1)

    def letters(self) -> np.ndarray:
        """Indices of the elements that are drawn."""
        group = finite_group(self.group)
        if self.max_displaced is None:
            return np.arange(group.order)
        return np.flatnonzero(group.displaced <= self.max_displaced)

    def batch(self, key: jax.Array, batch_size: int, length: int) -> Batch:
        """Draws ``batch_size`` sequences of ``length`` elements; all positions count.

        Args:
            key: the only source of chance.
            batch_size: B, static.
            length: L, static; ``T = L + 1``.
        """
        letters = jnp.asarray(self.letters(), dtype=jnp.int32)
        drawn_BL = letters[
            jax.random.randint(key, (batch_size, length), 0, letters.size, jnp.int32)
        ]
        inputs_BL, targets_BL = self.word_problem(drawn_BL)
        bos_B1 = jnp.full((batch_size, 1), self.bos_id, dtype=jnp.int32)
        return Batch(
            inputs=jnp.concatenate([bos_B1, inputs_BL], axis=1),
            targets=jnp.concatenate([bos_B1, targets_BL], axis=1),
            mask=jnp.ones((batch_size, length + 1), dtype=bool),
        )

    def word_problem(self, drawn_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets ``[B, L]``, without BOS, of the drawn elements ``[B, L]``."""
        if self.merge_elements > 1:
            return self._merged(drawn_BL)
        if self.repeat_elements > 1:
            return self._repeated(drawn_BL)
        return drawn_BL, self.running_products(drawn_BL)

    def running_products(self, elements_BL: jax.Array) -> jax.Array:
        """y_t = x_1 * ... * x_t, in logarithmic depth."""
        products = jnp.asarray(finite_group(self.group).table)
        return jax.lax.associative_scan(lambda p, q: products[p, q], elements_BL, axis=1)

    def _merged(self, drawn_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        width = self.merge_elements
        batch_size, length = drawn_BL.shape
        padded_BL = jnp.pad(drawn_BL, ((0, 0), (0, -length % width)))  # 0 is the identity
        blocks = padded_BL.reshape(-1, width)
        merged = jnp.zeros_like(blocks).at[:, 0].set(self.running_products(blocks)[:, -1])
        inputs_BL = merged.reshape(batch_size, -1)[:, :length]
        return inputs_BL, _late(self.running_products(inputs_BL), width - 1)

    def _repeated(self, drawn_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        width = self.repeat_elements
        length = drawn_BL.shape[1]
        blocks_BL = drawn_BL[:, : -(-length // width)]
        inputs_BL = jnp.repeat(blocks_BL, width, axis=1)[:, :length]
        targets_BL = jnp.repeat(self.running_products(blocks_BL), width, axis=1)[:, :length]
        if self.filler != "element":
            filled_L = jnp.arange(length)[None, :] % width != 0
            symbol = jnp.int32(self.num_elements)
            inputs_BL = jnp.where(filled_L, symbol, inputs_BL)
            if self.filler == "symbol":
                targets_BL = jnp.where(filled_L, symbol, targets_BL)
        return inputs_BL, _late(targets_BL, width - 1)

    def score(self, correct_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, Score]:
        """Scores answers ``[B, T]`` under both protocols.

        "paper" counts every position, the given BOS included, as the published numbers do;
        "strict" does not count BOS, the one answer that is always known.
        """
        after_bos_BT = np.array(mask_BT, dtype=bool)
        after_bos_BT[:, 0] = False
        return {
            "paper": score_positions(correct_BT, mask_BT),
            "strict": score_positions(correct_BT, after_bos_BT),
        }


def _late(targets_BL: jax.Array, delay: int) -> jax.Array:
    """The targets ``delay`` positions later; the identity (0) is wanted until then."""
    length = targets_BL.shape[1]
    return jnp.pad(targets_BL, ((0, 0), (delay, 0)))[:, :length]


register_task("groups", GroupTask)
