"""The search that all mixers get: the same number of tries, chosen by what is not reported."""

import json
import re
import signal
import types

import pytest
from sweeps.search_stand_in import TINY, argv, ends

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.training.stopping import Stopped
from experiments import prepare_text, redraw, search
from experiments.lib import searches
from experiments.lib.figures import searched, style
from experiments.lib.run_records import Record
from experiments.lib.sweeps.grid import build, load_script, parse_fixed


def test_the_best_on_the_validation_split_is_trained_anew(tmp_path, monkeypatch, capsys):
    """One setting of GLA has a seed that fails, and the second is the best for both."""
    second = searches.tried_of(3, (1e-3, 1e-1))[1]["learning_rate"]

    def valid(settings):
        if settings["mixer"] == "gla" and settings["learning_rate"] == "0.1":
            return None if settings["seed"] == "0" else 1.0
        return 0.5 if settings["learning_rate"] == second else 0.25

    def test(settings):  # what was not chosen would do better
        return int(settings["seed"]) / 1002 if settings["learning_rate"] == second else 1.0

    monkeypatch.setattr(search, "run_sweep", ends(valid, test))
    more = ["--settings=3", "--seeds=2", "--fresh=3", "--threshold=0.999", "--lowest_rate=1e-3"]
    assert search.main(argv(tmp_path, *more, "--highest_rate=1e-1")) == 0
    record = json.loads((tmp_path / "search.json").read_text())
    assert [arm["chosen"] for arm in record["tried"]] == [1, 1]
    failed = record["tried"][1]["settings"][2]["validation"]
    assert failed == [None, [1.0, 1.0, -1e-3]]
    delta, gla = record["rows"]
    assert delta["arm"] == "mixer = delta_product, n_h = 3"
    assert delta["scores"] == gla["scores"] == [seed / 1002 for seed in (1000, 1001, 1002)]
    assert (delta["median"], delta["best"], delta["escaped"], delta["runs"]) == (
        1001 / 1002, 1.0, 1 + 1, 3,
    )  # fmt: skip
    assert delta["initial_gate"] is None is gla["beta_bias"]
    assert record["hours"] == pytest.approx(17 / 3600)
    assert (record["metric"], record["missing"], record["stopped"]) == (
        "strict.sequence_accuracy", 1, False,
    )  # fmt: skip
    picture, table = (tmp_path / "search.png").read_bytes(), (tmp_path / "search.md").read_text()
    assert "| delta_product, n_h = 3 | 7,000 | 0.01 |" in table
    assert "Runs without results: 1. They count as the worst.\n" in table
    assert "Scores are strict.sequence_accuracy at the longest test length on the test s" in table
    assert "; from 0.999 on a run has escaped." in table
    assert "at an end of the rates" not in table
    assert "scores" not in (tmp_path / "search.csv").read_text()
    dirty = searched.search_markdown(record | {"commits": ["0123456-dirty"]})
    assert "commit 0123456-dirty." in dirty
    (tmp_path / "search.png").unlink()
    assert redraw.command([f"--workdir={tmp_path}"]) is None
    assert (tmp_path / "search.png").read_bytes() == picture
    assert "search.png" in capsys.readouterr().out
    # The run that failed has come to its end since: what is chosen now joins what was trained,
    # of which nothing is run again.
    once = lambda settings: valid(settings | {"seed": "1"})
    monkeypatch.setattr(search, "run_sweep", ends(once, test))
    assert search.main(argv(tmp_path, *more, "--highest_rate=1e-1")) == 0
    again = json.loads((tmp_path / "search.json").read_text())
    assert [arm["chosen"] for arm in again["tried"]] == [1, 2]
    assert again["rows"][0] == delta
    assert (again["rows"][1]["scores"], again["missing"]) == ([1.0] * 3, 0)


