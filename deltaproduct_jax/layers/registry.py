"""The mixers that a configuration may name, each registered once: layer, state, fields, checks.

What a mixer takes of a configuration is read from its constructor: a keyword that is also a field
gets the field's value. ``models/README.md`` shows a mixer of one's own.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deltaproduct_jax.errors import ConfigError, refuse_taken, require_name
from deltaproduct_jax.layers.mixer import SequenceMixer
from deltaproduct_jax.settings import require_settings, shown

MIXERS: dict[str, "RegisteredMixer"] = {}


@dataclasses.dataclass(frozen=True)
class RegisteredMixer:
    """A mixer as configurations know it; the attributes are what :func:`register_mixer` takes."""

    name: str
    layer: type
    state: type
    config: type | None
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    by_block: Callable[[int], Mapping[str, Any]]
    check: Callable[[Any], None]
    idle: Callable[[Mapping[str, Any]], Iterable[str]]

    @functools.cached_property
    def keywords(self) -> dict[str, Any]:
        """Keywords of the constructor that a field may give, with their defaults."""
        own = _keywords(self.layer)
        for name in ("rngs", *self.fixed, *self.by_block(0)):
            own.pop(name, None)
        return own

    def kind_of(self, block: int) -> tuple[str, Mapping[str, Any]]:
        """What tells the layers of this and of other mixers apart, by the number of the block."""
        return self.name, self.by_block(block)

    def takes(self, name: str) -> bool:
        """Whether a field of that name reaches the layer."""
        return name in self.keywords

    def default(self, name: str) -> Any:
        """What such a field means where none is given: the mixer's own choice, or the layer's."""
        return self.defaults[name] if name in self.defaults else self.keywords.get(name)


def _keywords(layer: type) -> dict[str, Any]:
    """Keywords of a constructor; where it passes ``**kwargs`` on, those of its parent as well."""
    found: dict[str, Any] = {}
    for kind in layer.__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        for each in parameters:
            if each.kind is each.KEYWORD_ONLY:
                found.setdefault(each.name, None if each.default is each.empty else each.default)
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return found


def register_mixer(
    name: str,
    layer: type,
    *,
    state: type,
    config: type | None = None,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    by_block: Callable[[int], Mapping[str, Any]] = lambda block: {},
    check: Callable[[Any], None] = lambda config: None,
    idle: Callable[[Mapping[str, Any]], Iterable[str]] = lambda values: (),
) -> None:
    """Makes ``mixer=name`` a choice of every configuration.

    Args:
        name: what the field ``mixer`` says.
        layer: a :class:`SequenceMixer`, built as ``layer(hidden_size, rngs=rngs, **keywords)``.
        state: class of what its ``init_state`` returns.
        config: a frozen dataclass derived from ``ModelConfig`` with the mixer's own fields, each a
            ``setting``; None where those of ``ModelConfig`` do. Its fields become flags.
        defaults: what a field of a model means where none is given, if not the layer's default.
        fixed: keywords of the layer that the name decides.
        by_block: (number of the block, from 0) -> keywords of the layer that depend on it.
        check: raises ConfigError for a configuration that the mixer cannot honour.
        idle: (values of fields) -> those among the mixer's that mean nothing beside the others, so
            that a preset's value gives way.

    Raises:
        ConfigError: the name is no text or taken by another class, or an argument is not as said.
    """
    require_name("mixer", name)
    if not (isinstance(layer, type) and issubclass(layer, SequenceMixer)):
        raise ConfigError(f"layer={layer!r} of mixer {name!r} must be a class of SequenceMixer")
    absent = [a for a in dir(layer) if getattr(getattr(layer, a), "__isabstractmethod__", False)]
    absent += [] if "rngs" in _keywords(layer) else ["a keyword rngs of its constructor"]
    if absent:
        raise ConfigError(f"layer={layer!r} of mixer {name!r} must have {', '.join(absent)}")
    if not isinstance(state, type):
        raise ConfigError(f"state={state!r} of mixer {name!r} must be a class")
    if config is not None:
        # A model's fields, which are known above only, are told by two of them.
        require_settings(f"config of mixer {name!r}", config, ("mixer", "vocab_size"))
        idle_fields = set(vars(config).get("__annotations__", ())) - _keywords(layer).keys()
        if idle_fields:
            raise ConfigError(
                f"fields {', '.join(sorted(idle_fields))} of the config of mixer {name!r} are no "
                f"keywords of {layer.__name__}, so that they would do nothing"
            )
    for what, function in {"by_block": by_block, "check": check, "idle": idle}.items():
        if not callable(function):
            raise ConfigError(f"{what}={function!r} of mixer {name!r} must be a function")
    taken = inspect.signature(layer.__init__).parameters.values()
    takes = {each.name for each in taken} | _keywords(layer).keys()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken)
    _require_keywords(f"defaults of mixer {name!r}", defaults or {}, _keywords(layer).keys())
    for what, given in {"fixed": fixed or {}, "by_block(0)": by_block(0)}.items():
        _require_keywords(f"{what} of mixer {name!r}", given, None if takes_any else takes)
    refuse_taken("mixer", name, layer, MIXERS[name].layer if name in MIXERS else None)
    MIXERS[name] = RegisteredMixer(
        name, layer, state, config, defaults or {}, fixed or {}, by_block, check, idle,
    )  # fmt: skip


def _require_keywords(what: str, given: Any, known: Iterable[str] | None) -> None:
    """ConfigError unless these are values by keyword; of None any keyword will do."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be values by keyword, got {shown(given)}")
    strange = [] if known is None else [str(key) for key in given if key not in known]
    if strange:
        raise ConfigError(f"{what}: {', '.join(strange)} is no keyword of the layer's constructor")
