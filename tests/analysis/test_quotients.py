"""Quotients of groups: normal subgroups known by hand, made-up answers, and a run that is read."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import flags_for, run_config

from deltaproduct_jax.analysis.quotients import quotients
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.runs import Run
from experiments import redraw, state_tracking
from experiments.analysis import quotients as script
from experiments.lib import flags

SIZES = {
    "S3": [1, 3, 6],
    "S4": [1, 4, 12, 24],
    "A4": [1, 4, 12],
    "A5": [1, 60],
    "S5": [1, 60, 120],
    "Z6": [1, 2, 3, 6],
    "Z8": [1, 2, 4, 8],
    "D4": [1, 2, 4, 4, 4, 8],
    "D3_x_Z2": [1, 2, 3, 6, 6, 6, 12],
    "Z2_x_Z2": [1, 2, 2, 2, 4],
    # Goursat: nine products of subgroups of the factors, and the pairs of equal sign.
    "S3_x_S3": [1, 3, 3, 6, 6, 9, 18, 18, 18, 36],
}


@pytest.mark.parametrize("name", SIZES)
def test_the_normal_subgroups(name):
    table = finite_group(name).table
    found = quotients(table)
    assert [len(each.normal) for each in found] == SIZES[name]
    assert len({tuple(each.normal) for each in found}) == len(found)
    for each in found:
        # Of all that a map onto cosets may be: one that keeps products, of as many elements each.
        of = each.coset_of
        quotient = of[table]
        for a, b in itertools.product(range(each.cosets), repeat=2):
            assert len(np.unique(quotient[np.ix_(of == a, of == b)])) == 1
        assert np.flatnonzero(of == 0).tolist() == each.normal.tolist()
        assert np.bincount(of).tolist() == [len(each.normal)] * each.cosets


def test_the_four_group_and_signs_of_four_points():
    perms = list(itertools.permutations(range(4)))
    _, by_four, by_signs, _ = quotients(finite_group("S4").table)
    four = [(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)]
    assert [perms[g] for g in by_four.normal] == four
    odd = [sum(p[i] > p[j] for i in range(4) for j in range(i + 1, 4)) % 2 for p in perms]
    np.testing.assert_array_equal(by_signs.coset_of, odd)
    assert (by_four.cosets, by_signs.cosets) == (6, 2)
    assert by_four.loss == pytest.approx(1.386294)


def test_a_group_of_too_many_is_refused():
    with pytest.raises(ConfigError, match="of 64 elements has more than 100 normal subgroups"):
        quotients(finite_group("_x_".join(["Z2"] * 6)).table)


def test_answers_that_are_no_element_are_wrong():
    by_element, by_signs, _ = quotients(finite_group("S3").table)
    odd, bos = [1, 2, 5], GroupTask(group="S3").bos_id  # in lexicographic order
    assert by_signs.right(odd, [1, 1, 1]).all()
    assert not by_signs.right([0, 3, 4], [1, 1, 1]).any()
    np.testing.assert_array_equal(by_element.right(odd, [1, 1, 1]), [True, False, False])
    for quotient in (by_element, by_signs):
        assert not quotient.right([6, bos, 12], [1, 5, 0]).any()
        # After BOS it is BOS that is wanted: neither another token nor the last element.
        assert quotient.right([bos, 6, 5], [bos] * 3).tolist() == [True, False, False]


def test_who_follows_a_quotient_is_right_on_so_many_elements():
    """S4 by guesses among the four elements of a coset of the four-group."""
    rng = np.random.default_rng(0)
    by_element, by_four, by_signs, _ = quotients(finite_group("S4").table)
    targets = rng.integers(0, 24, (400, 20))
    answers = finite_group("S4").table[targets, rng.choice(by_four.normal, targets.shape)]
    rights = [each.right(answers, targets).mean() for each in (by_four, by_signs, by_element)]
    assert rights[:2] == [1, 1]
    assert rights[2] == pytest.approx(1 / 4, abs=0.02)
    assert np.exp(-by_four.loss) == pytest.approx(1 / 4)


BOS = GroupTask(group="Z4").bos_id


class Follower(nnx.Module):
    """Knows the product in Z4 modulo a number, the elements that agree with it alike."""

    def __init__(self, modulo):
        self.config = run_config(group="Z4").model
        agree = np.equal.outer(np.arange(4) % modulo, np.arange(4) % modulo)
        after = np.pad(agree, [(0, 1), (0, 7)])  # ids beyond 3 are no elements
        after[4, BOS] = True
        self.logits = nnx.Param(jnp.float32(20 * after))

    def __call__(self, tokens):
        product = jnp.cumsum(jnp.where(tokens < 4, tokens, 0), axis=1) % 4
        return self.logits[jnp.where(tokens == BOS, 4, product)]


FOLLOWERS = {"best": Run(Follower(2), run_config(group="Z4", num_householder=1), 7)}
FOLLOWERS["newest"] = FOLLOWERS["best"]._replace(model=Follower(4), step=9)


def test_the_script_tells_what_models_follow_and_is_drawn_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        script, "load_group_run", lambda flag, run, checkpoint: FOLLOWERS[checkpoint]
    )
    # Of the words 64 are read by one call, the rest by another.
    argv = [f"--workdir={tmp_path}", "--runs=z4", "--checkpoint=best,newest", "--words=90"]
    assert flags.run(script.command, argv) == 0
    record = json.loads((tmp_path / "quotients.json").read_text())
    signs, all_of_it = record["models"]
    assert signs["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert all_of_it["loss"] == pytest.approx(0, abs=1e-3)
    by_element, by_signs = signs["quotients"]
    assert (by_element["normal"], by_signs["normal"]) == ([0], [0, 2])
    assert by_element["failed"] == 1
    assert by_element["at_trained"] == pytest.approx(0.5, abs=0.2)
    for known in (by_signs, *all_of_it["quotients"]):
        assert (known["at_trained"], known["at_end"], known["failed"]) == (1, 1, None)
    curves = record["panels"]["group = Z4, checkpoint = best"]
    assert curves["|N| = 2"]["median"] == [1] * 17  # BOS, and four times the length trained
    assert curves["|N| = 1"]["runs"][0][4] == by_element["at_trained"]
    text = capsys.readouterr().out
    assert "| z4 | Z4 | 1 | 0 | 7 | 0.693 | 2 | 0.693 | 2 | 1.000 | 1.000 | - |" in text
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["quotients.json", "quotients.md", "quotients.png"]
    redraw.command([f"--workdir={tmp_path}"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("fields", "arguments", "says"),
    [
        ({}, ["--length=3"], "length=3 is less than train_length=4 of z4"),
        ({"repeat_elements": 2}, [], "z4 answers late"),
        ({"group": "_x_".join(["Z2"] * 6)}, [], "has more than 100 normal subgroups"),
        ({}, ["--checkpoint="], "checkpoint is empty"),
        ({}, ["--runs="], "runs is empty"),
    ],
)
def test_errors_are_one_line(fields, arguments, says, tmp_path, capsys, monkeypatch):
    run = Run(Follower(2), run_config(**{"group": "Z4", **fields}), 7)
    monkeypatch.setattr(script, "load_group_run", lambda *given: run)
    assert flags.run(script.command, [f"--workdir={tmp_path}", "--runs=z4", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_checkpoints_of_a_run_are_read(tmp_path, capsys):
    fields = {"num_heads": 1, "head_dim": 4, "intermediate_size": 8, "implementation": "recurrent"}
    fields |= {"steps": 2, "eval_every": 1, "checkpoint_every": 1}
    assert state_tracking.main(flags_for(tmp_path / "run", **fields)) == 0
    argv = [f"--workdir={tmp_path / 'out'}", f"--runs={tmp_path / 'run'}", "--words=8"]
    assert flags.run(script.command, [*argv, "--checkpoint=2"]) == 0
    record = json.loads((tmp_path / "out" / "quotients.json").read_text())
    assert [(model["step"], model["seed"]) for model in record["models"]] == [(2, 0)]
    assert flags.run(script.command, [*argv, "--checkpoint=3"]) == 2
    assert "checkpoint=3 is not in" in capsys.readouterr().err