def test_what_has_ended_when_a_search_is_stopped_is_told(tmp_path, monkeypatch, capsys):
    """In its first part, after the lowest rate; and again, among the fresh seeds."""
    stop = Stopped("stopped by SIGTERM; the same command goes on", signal.SIGTERM)

    def stopped_after(rates, seeds):
        valid = lambda x: 0.5 if x["learning_rate"] in rates and x["seed"] in seeds else None
        begin = ends(valid, lambda settings: 0.75)

        def run_sweep(workdir, sweep, launch):
            begin(workdir, sweep, launch)
            raise stop

        return run_sweep

    table, more = tmp_path / "search.md", ["--settings=2", "--seeds=1", "--fresh=2", "--length=6"]
    monkeypatch.setattr(search, "run_sweep", stopped_after(("0.0001",), ("0",)))
    assert search.main(argv(tmp_path, *more)) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert "| delta_product, n_h = 3 | 0.0001 | 0.0 | - | silu |\n" in table.read_text()
    assert "Runs without results: 2. They count as the worst; the search was" in table.read_text()
    assert not (tmp_path / "chosen").exists()
    once = stopped_after(("0.0001",), ("1000",))
    full = ends(lambda settings: 0.1, lambda settings: 0.0)
    sweeps = iter([full, once])
    monkeypatch.setattr(search, "run_sweep", lambda *given: next(sweeps)(*given))
    assert search.main(argv(tmp_path, *more)) == 143
    record = json.loads((tmp_path / "search.json").read_text())
    assert [(row["scores"], row["runs"], row["median"]) for row in record["rows"]] == [
        ([0.75], 2, None)
    ] * 2
    (legend,) = searched.search_figure(record, style.Look()).legends
    said = " ".join(legend.get_title().get_text().split())
    assert said == "Runs without results: 2. They count as the worst; the search was stopped."
    text = table.read_text()
    assert "Of each arm 2 settings were tried. Scores are strict.sequence_accuracy at 6 tok" in text
    assert "tried, so that others may do better: delta_product, n_h = 3; gla." in text
    assert capsys.readouterr().err.startswith("tried: 4 runs\nchosen: 4 runs\n")


def test_the_first_score_that_a_task_has_is_reported():
    def record(*names):
        entry = {"length": 4, "strict": dict.fromkeys(names, 0.5)}
        return Record("r", {}, {"test": [entry]})

    for names, metric in (
        (("token_accuracy", "sequence_accuracy"), "strict.sequence_accuracy"),
        (("token_accuracy", "sequence_accuracy", "scaled_accuracy"), "strict.scaled_accuracy"),
        (("token_accuracy",), "strict.token_accuracy"),
    ):
        assert searches.metric_of(record(*names), 4) == metric
    arms = [searches.Arm({"mixer": "gla"}, [])]
    fixed = "train_length=16;num_pairs=2;eval_sequences=8;eval_batch_size=8"
    for script, more, metric in (
        ("recall", "", "strict.token_accuracy"),  # of MQAR queries are published, not sequences
        ("formal_languages", ";language=parity;curriculum=()", "strict.scaled_accuracy"),
        ("state_tracking", ";group=Z2;curriculum=()", "strict.sequence_accuracy"),
    ):
        own = fixed.replace("num_pairs=2;", "") if script != "recall" else fixed
        assert searches.reported_of(arms, script, f"{own}{more}", None, None) == metric


@pytest.mark.parametrize(("together", "said"), [(True, "4 runs in 3 programs"), (False, "4 runs")])
def test_runs_and_the_programs_that_they_compile_are_counted(together, said):
    each = [
        {"mixer": "gla", "seed": "0"},
        {"mixer": "gla", "seed": "1", "learning_rate": "1"},
        {"mixer": "delta_net", "seed": "0", "qk_activation": "none"},
        {"mixer": "delta_net", "seed": "0", "qk_activation": "silu"},
    ]
    fixed = f"group=S3;{TINY}"
    assert searches.counted("state_tracking", fixed, each, together=together) == said


