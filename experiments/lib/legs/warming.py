"""Programs of first legs, compiled while their text becomes tokens: GPUs would else wait for both.

Programs do not depend on what a text says. Each leg is trained on a made-up one, in a folder that
is removed, until it has been validated: then its programs are among those that JAX keeps. That
helps wherever the vocabulary is the tokenizer's own; one learned from the text may be smaller here.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence

from experiments.lib.children import ON_CPU, Child
from experiments.lib.legs.config import LegConfig
from experiments.lib.legs.jobs import Place, progress_of
from experiments.lib.legs.leg import TEST_PATHS, VALID_PATHS, Leg, preparations

FOLDER = "warming"
ROWS = 80  # of each split, more than are validated on
BYTES_OF_TOKEN = 6  # at most, of the lines below
SOON = "--eval_every=2"  # steps


class Warming:
    """Trains a leg for each GPU for a moment.

    Args:
        legs: the first of each GPU.
        config: of all of them.
        place: where they run.
    """

    def __init__(self, legs: Sequence[Leg], config: LegConfig, place: Place):
        self._config, self._place = config, place
        self.folder = place.workdir / FOLDER
        shutil.rmtree(self.folder, ignore_errors=True)
        self._legs = [Leg(leg.name, leg.seed, self.folder) for leg in legs[: place.slots]]
        size = ROWS * config.train_length * BYTES_OF_TOKEN
        for name in ("drivers/a.c", *(path.strip("*/") + "/a.c" for path in _HELD_OUT)):
            file = self.folder / "text" / "code" / name
            file.parent.mkdir(parents=True)
            file.write_text("".join(_lines(size)))
        command = preparations(self.folder, config.tokenizer)["code"]
        self._preparing: Child | None = self._child(command, ON_CPU)
        self._training: list[tuple[Leg, Child]] = []

    def step(self) -> bool:
        """Looks at what runs; False once nothing is left to do."""
        if self._preparing is not None:
            code = self._preparing.poll()
            if code is None:
                return True
            self._preparing = None
            config, place = self._config, self._place
            if code == 0:
                of_slots = [
                    place.variables(slot, place.share(leg, config))
                    for slot, leg in enumerate(self._legs)
                ]
                self._training = [
                    (leg, self._child([*config.training(leg), SOON], variables))
                    for leg, variables in zip(self._legs, of_slots, strict=True)
                ]
        for leg, child in list(self._training):
            if child.poll() is not None or progress_of(leg).is_validated:
                child.kill()
                self._training.remove((leg, child))
        return bool(self._training)

    def close(self) -> None:
        """Ends what runs, and removes the folder."""
        for child in filter(None, (self._preparing, *(child for _, child in self._training))):
            child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _child(self, command: list[str], variables: Mapping[str, str]) -> Child:
        return self._place.child(command, variables, log=self._place.log(FOLDER))


_HELD_OUT = (VALID_PATHS[0], TEST_PATHS[0])


def _lines(size: int) -> Iterator[str]:
    """So many bytes of C, no two lines alike."""
    number = 0
    while size > 0:
        line = f"int f{number}(int x) {{ return x + {number * number}; }}\n"
        size -= len(line)
        number += 1
        yield line


@contextlib.contextmanager
def warmed(legs: Sequence[Leg], config: LegConfig, place: Place) -> Iterator[Warming]:
    """A `Warming` that is closed in the end."""
    warming = Warming(legs, config, place)
    try:
        yield warming
    finally:
        warming.close()
