"""What the harness asks, as our scorer and generator take it; nothing here needs the harness."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.scoring import Pair
from deltaproduct_jax.models.generation import Request, Sampling


def cut(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Pair:
    """The last ``max_length + 1`` ids: the last of them is only a target.

    Raises:
        ConfigError: the continuation alone is longer.
    """
    if len(continuation) > max_length:
        raise ConfigError(
            f"max_length={max_length} is too small; a continuation has {len(continuation)} tokens"
        )
    kept = max_length + 1 - len(continuation)
    return Pair(context[-kept:], continuation)


def windows(ids: Sequence[int], before: int, max_length: int) -> Iterator[Pair]:
    """A text in pieces of ``max_length``, each behind as many tokens as it leaves room for.

    The first piece stands behind ``before`` alone, the last, which may be shorter, behind more.
    Every token is in one continuation.
    """
    row = [before, *ids]
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        yield Pair(row[max(0, end - max_length) : start + 1], row[start + 1 : end + 1])


def as_request(
    ids: Sequence[int],
    options: Mapping[str, Any],
    *,
    max_length: int,
    key: int,
    ends: tuple[int, ...],
) -> Request:
    """A prompt to go on from, cut at its left where it and what is asked for exceed the length.

    Args:
        ids: the prompt, one token at least.
        options: of the task, as the harness's ``normalize_gen_kwargs`` returns them.
        max_length: tokens of a prompt and what follows.
        key: of the request's random draws.
        ends: ids that end a document.

    Raises:
        ConfigError: an option is not known, or too many tokens are asked for.
    """
    given = dict(options)
    most, stop = given.pop("max_gen_toks"), given.pop("until")
    sampling = {name: given.pop(name) for name in ("top_k", "top_p", "min_p") if name in given}
    is_drawn, temperature = given.pop("do_sample"), given.pop("temperature", 1.0)
    if given:
        raise ConfigError(f"{', '.join(given)}: no known option of a task that has text written")
    if most >= max_length:
        raise ConfigError(f"max_gen_toks={most} must be below max_length={max_length}")
    return Request(
        prompt=ids[most - max_length :],
        max_tokens=most,
        sampling=Sampling(temperature=temperature if is_drawn else 0.0, **sampling),
        key=key,
        stop_tokens=ends,
        stop=tuple(string for string in stop if string),
    )
