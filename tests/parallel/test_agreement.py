"""Processes agree on the step that they stop behind, however fast they go; threads stand in."""

import contextlib
import random
import threading
import time

import jax
import pytest
from orbax.checkpoint import multihost

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.parallel import processes


class Store:
    """What processes tell each other through, as JAX's client has it, slowly."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value, *, allow_overwrite):
        """Tells."""
        assert allow_overwrite
        time.sleep(random.uniform(0, 0.01))
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        """Hears."""
        time.sleep(random.uniform(0, 0.01))
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self._values[key]

    @contextlib.contextmanager
    def unheard(self, why="DEADLINE_EXCEEDED"):
        """Inside, nobody hears anything."""

        def fail(*_):
            raise jax.errors.JaxRuntimeError(why)

        self.blocking_key_value_get = fail
        yield
        del self.blocking_key_value_get


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_stop_behind_the_same_step_however_fast_they_go(count, monkeypatch):
    store = Store()
    monkeypatch.setattr(multihost, "get_jax_distributed_client", lambda: store)
    monkeypatch.setattr(processes, "LISTENING_S", 0.01)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    for trial in range(6):
        agreements = []
        monkeypatch.setattr(processes.Agreement, "_numbers", iter([trial] * count))
        for index in range(count):
            monkeypatch.setattr(jax, "process_index", lambda index=index: index)
            agreements.append(processes.Agreement())
        together, first = threading.Barrier(count), 100 * trial
        stopped = [None] * count

        def run(index, agreements=agreements, together=together, first=first, stopped=stopped):
            for step in range(first + 1, first + 100_000):
                together.wait(timeout=10)  # as a step's sums of gradients have them wait
                if agreements[index].reached(step):
                    stopped[index] = step
                    return

        threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        time.sleep(random.uniform(0, 0.02))
        for asked in random.sample(agreements, random.randint(1, count)):
            asked.ask()
        for thread in threads:
            thread.join(timeout=20)
        assert stopped[0] is not None
        assert len(set(stopped)) == 1
        for agreement in agreements:
            agreement.close()


def test_without_a_request_nobody_stops_and_a_store_that_is_gone_is_no_error(monkeypatch):
    class Gone(Store):
        """A service that has ended."""

        def key_value_set(self, key, value, *, allow_overwrite):
            """Fails."""
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    monkeypatch.setattr(multihost, "get_jax_distributed_client", Gone)
    monkeypatch.setattr(processes, "LISTENING_S", 0.01)
    agreement = processes.Agreement()
    agreement.ask()
    assert not any(agreement.reached(step) for step in range(100))
    agreement.close()


def test_processes_that_were_given_something_else_say_so(monkeypatch):
    given = {"seed": 0, "eval_lengths": (4, 8), "mesh": "data:2", "bucket": None}
    each = [given, given | {"eval_lengths": [4, 8]}, given | {"mesh": "fsdp:-1"}]
    monkeypatch.setattr(multihost, "get_jax_distributed_client", lambda: store)
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def says(index):
        monkeypatch.setattr(processes, "_meetings", iter([7]))
        monkeypatch.setattr(jax, "process_index", lambda: index)
        try:
            processes.require_same(each[index])
        except ConfigError as error:
            return str(error)
        return ""

    store = Store()
    with store.unheard("UNAVAILABLE: it has ended"):
        assert [says(index) for index in range(3)] == ["", "", ""]  # JAX says so, and ends all
    with store.unheard():
        silent = "has not said in 300 seconds what it is to train"
        assert [silent in says(index) for index in range(3)] == [True] * 3
    tail = "; all processes take the same flags, but for process_id, and see the same run"
    assert says(0) == f"mesh='data:2' here, 'fsdp:-1' in process 2{tail}"
    assert says(1) == ""
    assert says(2) == f"mesh='fsdp:-1' here, 'data:2' in process 0{tail}"


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the index as so many processes; returns what each raised, or None."""
    own, store = threading.local(), Store()
    monkeypatch.setattr(multihost, "get_jax_distributed_client", lambda: store)
    monkeypatch.setattr(processes, "LISTENING_S", 0.05)
    monkeypatch.setattr(jax, "process_index", lambda: own.index)

    def run(count, work):
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(processes, "_meetings", iter([count] * count))
        raised = [None] * count

        def process(index):
            own.index = index
            try:
                work(index)
            except Exception as error:
                raised[index] = error

        threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert not any(thread.is_alive() for thread in threads)
        return raised

    return run


@pytest.mark.parametrize("unable", [None, 0, 1, 2])
def test_the_first_goes_first_and_none_goes_on_where_one_cannot(unable, together):
    entered, left = [], []

    def work(index):
        with processes.first_goes_first("try"):
            entered.append(index)
            if index == unable:
                raise RunDirectoryError("a disk is full")
            time.sleep(0.02 * index)
        left.append(index)

    raised = together(3, work)
    assert entered[0] == 0
    if unable is None:
        assert raised == [None] * 3
        assert sorted(left) == [0, 1, 2]
        return
    assert left == []
    assert entered == [0] or unable != 0
    others = f"process {unable} cannot go on: a disk is full"
    assert [str(e) for e in raised] == [
        "a disk is full" if n == unable else others for n in range(3)
    ]


def test_the_end_of_the_first_does_not_hide_ones_own_error(together, monkeypatch):
    get = Store.blocking_key_value_get

    def gone(store, key, timeout_in_ms):
        if key.endswith("known"):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: it has ended")
        return get(store, key, timeout_in_ms)

    monkeypatch.setattr(Store, "blocking_key_value_get", gone)

    def work(index):
        with processes.first_goes_first("try"):
            if index == 1:
                raise ConfigError("too large")

    assert [str(error) for error in together(2, work)] == [
        "process 1 cannot go on: too large",
        "too large",
    ]
