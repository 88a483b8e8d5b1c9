"""Writes parameters of a :class:`SequenceModel` by what they are to do.

The residual stream is cut into named features, each coordinate `UNIT` or 0 (or a part of a unit
vector). Three things are built from them:

- an **orbit**: heads that share a state ``k v^T`` of rank one. BOS writes ``k``, the tokens'
  factors move it through its orbit, and head ``h`` reads coordinate ``h``. The output norm would
  leave only the sign of one number, but far below the root of its epsilon it is linear, and so
  ``v`` is `TINY`. Where signs are what is wanted, ``v`` is `LARGE`.
- a **buffer**: a head a slot, overwritten exactly by ``beta = 1``.
- a **lookup**: a unit of the SwiGLU a case. ``silu`` is exactly 0 well below 0, so that a unit
  whose case it is not adds nothing, and an error in the features does not reach the outputs.

Keys are large before they are normalised, so that its epsilon vanishes; ``2 sigmoid`` is exactly 2
from 16.7 up and 0 from -104 down. Dimension key: that of the README; ``S`` situations, ``U`` units.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.theory.reflections import completion

UNIT = 256.0  # of the residual stream: its square over D hides the epsilon of the norms
LARGE = 256.0  # keys, values in a buffer
SURE = 1000.0  # logits of beta and of the gate
TINY = 2.0**-30  # values of an orbit
STEEP = 4096.0  # gates of a lookup
LOUD = 1024  # square sum after BOS, of which features with rounding errors are a small part


class Table(NamedTuple):
    """What a lookup tells apart and writes.

    Attributes:
        cases: feature -> ``[U, width]``; the sum of the products with the features, in units, is
            ``match`` at the unit that is to be on and at most ``nearest`` at the others.
        match: see ``cases``.
        nearest: see ``cases``.
        outputs: feature -> ``[U, width]``, what the unit puts there.
    """

    cases: Mapping[str, np.ndarray]
    match: float
    nearest: float
    outputs: Mapping[str, np.ndarray]

    @property
    def units(self) -> int:
        """How many cases there are."""
        return len(next(iter(self.cases.values())))


class Program:
    """Parameters under construction, layer by layer.

    Args:
        vocab_size: number of token ids.
        bos: id of the first token.
        letters: ids of the others.
        features: widths of the parts of the residual stream, tokens left out.
        num_layers, num_heads, head_dim, num_householder: of the model, alike in all layers.
        value_dim: value width of a head.
        units: width of the SwiGLUs' hidden layers.
        gated: a forget gate.
        energy_bos: square sum, in units, of the residual stream after BOS where the last layer
            reads it. BOS is made louder, up to a power of 4, so that the norm there is a power of 2
            and what BOS writes has as few bits as it was given.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        bos: int,
        letters: Sequence[int],
        features: Mapping[str, int],
        num_layers: int = 1,
        num_heads: int,
        head_dim: int,
        value_dim: int = 1,
        num_householder: int,
        units: int = 1,
        gated: bool = False,
        energy_bos: int = 1,
    ):
        fill = completion(energy_bos, LOUD) if energy_bos > 1 else []
        self.vocab_size, self.bos, self.letters = vocab_size, bos, np.asarray(letters)
        self.at: dict[str, slice] = {}
        width = 0
        for name, size in {"token": vocab_size, "fill": len(fill), **features}.items():
            self.at[name] = slice(width, width + size)
            width += size
        # A power of 4, so that the norm of a single unit is a power of 2.
        self.D = 4 ** int(np.ceil(np.log(width) / np.log(4) - 1e-9))
        self.R, self.H, self.K, self.V = num_householder, num_heads, head_dim, value_dim
        self.config = ModelConfig(
            vocab_size=vocab_size,
            mixer="gated_delta_product" if gated else "delta_product",
            hidden_size=self.D,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            expand_v=value_dim / head_dim,
            num_householder=num_householder,
            allow_neg_eigval=True,
            qk_activation="none",
            use_output_gate=False,
            use_short_conv=False,
            intermediate_size=units,
            norm_eps=1e-6,
        )
        self.params: dict[str, np.ndarray] = {}
        self._param("embeddings.embedding", (vocab_size, self.D))[:, self.at["token"]] = (
            UNIT * np.eye(vocab_size)
        )
        self._param("embeddings.embedding", (vocab_size, self.D))[bos, self.at["fill"]] = (
            UNIT * np.array(fill)
        )
        # Square sum of the residual stream, in units, after a letter and after BOS.
        self.energy, self.energy_bos = 1.0, 1.0 + float(np.dot(fill, fill))

    def put(self, layer: int, name: str, feature: str, rows: Any) -> None:
        """Adds to the rows of a mixer's projection that read ``feature``.

        Args:
            layer: which block.
            name: q, k, v, b or a.
            feature: whose coordinates are read.
            rows: ``[width, ...]``, what one unit of each coordinate is to give: ``[H, K]`` for q,
                ``[R, H, K]`` for k, ``[R, H, V]`` for v, ``[R, H]`` for b, ``[H]`` for a.
        """
        R, H, K, V = self.R, self.H, self.K, self.V
        shape = {"q": (H, K), "k": (R, H, K), "v": (R, H, V), "b": (R, H), "a": (H,)}[name]
        kernel = self._param(f"layers.{layer}.attn.{name}_proj.kernel", (self.D, *shape))
        rows = np.asarray(rows) / np.sqrt(self.D / self.energy)
        if feature == "token":
            rows[self.bos] *= np.sqrt(self.energy_bos / self.energy)
        kernel[self.at[feature]] += rows

    def orbit(
        self,
        layer: int,
        heads: slice,
        feature: str,
        start: np.ndarray,
        pads: Sequence[float],
        copies: int,
        *,
        at: int = 0,
        signs: bool = False,
        resets: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """Heads that write, keep and read a vector; what moves it, `factors` writes.

        Args:
            layer: which block.
            heads: a head a coordinate, or whatever `read` has it read.
            feature: where the heads put the coordinates, from its coordinate ``at`` on.
            start: ``[d]``, what BOS writes.
            pads: further coordinates of the key, which no letter moves.
            copies: times that every coordinate stands in a key.
            at: see ``feature``.
            signs: of what is read only the sign is put down, a unit of it.
            resets: letter -> vector ``[d]`` of the length of ``start`` that it writes like BOS.
        """
        k = np.zeros((self.vocab_size, self.R, self.H, self.K))
        b, v = np.zeros(k.shape[:-1]), np.zeros((*k.shape[:-1], self.V))
        for token, vector in {self.bos: start, **(resets or {})}.items():
            key = np.concatenate([np.tile(vector, copies), pads])
            k[token, 0, heads, : len(key)] = LARGE * key
            b[token, 1:, heads] = -SURE
            v[token, 0, heads, 0] = LARGE if signs else 2 * TINY  # silu halves what is this small
        for name, rows in {"k": k, "b": b, "v": v}.items():
            self.put(layer, name, "token", rows)
        length = np.sqrt(copies * start @ start + np.dot(pads, pads))
        read = TINY * np.sqrt(copies / self.K) / length / np.sqrt(self.config.norm_eps)
        # The norm makes sqrt(V) of the one entry that is not 0, if it is not tiny.
        gain = UNIT / np.sqrt(self.V) if signs else UNIT / np.linalg.norm(start) / read
        num_heads = heads.stop - heads.start
        self._output(layer, heads, slice(0, 1), feature, at, gain * np.eye(num_heads)[:, None])
        written = num_heads if signs else 1
        self.energy, self.energy_bos = self.energy + written, self.energy_bos + written

    def factors(
        self,
        layer: int,
        heads: slice,
        feature: str,
        keys: np.ndarray,
        beta: np.ndarray,
        copies: int,
        *,
        rows: Sequence[int] | slice = slice(None),
    ) -> None:
        """Reflections of an orbit: keys ``[S, R, d]`` and betas ``[S, R]``, 2 or 0, of the
        situations that the coordinates ``rows`` of a feature stand for."""
        situations = np.arange(self.at[feature].stop - self.at[feature].start)[rows]
        d = keys.shape[-1]
        k = np.zeros((self.at[feature].stop - self.at[feature].start, self.R, self.H, self.K))
        largest = np.maximum(np.abs(keys).max(-1, keepdims=True), 1e-9)
        lifted = LARGE * np.tile(keys / largest, copies)[:, :, None]
        k[situations, :, heads, : copies * d] = lifted
        b = np.zeros(k.shape[:-1])
        b[situations, :, heads] = SURE * (beta - 1)[:, :, None]
        self.put(layer, "k", feature, k)
        self.put(layer, "b", feature, b)

    def read(
        self,
        layer: int,
        heads: slice,
        feature: str,
        queries: np.ndarray,
        copies: int,
        *,
        rows: Sequence[int] | slice = slice(None),
    ) -> None:
        """Queries ``[S, d, d]``, a row per head, where the feature's situations are ``rows``."""
        width = self.at[feature].stop - self.at[feature].start
        situations, d = np.arange(width)[rows], queries.shape[-1]
        q = np.zeros((width, self.H, self.K))
        q[situations, heads, : copies * d] = LARGE * np.tile(queries, copies)
        self.put(layer, "q", feature, q)

    def factors_of_feature(
        self, layer: int, heads: slice, feature: str, beta: str | None, copies: int
    ) -> None:
        """Reflections of an orbit whose keys ``[R * d]`` a feature holds.

        Where ``beta`` is the name of a feature ``[R]``, 1 there is a factor with beta = 2 and -1
        is one with 0; without one beta is 2 at every letter.
        """
        width = self.at[feature].stop - self.at[feature].start
        rows = np.eye(width).reshape(width, self.R, -1)
        k = np.zeros((width, self.R, self.H, self.K))
        k[:, :, heads, : copies * rows.shape[-1]] = LARGE * np.tile(rows, copies)[:, :, None]
        self.put(layer, "k", feature, k)
        b = np.zeros((self.vocab_size if beta is None else self.R, self.R, self.H))
        if beta is None:
            b[self.letters, :, heads] = SURE
        else:
            b[:, :, heads] = SURE * np.eye(self.R)[:, :, None]
        self.put(layer, "b", beta or "token", b)

    def read_by_query(self, layer: int, heads: slice, d: int, copies: int) -> None:
        """Queries ``[d * d]``, head by head, of the feature "query"; BOS reads what it wrote."""
        rows = np.eye(d * d).reshape(d * d, d, d)
        q = np.zeros((d * d, self.H, self.K))
        q[:, heads, : copies * d] = LARGE * np.tile(rows, copies)
        self.put(layer, "q", "query", q)
        self.read(layer, heads, "token", np.eye(d)[None], copies, rows=[self.bos])

    def buffer(
        self, layer: int, clock: str, codes: Mapping[int, int], empty: int, feature: str
    ) -> None:
        """Keeps the last ``P`` tokens, the present one included, each in a slot of ``feature``.

        Args:
            layer: which block.
            clock: feature ``[P]``, the slot of the present token.
            codes: token id -> its coordinate in a slot.
            empty: coordinate of a slot that no letter has filled yet.
            feature: ``[P * V]``.
        """
        P, heads = self.at[clock].stop - self.at[clock].start, slice(None)
        k = np.zeros((self.vocab_size, self.R, self.H, self.K))
        k[self.bos, 0, :P, :P] = LARGE
        self.put(layer, "k", "token", k)
        k = np.zeros((P, self.R, self.H, self.K))
        k[:, 0, :P, :P] = LARGE * np.eye(P)[:, None]
        self.put(layer, "k", clock, k)
        b = np.zeros((self.vocab_size, self.R, self.H))
        b[:, 1:] = -SURE
        self.put(layer, "b", "token", b)
        v = np.zeros((self.vocab_size, self.R, self.H, self.V))
        for token, code in {**codes, self.bos: empty}.items():
            v[token, 0, :P, code] = LARGE
        self.put(layer, "v", "token", v)
        q = np.zeros((self.vocab_size, self.H, self.K))
        q[:, :P, :P] = LARGE * np.eye(P)
        self.put(layer, "q", "token", q)
        # The norm makes sqrt(V) of the one entry that is not 0.
        gain = UNIT / np.sqrt(self.V) * np.eye(P * self.V).reshape(P, self.V, -1)
        self._output(layer, slice(0, P), heads, feature, 0, gain)
        self.energy, self.energy_bos = self.energy + P, self.energy_bos + P

    def lookup(self, layer: int, *tables: Table) -> None:
        """Units of a block's SwiGLU: of each table one is on at every letter, and none at BOS.

        Args:
            layer: which block.
            tables: stand beside each other, and write different features or add up.
        """
        path, size = f"layers.{layer}.mlp", self.config.mlp_width
        gate = self._param(f"{path}.gate_proj.kernel", (self.D, size))
        up = self._param(f"{path}.up_proj.kernel", (self.D, size))
        down = self._param(f"{path}.down_proj.kernel", (size, self.D))
        first, energy = 0, self.energy
        for table in tables:
            units = slice(first, first + table.units)
            for feature, rows in table.cases.items():
                gate[self.at[feature], units] += STEEP * rows.T
            tokens = np.zeros((self.vocab_size, 1))
            tokens[self.letters] = (table.match + table.nearest) / 2
            tokens[self.bos] = 2 * table.match
            gate[self.at["token"], units] -= STEEP * tokens
            up[self.at["token"].start + self.letters, units] += 1
            on = STEEP * (table.match - table.nearest) / 2 * self.D / energy
            for feature, values in table.outputs.items():
                down[units, self.at[feature]] += UNIT / on * values
                self.energy += float((values[0] ** 2).sum())
            first = units.stop

    def gate(self, layer: int, resets: Sequence[int]) -> None:
        """Forgets everything before a reset, and nothing before any other token."""
        a = np.full((self.vocab_size, self.H), -SURE)
        a[list(resets)] = SURE
        self.put(layer, "a", "token", a)
        self._param(f"layers.{layer}.attn.A_log", (self.H,))[:] = 3.0

    def head(self, feature: str, weights: np.ndarray, answers: Sequence[int]) -> None:
        """Logits of the ids ``answers`` from a feature: ``weights [A, width]``."""
        kernel = self._param("lm_head.kernel", (self.D, self.vocab_size))
        kernel[self.at[feature], answers] = weights.T

    def answer_bos(self) -> None:
        """BOS is answered by itself, as the published word problems want it."""
        self._param("lm_head.kernel", (self.D, self.vocab_size))[self.bos, self.bos] = 4.0

    def _output(
        self, layer: int, heads: slice, values: slice, feature: str, at: int, gain: np.ndarray
    ) -> None:
        kernel = self._param(f"layers.{layer}.attn.o_proj.kernel", (self.H, self.V, self.D))
        first = self.at[feature].start + at
        kernel[heads, values, first : first + gain.shape[-1]] += gain

    def _param(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.params.setdefault(name, np.zeros(shape))
