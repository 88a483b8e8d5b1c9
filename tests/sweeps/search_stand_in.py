"""A search whose runs end at once, with the scores that a test gives them."""

import json

from experiments.lib.sweeps.grid import identity
from experiments.lib.sweeps.records import RunFolder

TINY = "steps=4;warmup_steps=0;eval_every=4;checkpoint_every=4;curriculum=();train_length=4"
TINY += ";eval_lengths=4,6"
ARMS = ["mixer=delta_product;num_householder=3", "mixer=gla"]


def argv(workdir, *more):
    arms = [f"--arm={arm}" for arm in ARMS]
    return [f"--workdir={workdir}", *arms, f"--fixed=group=S3;{TINY}", *more]


def ends(valid, test):
    """Stands in for a sweep: runs end at once; ``valid`` and ``test`` score a run's settings."""

    def run_sweep(workdir, sweep, launch):
        idle = sweep.idle()
        for run in sweep.claim(workdir, lambda *_: None):
            folder = RunFolder(workdir, run)
            score = valid(run.settings)
            if score is None or folder.path.exists() or identity(run.config) in idle:
                continue
            folder.path.mkdir(parents=True)
            row = {
                "step": 4,
                "loss": 1.0,
                "accuracy": 0.5,
                "learning_rate": 0.1,
                "tokens": 8,
                "time": 0.0,
            }
            row |= {"tokens_per_second": 8.0, "valid_sequence_accuracy": score}
            row["valid_loss"] = 1e-4 / float(run.settings["learning_rate"])
            other = row | {"step": 2, "valid_sequence_accuracy": 1.0, "valid_token_accuracy": 1.0}
            lines = [json.dumps({"valid_token_accuracy": score} | r) for r in (other, row)]
            (folder.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            entries = [{"length": 4, "strict": {"sequence_accuracy": 0.0}}]
            entries += [{"length": 6, "strict": {"sequence_accuracy": test(run.settings)}}]
            results = {"steps": 4, "best_step": 4, "parameters": {"total": 7000}, "test": entries}
            (folder.path / "results.json").write_text(json.dumps(results))
        return True

    return run_sweep
