"""The presets that learn S4, A5 and S5: by their own settings, at a small size, the loss falls."""

import json

import numpy as np
import pytest

from experiments import state_tracking

SMALL = {
    "train_length": 6,
    "select_length": 6,
    "eval_lengths": "6,12",
    "hidden_size": 32,
    "num_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "batch_size": 32,
    "steps": 40,
    "warmup_steps": 4,
    "log_every": 1,
    "eval_every": 40,
    "checkpoint_every": 40,
    "eval_sequences": 16,
    "eval_batch_size": 16,
}


def train(workdir, preset, **changed):
    """The records of the steps of one run by the command."""
    settings = SMALL | changed
    argv = [f"--workdir={workdir}", f"--preset={preset}"]
    assert state_tracking.main([*argv, *(f"--{k}={v}" for k, v in settings.items())]) == 0
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("preset", ["S4", "A5", "S5"])
@pytest.mark.slow
def test_a_preset_learns(preset, tmp_path):
    rows = train(tmp_path, preset, learning_rate=5e-3)
    loss = np.array([row["loss"] for row in rows])
    length = np.array([row["length"] for row in rows])
    assert np.isfinite(loss).all()
    assert len(loss) == SMALL["steps"]
    # The prefix grows from 3 tokens to all; at every length the loss falls, and it does in all.
    assert length[0] == 3
    assert length[-1] == SMALL["train_length"]
    assert (np.diff(length) >= 0).all()
    assert loss[length == 3][-1] < loss[0]
    assert loss[-5:].mean() < 0.9 * loss[:3].mean()
