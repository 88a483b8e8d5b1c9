"""What the harness asks, cut and turned for our scorer and generator; by hand, without it."""

import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.requests import as_request, cut, windows

OPTIONS = {"max_gen_toks": 3, "until": ["\n", ""], "do_sample": False, "temperature": 0.0}


def test_prompts_are_cut_at_their_left():
    assert cut([1, 2, 3], [4, 5], 16) == ([1, 2, 3], [4, 5])
    assert cut([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])  # three are read, the last is a target
    assert cut([1, 2, 3], [4, 5], 2) == ([3], [4, 5])
    with pytest.raises(ConfigError, match="max_length=1 is too small; a continuation has 2"):
        cut([1, 2, 3], [4, 5], 1)


def test_every_token_of_a_text_is_in_one_window():
    assert list(windows([], 9, 4)) == []
    assert list(windows([1], 9, 4)) == [([9], [1])]
    assert list(windows([1, 2, 3, 4, 5, 6], 9, 4)) == [([9], [1, 2, 3, 4]), ([2, 3, 4], [5, 6])]
    for length in range(20):
        cuts = list(windows(range(length), 99, 6))
        assert [token for _, scored in cuts for token in scored] == list(range(length))
        assert all(len(before) + len(scored) - 1 <= 6 for before, scored in cuts)


def test_options_of_a_task_reach_the_request():
    made = lambda **changed: as_request(
        [1, 2, 3, 4], OPTIONS | changed, max_length=5, key=7, ends=(0,)
    )
    request = made()
    assert (request.prompt, request.max_tokens, request.key) == ([3, 4], 3, 7)
    assert (request.stop, request.stop_tokens) == (("\n",), (0,))
    assert request.sampling.temperature == 0
    drawn = made(do_sample=True, temperature=0.5, top_k=4).sampling
    assert (drawn.temperature, drawn.top_k) == (0.5, 4)
    with pytest.raises(ConfigError, match="num_beams: no known option of a task"):
        made(num_beams=4)
    with pytest.raises(ConfigError, match="max_gen_toks=5 must be below max_length=5"):
        made(max_gen_toks=5)
