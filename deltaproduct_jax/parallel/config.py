"""Where a run runs, as settings: mesh, processes, a cache. They are no part of what a run is."""

import dataclasses
import math

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import check_fields, setting, whole_number

# In the order in which neighbouring devices are given out, the last one's the closest.
AXES = ("data", "fsdp", "sequence", "tensor")
DEFAULT_MESH = "data:-1,fsdp:1,tensor:1,sequence:1"
GROUPS = "slices or processes"  # what dcn_mesh puts in order


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """Devices of a run; raises ConfigError where the fields make no sense.

    None of them changes what is computed beyond rounding, so that they are not in config.json: a
    run goes on over any other mesh.
    """

    mesh: str = setting(
        DEFAULT_MESH,
        "devices along each axis, -1 for what is left: data cuts batches; fsdp cuts batches, "
        "parameters and AdamW's moments; tensor cuts heads and the MLP's width; sequence cuts "
        "tokens; an axis that is not named has 1",
    )
    dcn_mesh: str | None = setting(
        None,
        "slices of TPUs, or else processes, along each axis, as data:2, -1 for what is left; mesh "
        "is then of the devices of each; none: all devices are taken for equally near",
    )
    distributed: bool = setting(
        False, "join the processes of a TPU pod or a SLURM job, which JAX finds by itself"
    )
    coordinator_address: str | None = setting(
        None, "host:port of process 0, where no cluster is found; with the two flags below"
    )
    num_processes: int | None = setting(
        None, "processes of the run, with coordinator_address", least=1
    )
    process_id: int | None = setting(None, "number of this process, from 0")
    profile_steps: str | None = setting(
        None, "first and last step of a trace that is written to the run directory, as 10:13"
    )

    compilation_cache: str | None = setting(
        None, "directory of compiled programs, which the next start need not compile; none: none"
    )

    def __post_init__(self):
        check_fields(self)
        self.sizes()
        self.dcn_sizes()
        self.profiled_steps()
        given = {
            name: getattr(self, name)
            for name in ("coordinator_address", "num_processes", "process_id")
        }
        missing = [name for name, value in given.items() if value is None]
        if missing and len(missing) < len(given):
            raise ConfigError(
                f"{missing[0]} is missing; coordinator_address, num_processes and process_id "
                "belong together"
            )
        if missing:
            return
        host, _, port = self.coordinator_address.rpartition(":")
        if not host.strip() or not 0 < (whole_number(port) or 0) < 2**16:
            raise ConfigError(
                f"coordinator_address={self.coordinator_address!r} is not known; it may be "
                "host:port, the port from 1 to 65535"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"process_id={self.process_id} must be from 0 to {self.num_processes - 1}, one "
                f"less than num_processes={self.num_processes}"
            )

    def profiled_steps(self) -> tuple[int, int] | None:
        """First and last step of the trace, None without one."""
        if self.profile_steps is None:
            return None
        first, last = map(whole_number, self.profile_steps.partition(":")[::2])
        if first is None or last is None or not 0 < first <= last:
            raise ConfigError(
                f"profile_steps={self.profile_steps!r} is not known; it may be as '10:13', first "
                "and last step, from 1"
            )
        return first, last

    def sizes(self) -> dict[str, int]:
        """Devices along every axis as written, -1 among them."""
        return _sizes("mesh", self.mesh, DEFAULT_MESH)

    def dcn_sizes(self) -> dict[str, int]:
        """Slices, or processes, along every axis as written, -1 among them; 1 without any."""
        return _sizes("dcn_mesh", "data:1" if self.dcn_mesh is None else self.dcn_mesh, "data:-1")

    def sizes_of(self, devices: int) -> dict[str, int]:
        """Devices along every axis when there are so many."""
        return _filled("mesh", self.mesh, self.sizes(), devices, "devices")

    def dcn_sizes_of(self, groups: int) -> dict[str, int]:
        """Groups of devices along every axis when there are so many, of which all must be taken."""
        sizes = _filled("dcn_mesh", self.dcn_mesh, self.dcn_sizes(), groups, GROUPS)
        if math.prod(sizes.values()) != groups:
            raise ConfigError(f"dcn_mesh={self.dcn_mesh!r} must take all of the {groups} {GROUPS}")
        return sizes


def _sizes(flag: str, text: str, example: str) -> dict[str, int]:
    """A mesh as it is written: sizes by axis, -1 among them."""
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        name, colon, digits = part.strip().partition(":")
        size = -1 if digits == "-1" else whole_number(digits)
        if name not in AXES or name in seen or not colon or not size:
            raise ConfigError(
                f"{flag}={text!r} is not known; it may be as {example!r}: each axis once at most, "
                "with its size, at least 1, or -1 for what is left"
            )
        seen.add(name)
        sizes[name] = size
    if list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"{flag}={text!r} has -1 more than once; one axis may have it")
    return sizes


def _filled(flag: str, text: str, sizes: dict[str, int], there: int, what: str) -> dict[str, int]:
    """The sizes with a number for -1."""
    fixed = math.prod(max(size, 1) for size in sizes.values())
    if -1 in sizes.values():
        if there % fixed:
            raise ConfigError(
                f"{flag}={text!r} takes a multiple of {fixed} {what}; there are {there}"
            )
        return {name: there // fixed if size == -1 else size for name, size in sizes.items()}
    if fixed > there:
        raise ConfigError(
            f"{flag}={text!r} takes {fixed} {what}; there are {there}; -1 as the size of an axis "
            "is what is left"
        )
    return sizes
