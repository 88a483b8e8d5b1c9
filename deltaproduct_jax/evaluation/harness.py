"""The class that lm-evaluation-harness runs: our models by its name ``deltaproduct``.

Imported by the harness only, or where the extra ``evaluation`` is installed.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.evaluation.models import open_model, with_room_for
from deltaproduct_jax.evaluation.requests import as_request, cut, windows
from deltaproduct_jax.evaluation.scoring import Pair, Scorer
from deltaproduct_jax.files import any_path, given_by
from deltaproduct_jax.models.generation import Generator, Request
from deltaproduct_jax.settings import whole_number

MAX_LENGTH = 2048


class DeltaProductLM(TemplateLM):
    """A run directory or a folder of flash-linear-attention as a model of the harness.

    Args:
        path: the directory; ``pretrained`` is the same, as other classes call it.
        tokenizer: bytes, mistral, or a file; None for the directory's own.
        checkpoint: of a run: best, newest, or a step.
        dtype: dtype of the computation; None for the model's.
        batch_size: rows at a time.
        max_length: tokens of a prompt and what follows; longer prompts are cut at their left.
        max_gen_toks: tokens that are generated where a task says nothing.
        add_bos: whether BOS, the token that begins a document, stands before every text.
        mesh: devices, as the flag of that name.
        seed: of tokens that a task wants drawn.
        max_batch_size: taken for the harness's sake; there is no search for a batch size.
        device: likewise; JAX's default devices are used.

    Raises:
        ConfigError: an argument cannot be honoured.
        RunDirectoryError: the directory cannot be read.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        checkpoint: str | int = "best",
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int = MAX_LENGTH,
        max_gen_toks: int = 256,
        add_bos: bool = True,
        mesh: str = "data:1",
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if (path is None) == (pretrained is None):
            raise ConfigError("path is missing; give a run directory or a folder, by one name")
        rows = whole_number(str(batch_size))
        if rows is None:
            raise ConfigError(f"batch_size={batch_size!r} must be a whole number")
        require_at_least("max_length", max_length, 2)
        require_at_least("max_gen_toks", max_gen_toks, 1)
        name, where = ("pretrained", pretrained) if path is None else ("path", path)
        directory = any_path(where, name)
        with given_by(name, directory):
            model, self.text, self._ends = open_model(
                directory, checkpoint=str(checkpoint), tokenizer=tokenizer, dtype=dtype
            )
        model = with_room_for(
            model, max_length, rows, f"max_length={max_length} and batch_size={rows}"
        )
        self.scorer = Scorer(model, batch_size=rows, mesh=mesh)
        self.max_length, self.max_gen_toks, self.add_bos = max_length, max_gen_toks, add_bos
        self.batch_size, self.seed = rows, seed
        self._name = str(where)

    @property
    def eot_token_id(self) -> int:
        """The token between documents: BOS, there is no other."""
        return self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What tells request caches apart."""
        return f"{self.text.kind}_{self.text.vocab_size}_{self._name}".replace("/", "_")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text, BOS before them unless told otherwise."""
        add_bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self.text.bos_id] * add_bos + list(self.text.encode(string))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores of contexts and continuations, cut at their left where they are too long."""
        pairs = [
            cut(context or [self.prefix_token_id], rest, self.max_length)
            for _, context, rest in requests
        ]
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="log-likelihoods") as bar:
            scores = [tuple(scored) for scored in self.scorer(pairs, bar.update)]
        for (strings, _, _), score in zip(requests, scores, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, score)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of ``max_length``, the first behind BOS.

        Every token is scored once, with as many before it as the windows allow. With ``add_bos``
        the BOS that begins a text is one of them, as in the harness's class for transformers.
        """
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = [(None, *window) for of_text in windows for window in of_text]
        scores = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _windows(self, text: str) -> Iterable[Pair]:
        return windows(self.tok_encode(text), self.prefix_token_id, self.max_length)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(
            self.scorer.model,
            rows=self.batch_size,
            decode=self.text.decode,
            vocab_size=self.text.vocab_size,
        )

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each prompt, up to a task's strings or the document's end.

        Prompts are cut at their left where they and what is asked for exceed ``max_length``.
        """
        asked = [self._request(index, *request.args) for index, request in enumerate(requests)]
        order = sorted(range(len(asked)), key=lambda index: -len(asked[index].prompt))
        texts = [""] * len(asked)
        with tqdm(total=len(asked), disable=disable_tqdm, desc="texts") as bar:
            for piece in self._generator.stream((asked[i] for i in order), seed=self.seed):
                texts[order[piece.index]] += piece.text
                bar.update(piece.reason is not None)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, index: int, prompt: str, options: Mapping[str, Any]) -> Request:
        return as_request(
            self.tok_encode(prompt) or [self.prefix_token_id],
            normalize_gen_kwargs(dict(options), self.max_gen_toks),
            max_length=self.max_length,
            key=index,
            ends=self._ends,
        )
