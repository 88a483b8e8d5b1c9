"""The bars of every implementation, and how a CPU is made to cut as another platform does."""

import jax
from helpers import errors, plain_bfloat16_error, record

from deltaproduct_jax.ops import route

# Bars of the design. float32: or 30 times the error of the plain float32 recurrence, if larger.
# float16: a few units of its last bit.
OUTPUTS = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
GRADIENTS = {"float64": 1e-12, "float32": 3e-5, "bfloat16": 2e-2, "float16": 3e-3}
OVER_PLAIN_RECURRENCE = 30
# Of inputs of which it errs by more than this, a multiple of its error would say nothing.
PLAIN_RECURRENCE = 1e-4
# Of g in float32, whatever the gates: differences of cumulative sums would be off by 50 at g = -20.
GATES = 1e-5
# Ungated with beta up to 2, errors never die out: what plain bfloat16 dots give, times this.
OVER_PLAIN_BFLOAT16 = 4


def of(name, dtype):
    """Of a result, or of the gradient of an argument, which begins with d."""
    return (GRADIENTS if name.startswith("d") else OUTPUTS)[dtype]


def bars_of(case, dtype):
    """Of outputs and of gradients."""
    if dtype != "bfloat16" or case.tame:
        return OUTPUTS[dtype], GRADIENTS[dtype]
    factor = max(1.0, OVER_PLAIN_BFLOAT16 * plain_bfloat16_error(case) / OUTPUTS[dtype])
    return factor * OUTPUTS[dtype], factor * GRADIENTS[dtype]


def assert_within_bars(case, implementation, dtype, **overrides):
    of_outputs, of_gradients = errors(case, implementation, dtype, **overrides)
    record(implementation, dtype, of_outputs, of_gradients)
    if dtype == "float32" and case.keys == "unit":
        assert of_gradients.get("dg", 0) <= GATES
    outputs_bar, gradients_bar = bars_of(case, dtype)
    over = {n: e for n, e in of_outputs.items() if not e <= outputs_bar}
    over |= {n: e for n, e in of_gradients.items() if not e <= gradients_bar}
    if over and dtype == "float32":
        plain_outputs, plain_gradients = errors(case, "recurrent", dtype)
        plain = plain_outputs | plain_gradients
        lost = {n: plain[n] for n in over if not plain[n] <= PLAIN_RECURRENCE}
        assert not lost, f"no bar for inputs of which the plain recurrence errs by {lost}: {over}"
        over = {n: e for n, e in over.items() if not e <= OVER_PLAIN_RECURRENCE * plain[n]}
    bars = f"outputs {outputs_bar:.1e}, gradients {gradients_bar:.1e}"
    assert not over, f"over the bars ({bars}): {over}; all: {of_outputs | of_gradients}"


def run_as(platform, monkeypatch):
    """Makes a CPU cut sequences and round operands as another platform does."""
    settings = route.chunked_settings

    def elsewhere(_, *arguments, **options):
        return settings(platform, *arguments, **options)

    monkeypatch.setattr(route, "chunked_settings", elsewhere)
    jax.clear_caches()