def test_every_mixer_tries_as_much():
    arms = searches.arms_of((), "state_tracking", f"group=S3;{TINY}", 12, (1e-4, 1e-2))
    assert [arm.settings["mixer"] for arm in arms] == list(MIXERS)
    rates = [each["learning_rate"] for each in arms[0].tried]
    assert len(set(rates)) == 12
    for arm in arms:
        assert [each["learning_rate"] for each in arm.tried] == rates
        mixer = MIXERS[arm.settings["mixer"]]
        for name, values in searches.SPACE.items():
            found = [each.get(name) for each in arm.tried]
            often = 12 // len(values)
            assert sorted(filter(None, found)) == sorted(values * often * mixer.takes(name))
    given = "state_tracking", f"group=S3;{TINY}", 3, (1e-4, 1e-2)
    with pytest.raises(ConfigError, match="fields='beta_bias' is tried by no arm: none has it, or"):
        searches.arms_of(("mixer=gla",), *given, ("beta_bias",))
    fewer = searches.arms_of((), "state_tracking", f"group=S3;{TINY}", 12, (1e-4, 1e-2), ())
    assert {key for arm in fewer for each in arm.tried for key in each} == {
        "learning_rate", "end_learning_rate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--arm=mixer=gla;seed=3", "seed=3 is in --arm or --fixed; the search decides it"),
        ("--arm=mixer=nothing", "mixer='nothing' is not known"),
        ("--arm=", "--arm='' is empty; it may be mixer=delta_product;num_householder=3"),
        ("--arm=mixer=gla", "--arm='mixer=gla' is the same as --arm='mixer=gla'; each is one row"),
        ("--arm=num_layers=1;mixer=gla", "gla' is the same as --arm='mixer=gla'; each is one row"),
        (  # by what its mixer decides by itself
            "--arm=mixer=gated_delta_product --arm=mixer=gated_delta_product;num_householder=2",
            "num_householder=2' is the same as --arm='mixer=gated_delta_product'; each is one row",
        ),
        ("--arm=mixer=gla;group=S4", "'group' is in --fixed, and in --arm='mixer=gla;group=S4' to"),
        (
            "--arm=mixer=gla;num_heds=2",
            "--arm: 'num_heds' is no setting of state_tracking; did you mean 'num_heads'?",
        ),
        ("--fixed=stepz=2", "--fixed: 'stepz' is no setting of state_tracking; did you mean 'ste"),
        (  # arms of more fields would have more tries than others
            "--highest_rate=1e-4",
            "settings=12 learning rates of three digits do not fit between lowest_rate=0.0001 and "
            "highest_rate=0.0001; give fewer",
        ),
        ("--settings=0", "settings=0 is too small"),
        ("--fields=beta_bias,steps", "fields='steps' is not known; it may be one of"),
        ("--fields=beta_bias,beta_bias", "fields='beta_bias,beta_bias' has 'beta_bias' twice"),
        (
            "--length=5",
            "length=5 was not tested in run mixer = delta_product, n_h = 3; it may be 4, 6",
        ),
        (
            "--metric=strict.accuracy",
            "metric='strict.accuracy' is not in the results of run mixer =",
        ),
        ("--metric=", "metric='' is not in the results of run mixer ="),
        (
            "--metric=strict",
            "it may be one of length, loss, paper.token_accuracy, paper.sequence_ac",
        ),
        (
            "--settings=1000000000",
            "settings=1000000000 and seeds=2 make 4000000000 runs of 2 arms, more than max_runs=10",
        ),
        ("--fresh=1000000000", "fresh=1000000000 make 2000000000 runs of 2 arms, more than max_ru"),
        ("--seeds=1001", "seeds=1001 is too large; it may be 1000 at most"),
        ("--highest_rate=1e-5", "highest_rate=1e-05 is too small; it must be at least 0.0001"),
        ("--script=absent", "script='absent' is not known"),
    ],
)
def test_refusals_are_one_line_and_start_nothing(tmp_path, monkeypatch, capsys, flag, says):
    monkeypatch.setattr(search, "run_sweep", lambda *given: pytest.fail("something is started"))
    assert search.main(argv(tmp_path / "s", *flag.split(" "))) == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(says), error)
    assert error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_what_a_task_reports_is_known_before_it_is_trained(tmp_path):
    """Scores of a range of lengths, where sequences fall into it; text, with scores of its own."""
    sizes = "train_length=8;min_eval_length=9;eval_sequences=64;eval_batch_size=32"
    arms = [searches.Arm({"mixer": "gla"}, [])]
    given = (arms, "formal_languages", f"language=parity;curriculum=();{sizes};eval_lengths=16,32")
    path = "lengths_17_to_32.scaled_accuracy"
    assert searches.reported_of(*given, path, 32) == path
    assert searches.reported_of(*given, None, None) == "strict.scaled_accuracy"
    with pytest.raises(ConfigError, match=f"metric='{re.escape(path)}' is not in"):
        searches.reported_of(*given, path, 16)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x" * 300)
    splits = ["--valid_paths=*/b.txt", "--test_paths=*/c.txt"]
    sources = [f"--workdir={tmp_path}/tokens", f"--sources={tmp_path}", "--workers=1"]
    prepare_text.command([*sources, *splits, "--tokenizer=bytes"])
    sizes = "train_length=16;eval_lengths=16;eval_sequences=8;eval_batch_size=8"
    fixed = f"data={tmp_path}/tokens;{sizes}"
    given = (arms, "language_modeling", fixed)
    assert searches.reported_of(*given, "bits_per_byte", 16) == "bits_per_byte"
    with pytest.raises(ConfigError, match="one of length, loss, bits_per_byte, token_accuracy, to"):
        searches.reported_of(*given, None, None)


