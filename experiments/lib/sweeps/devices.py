"""Where the runs of a sweep run: settings of their devices, which are no part of what a run is."""

import dataclasses
from collections.abc import Mapping

from absl import flags as absl_flags

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.parallel.config import DeviceConfig
from experiments.lib import flags

# A run of a sweep is one process.
JOINING = ("distributed", "coordinator_address", "num_processes", "process_id")
SETTINGS = tuple(f.name for f in dataclasses.fields(DeviceConfig) if f.name not in JOINING)


def device_flags(given: Mapping[str, str]) -> list[str]:
    """The flags of a run that the settings of ``--devices`` stand for.

    Raises:
        ConfigError: a setting is none of a single process's devices, or makes no sense.
    """
    for name in given:
        if name not in SETTINGS:
            raise ConfigError(
                f"--devices: {name!r} is none of {', '.join(SETTINGS)}; a run of a sweep is one "
                "process"
            )
    written = [f"--{name}={value}" for name, value in given.items()]
    try:
        parsed = flags.parse(
            ["--workdir=.", *written],
            {"devices": DeviceConfig},
            {"default": {}},
            exclude=JOINING,
            writes=False,
        )
        DeviceConfig(**parsed.sections["devices"])
    except (absl_flags.Error, ConfigError) as error:
        raise ConfigError(f"--devices: {error}") from error
    return written
