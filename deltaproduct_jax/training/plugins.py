"""Code from outside the project that a run needs: mixers and tasks that it registers on import."""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from deltaproduct_jax.errors import ConfigError, found_module
from deltaproduct_jax.files import user_path
from deltaproduct_jax.settings import check_fields, setting


@dataclasses.dataclass(frozen=True)
class PluginConfig:
    """What a run imports before it looks at mixers and tasks; paths become absolute."""

    plugins: tuple[str, ...] = setting(
        (), "modules or files of Python that register mixers or tasks, as my.mixers,path/to/task.py"
    )

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "plugins", tuple(map(absolute, self.plugins)))


def absolute(plugin: str) -> str:
    """A file by its whole path, so that it is found from anywhere; a module as it is."""
    return str(user_path(plugin, "plugins").absolute()) if plugin.endswith(".py") else plugin


def import_plugins(plugins: Iterable[str]) -> None:
    """Imports each, once; what an import raises of its own is not touched.

    Raises:
        ConfigError: there is no such module or file, or it ends the program.
    """
    for plugin in plugins:
        try:
            if plugin.endswith(".py"):
                _import_file(Path(absolute(plugin)))
            else:
                _import_module(plugin)
        except SystemExit as error:  # as a script does, and nothing would be said
            raise ConfigError(
                f"plugins={plugin!r} ends the program when it is imported, with {error.code!r}; "
                'what it does as a script stands under if __name__ == "__main__"'
            ) from error


def _import_module(name: str) -> None:
    if found_module(name) is None:
        raise ConfigError(
            f"plugins={name!r} is no module that can be imported; it may be one, or the path "
            "of a file that ends in .py"
        )


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"plugins={str(path)!r} is no file; it may be one, or a module's name")
    # Two files of one name are two modules.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is imported
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
