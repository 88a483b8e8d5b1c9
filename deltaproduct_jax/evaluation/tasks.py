"""The paper's language tasks by lm-evaluation-harness's names, and how it ran them."""

# "lambada" is the harness's name of both variants together.
PAPER_TASKS = (
    "wikitext",
    "lambada",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "swde",
    "squad_completion",
    "fda",
)
PAPER = {"tasks": PAPER_TASKS, "num_fewshot": 0, "batch_size": 64, "dtype": "bfloat16", "seed": 42}
