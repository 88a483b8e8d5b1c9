"""Which dtype a matmul multiplies in, and how exactly: one rule for every implementation."""

import dataclasses

import jax
import jax.numpy as jnp

# What a caller may name. None stands for the rule in `Matmul.of`.
PRECISIONS = {
    "default": jax.lax.Precision.DEFAULT,
    "high": jax.lax.Precision.HIGH,
    "highest": jax.lax.Precision.HIGHEST,
}


# Added to the sum of squares, inside the root, as the published layer does.
L2NORM_EPSILON = 1e-6


def accumulator_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Dtype of the state, of gate sums and of matmul results: float64 for float64, else float32."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def common_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """What JAX promotes these dtypes to, also where it is told to be strict and to promote none."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


@dataclasses.dataclass(frozen=True)
class Matmul:
    """An einsum of two operands with the operand dtype and the precision fixed.

    Attributes:
      operand: both operands are cast to this dtype; the result is always its accumulator dtype.
      precision: what the platform may do with float32 operands (bfloat16 passes, TF32, or neither).
      skips_groups_of_one: leave an axis "g" of one entry out of the product. With it the order of
        axes is none that a product has, and on a CPU every result is copied into another.
    """

    operand: jnp.dtype
    precision: jax.lax.Precision
    skips_groups_of_one: bool = False

    @classmethod
    def of(cls, dtype: jax.typing.DTypeLike, precision: str | None) -> "Matmul":
        """The rule for the large matmuls of a chunk, for inputs of ``dtype``.

        float32 and float64 inputs: true products of that dtype unless ``precision`` says less.
        bfloat16 inputs: bfloat16 operands with float32 accumulation for None and "default"; float32
        operands for "high" and "highest", which keeps pseudo-values and state free of rounding.
        """
        dtype = jnp.dtype(dtype)
        if dtype == jnp.bfloat16 and precision in (None, "default"):
            return cls(dtype, jax.lax.Precision.DEFAULT)
        return cls.wide(dtype, precision)

    @classmethod
    def wide(cls, dtype: jax.typing.DTypeLike, precision: str | None) -> "Matmul":
        """The rule where bfloat16 operands never do: inverse, gate sums, recurrence."""
        return cls(accumulator_dtype(dtype), PRECISIONS[precision or "highest"])

    @classmethod
    def of_inverse_and_gates(
        cls, platform: str, dtype: jax.typing.DTypeLike, precision: str | None
    ) -> tuple["Matmul", "Matmul"]:
        """The rules of the triangular inverse and of sums of gates, for inputs of ``dtype``.

        A TPU multiplies float32 in passes over bfloat16 parts, six for the last bit and three for
        an error of about 2^-16. With bfloat16 inputs the inverse is applied to 2^-17
        (`in_two_passes`), and all that decays multiply is rounded to 2^-9: there three are enough.
        Elsewhere sums of gates are exact whatever ``precision`` says.
        """
        if platform == "tpu" and jnp.dtype(dtype) == jnp.bfloat16 and precision is None:
            return cls.wide(dtype, "high"), cls.wide(dtype, "high")
        return cls.wide(dtype, precision), cls.wide(dtype, "highest")

    @property
    def is_true_float32(self) -> bool:
        """Whether operands are float32 and nothing less is multiplied."""
        return self.operand == jnp.float32 and self.precision == jax.lax.Precision.HIGHEST

    def __call__(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """``jnp.einsum(equation, x, y)`` under this rule."""
        axis = None
        if self.skips_groups_of_one:
            equation, x, y, axis = _without_groups_of_one(equation, x, y)
        product = jnp.einsum(
            equation,
            x.astype(self.operand),
            y.astype(self.operand),
            precision=self.precision,
            preferred_element_type=accumulator_dtype(self.operand),
        )
        return product if axis is None else jnp.expand_dims(product, axis)

    def in_two_passes(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """The same with ``x`` to 2^-17: where operands are bfloat16, as a sum of two of them.

        For the triangular inverse. With beta near 2 and equal keys it turns errors of its own
        entries into errors of the state that no later update takes back, while those of what it is
        applied to act like errors of the values.
        """
        if self.operand != jnp.bfloat16:
            return self(equation, x, y)
        # Not a conversion there and back, which a compiler may leave out.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return self(equation, high, y) + self(equation, x - high, y)


def _without_groups_of_one(equation: str, x: jax.Array, y: jax.Array):
    """The product without the axis "g", if that has one entry, and where the result had it."""
    operands, result = equation.split("->")
    axes = [
        names.index("g") - len(names) if "g" in names else None for names in operands.split(",")
    ]
    sizes = {a.shape[axis] for a, axis in zip((x, y), axes, strict=True) if axis is not None}
    if sizes != {1}:
        return equation, x, y, None
    x, y = (
        a if axis is None else jnp.squeeze(a, axis) for a, axis in zip((x, y), axes, strict=True)
    )
    axis = result.index("g") - len(result) if "g" in result else None
    return equation.replace("g", ""), x, y, axis
