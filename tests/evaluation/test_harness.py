"""lm-evaluation-harness on our models: tasks of JSON files, and scores that are taken by hand."""

import functools
import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.golden_models import drawn

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval (--extra=evaluation)", allow_module_level=True)

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation import command
from deltaproduct_jax.evaluation.harness import DeltaProductLM
from deltaproduct_jax.evaluation.requests import windows
from deltaproduct_jax.evaluation.tasks import PAPER_TASKS
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig
from experiments import evaluate

pytestmark = pytest.mark.slow  # test_requests.py and test_scoring.py need no harness
BOS = 256
DOCUMENTS = [
    {"question": "ab", "choices": ["c", "dd"], "gold": 0, "text": "once upon a time"},
    {"question": "a longer question ", "choices": ["yes", "no"], "gold": 1, "text": "x"},
    {"question": "q" * 60, "choices": ["a", "b"], "gold": 1, "text": "y" * 70},
]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = ModelConfig(
        vocab_size=257, hidden_size=8, num_heads=2, head_dim=4, intermediate_size=8,
        initializer="fla",
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    fla.save(drawn(config), path, eos_token_id=10)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, each on the same JSON lines."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCUMENTS))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {path / 'data.jsonl'}}}}}\n{text}"
        )
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))


@pytest.fixture
def few_tasks(monkeypatch):
    """Without the harness's own tasks, thousands of files that it takes 15 seconds to list."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False)
    )


def made(folder, **options):
    return DeltaProductLM(str(folder), tokenizer="bytes", batch_size=2, **options)


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


@functools.cache
def program(folder):
    return jax.jit(fla.load(folder).__call__)


def logits_of(folder, ids):
    """Of a row by itself, filled up so that one program does for all."""
    filled = np.zeros((1, 96), np.int32)
    filled[0, : len(ids)] = ids
    return np.asarray(program(folder)(jnp.asarray(filled)), np.float64)[0, : len(ids)]


def log_probability(folder, ids, count):
    """Of the last ``count`` ids, each behind all that are before it."""
    logits = logits_of(folder, ids)
    chances = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    places = range(len(ids) - count, len(ids))
    return sum(chances[place - 1, ids[place]] for place in places)


def near(value):
    return pytest.approx(value, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("add_bos", [True, False])
def test_continuations_behind_prompts(folder, add_bos):
    lm = made(folder, add_bos=add_bos, max_length=16)
    before = [BOS] * add_bos
    cases = [("ab", "cd"), ("ab ", "cd"), ("", "cd"), ("q" * 40, "cd"), (" ", "c")]
    rows = [
        [*before, *b"abcd"],
        [*before, *b"ab cd"],
        [BOS, *b"cd"],
        [*b"q" * 15, *b"cd"],  # cut at its left: 16 tokens are read, the last is a target alone
        [BOS, *b" c"],
    ]
    scores = lm.loglikelihood(asked("loglikelihood", *cases), disable_tqdm=True)
    for ids, count, (score, _) in zip(rows, (2, 3, 2, 2, 2), scores, strict=True):
        assert score == near(log_probability(folder, ids, count))
    with pytest.raises(ConfigError, match="max_length=16 is too small; a continuation has 17"):
        lm.loglikelihood(asked("loglikelihood", ("a", "b" * 17)), disable_tqdm=True)


@pytest.mark.parametrize("add_bos", [True, False])
def test_whole_texts_in_windows(folder, add_bos):
    lm = made(folder, add_bos=add_bos, max_length=4)
    texts = ["abcdefghij"[add_bos:], "a", ""]
    begins = [BOS] * add_bos  # counts as a token of the text
    ids = [BOS, *begins, *texts[0].encode()]
    # Of ten tokens: four behind BOS, four behind the fourth, and two with a full window before.
    want = (
        log_probability(folder, ids[0:5], 4)
        + log_probability(folder, ids[4:9], 4)
        + log_probability(folder, ids[6:11], 2)
    )
    scores = lm.loglikelihood_rolling(
        asked("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    short = log_probability(folder, [BOS, *begins, *b"a"], 1 + add_bos)
    empty = log_probability(folder, [BOS, *begins], 1) if add_bos else 0
    assert scores == [near(want), near(short), near(empty)]


def test_windows_are_those_of_the_harness():
    for length in range(30):
        ids = list(range(length))
        theirs = map(make_disjoint_window, get_rolling_token_windows(ids, 99, 7, 1))
        assert [tuple(pair) for pair in windows(ids, 99, 7)] == list(theirs)


def greedy(folder, ids, count):
    """Ids that follow, each the likeliest, up to an end; of bytes alone."""
    found = []
    for _ in range(count):
        found.append(int(np.argmax(logits_of(folder, ids + found)[-1])))
        if found[-1] in (BOS, 10):
            return found[:-1]
    return found


def test_text_is_written_up_to_its_end(folder):
    lm = made(folder, max_length=24)
    prompts = ["ab", "hello there", "z" * 30, ""]
    rows = [[BOS, *b"ab"], [BOS, *b"hello there"], [*b"z" * 16], [BOS]]
    cases = [(prompt, {"until": [], "max_gen_toks": 8}) for prompt in prompts]
    texts = lm.generate_until(asked("generate_until", *cases), disable_tqdm=True)
    whole = [bytes(greedy(folder, ids, 8)).decode(errors="replace") for ids in rows]
    assert texts == whole
    first = whole[0][:1]
    stopped = [("ab", {"until": [first], "max_gen_toks": 8})]
    assert lm.generate_until(asked("generate_until", *stopped), disable_tqdm=True) == [""]
    for options, says in (
        ({"num_beams": 4}, "num_beams: no known option"),
        ({"max_gen_toks": 24}, "max_gen_toks=24 must be below max_length=24"),
    ):
        with pytest.raises(ConfigError, match=says):
            lm.generate_until(asked("generate_until", ("a", options)), disable_tqdm=True)


@pytest.mark.usefixtures("few_tasks")
def test_the_script_reports_what_the_harness_finds(folder, tasks, tmp_path, capsys):
    argv = [f"--model={folder}", f"--workdir={tmp_path}", f"--include_path={tasks}"]
    argv += ["--tokenizer=bytes", "--batch_size=4", "--max_length=32"]
    assert evaluate.flags.run(evaluate.command, [*argv, f"--tasks={','.join(TASKS)}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    lm = made(folder, max_length=32)
    right = []
    for doc in DOCUMENTS:
        rows = [[BOS, *doc["question"].encode(), *c.encode()][-33:] for c in doc["choices"]]
        counts = [len(c) + doc["question"].endswith(" ") for c in doc["choices"]]
        scores = [log_probability(folder, ids, n) for ids, n in zip(rows, counts, strict=True)]
        right.append(int(np.argmax(scores)) == doc["gold"])
    assert results["choices"]["acc,none"] == pytest.approx(np.mean(right))
    texts = [doc["text"] for doc in DOCUMENTS]
    total = sum(lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((t,) for t in texts))))
    size = sum(map(len, texts))
    assert results["whole"]["bits_per_byte,none"] == near(-total / size / np.log(2))
    assert "exact_match,none" in results["written"]
    assert re.search(r"\|choices\s*\|", capsys.readouterr().out)


@pytest.mark.usefixtures("few_tasks")
def test_what_cannot_be_evaluated_is_one_line(folder, tasks, tmp_path, capsys):
    more = [f"--workdir={tmp_path / 'w'}", f"--include_path={tasks}"]
    for arguments, says in (
        ([], "--model is missing"),
        ([f"--model={folder}"], "--tasks is missing"),
        ([f"--model={folder}", "--tasks=nonesuch"], "tasks=nonesuch: the harness knows no such"),
        ([f"--model={folder}", "--tasks=whole"], "tokenizer is missing"),
        ([f"--model={folder}", "--tasks=whole", "--tokenizer=nowhere"], "tokenizer='nowhere'"),
    ):
        assert evaluate.flags.run(evaluate.command, [*more, *arguments]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert says in line
    assert not (tmp_path / "w").exists()


def test_the_papers_tasks_are_known_to_the_harness():
    known = TaskManager()
    assert all(known.match_tasks([name]) == [name] for name in PAPER_TASKS)


@pytest.mark.usefixtures("few_tasks")
def test_the_console_script_hands_over(folder, tasks, tmp_path, monkeypatch, capsys):
    argv = ["deltaproduct-lm-eval", "run", "--model", "deltaproduct", "--tasks", "choices"]
    argv += ["--model_args", f"path={folder},tokenizer=bytes,max_length=32"]
    argv += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    assert command.main() == 0
    (found,) = tmp_path.rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["choices"]["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    argv[argv.index("--model_args") + 1] = "path=nowhere"
    monkeypatch.setattr(sys, "argv", argv)
    assert command.main() == 2
    assert "error: nowhere has no config.json" in capsys.readouterr().err
