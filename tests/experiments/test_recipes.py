"""The presets that learn S4, A5 and S5: by their own settings, at a small size, the loss falls."""

import json
import pathlib

import numpy as np
import pytest

from experiments import state_tracking
from experiments.lib.sweeps.grid import build, load_script

RECIPES = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "recipes"

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


# Row of the page -> fields whose two values it has.
DIFFERENCES = {
    "sequences a step": {"batch_size"},
    "steps": {"steps"},
    "loss counts": {"grow_from", "growth", "curriculum_fraction"},
    "q and k": {"qk_activation"},
    "bias before beta's sigmoid": {"beta_bias"},
    "numbers": {"dtype"},
    "learning rate": {"learning_rate", "end_learning_rate"},
    "warm-up": {"warmup_steps"},
    "AdamW": {"adam_b2", "adam_eps"},
    "weight decay": {"weight_decay"},
    "norm of the gradient": {"clip_norm"},
    "MLP": {"intermediate_size"},
}
# What does not change training; values as wide as keys are so by default.
ELSEWHERE = {"log_every", "checkpoint_every", "select_length", "expand_v"}


def test_the_page_says_all_in_which_the_recipe_differs_from_the_papers():
    module = load_script("state_tracking")
    ours, paper = (build(module, {"preset": name}) for name in ("S5_128", "paper"))
    differ = {
        name
        for section, fields in paper.items()
        for name, value in fields.items()
        if ours[section][name] != value and not name.startswith("eval_")
    }
    assert set.union(*DIFFERENCES.values()) == differ - ELSEWHERE
    page = (RECIPES / "S5_128" / "README.md").read_text()
    assert all(f"\n| {row} | " in page for row in DIFFERENCES)