def test_an_arm_that_always_fails_is_named(tmp_path, monkeypatch, capsys):
    valid = lambda settings: None if settings["mixer"] == "gla" else 0.5
    monkeypatch.setattr(search, "run_sweep", ends(valid, lambda settings: 0.5))
    assert search.main(argv(tmp_path, "--settings=2", "--seeds=1", "--fresh=1")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --arm='mixer=gla': of every setting half of the runs or more have failed; "
        f"{tmp_path}/tried/results.csv says why"
    )
    assert "| delta_product, n_h = 3 |" in (tmp_path / "search.md").read_text()


@pytest.mark.parametrize(
    ("scores", "runs", "median"),
    [([], 0, None), ([], 3, None), ([0.2, 0.9, 0.4], 3, 0.4), ([0.9, 0.8], 3, 0.8),
     ([0.9], 3, None), ([0.9, 0.5], 4, None), ([0.9, 0.8, 0.6], 4, 0.7)],
)  # fmt: skip
def test_a_run_that_failed_is_below_all(scores, runs, median):
    of = lambda scores, metric: searches.median_of_runs(scores, runs, metric)
    assert of(scores, "strict.token_accuracy") == pytest.approx(median)
    losses = [1 - score for score in scores]
    assert of(losses, "loss") == (None if median is None else pytest.approx(1 - median))


def test_a_search_by_a_loss_takes_less_for_better():
    arm = searches.Arm({"mixer": "gla"}, searches.tried_of(2, (1e-3, 1e-2)))
    record = {"threshold": 2.0, "metric": "bits_per_byte", "length": None, "tried": []}
    record |= {"missing": 0, "stopped": False}
    found = lambda score: {"test": [{"length": 4, "bits_per_byte": score}]}
    run = lambda score: types.SimpleNamespace(
        results=lambda: found(score) | {"parameters": {"total": 7}},
        run=types.SimpleNamespace(name="r"),
    )
    reported = searches.Reported("bits_per_byte", None, 2.0)
    row = searches.row_of(arm, arm.tried[0], [run(x) for x in (1.5, 2.0, 4.0)], reported)
    assert (row["best"], row["median"], row["escaped"]) == (1.5, 2.0, 2)
    axes = searched.search_figure(record | {"rows": [row]}, style.Look()).axes[0]
    assert axes.get_xlim()[1] > 4
    row["scores"] = [1.0] * 4  # each is seen
    (points, *_) = searched.search_figure(record | {"rows": [row, row]}, style.Look()).axes[0].lines
    assert len(set(points.get_ydata())) == 4
    assert all(abs(height) < 0.5 for height in points.get_ydata())


def test_a_constant_rate_has_no_end():
    given = "state_tracking", f"group=S3;schedule=constant;{TINY}", 2, (1e-3, 1e-2)
    (arm,) = searches.arms_of(["mixer=transformer"], *given)
    assert arm.tried == [{"learning_rate": "0.001"}, {"learning_rate": "0.01"}]
    module = load_script(given[0])
    for tried in arm.tried:  # which a run takes
        build(module, parse_fixed(given[1]) | arm.settings | tried)


def test_of_runs_right_throughout_the_one_with_less_loss_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "run_sweep", ends(lambda settings: 1.0, lambda settings: 1.0))
    assert search.main(argv(tmp_path, "--settings=3", "--seeds=1", "--fresh=1")) == 0
    record = json.loads((tmp_path / "search.json").read_text())
    for arm in record["tried"]:
        assert arm["chosen"] == 2
        assert arm["settings"][2]["validation"] == [[1.0, 1.0, -0.01]]


@pytest.mark.slow
def test_a_search_runs(tmp_path, capsys):
    sizes = "hidden_size=8;num_heads=1;head_dim=8;intermediate_size=8;batch_size=4"
    more = ["--settings=2", "--seeds=1", "--fresh=2", "--launcher=vmap"]
    flags = argv(tmp_path, *more)
    flags[3] += f";{sizes};eval_sequences=8;eval_batch_size=8"
    assert search.main(flags) == 0
    record = json.loads((tmp_path / "search.json").read_text())
    assert [len(row["scores"]) for row in record["rows"]] == [2, 2]
    (hardware,) = record["hardware"]
    assert hardware.endswith(" x cpu")
