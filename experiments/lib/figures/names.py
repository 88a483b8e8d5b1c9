"""Names as a figure prints them: of mixers, groups, settings, metrics and implementations."""

import re

SETTINGS = {
    "n_h": "$n_h$",
    "num_householder": "$n_h$",
    "num_layers": "layers",
    "num_heads": "heads",
    "head_dim": "width of a head",
    "hidden_size": "width",
    "num_pairs": "pairs",
    "learning_rate": "learning rate",
}
# A value of these says by itself what it is.
SPEAKING = ("mixer", "group", "language", "implementation")
VALUES = {
    "delta_product": "DeltaProduct",
    "gated_delta_product": "Gated DeltaProduct",
    "delta_net": "DeltaNet",
    "gated_delta_net": "Gated DeltaNet",
    "transformer": "Transformer",
    "gla": "GLA",
    "mamba2": "Mamba-2",
    "mlstm": "mLSTM",
    "slstm": "sLSTM",
    "rwkv7": "RWKV-7",
    "kimi_delta_attention": "Kimi Delta Attention",
    "complex_kimi_delta_attention": "Complex KDA",
    "erase_then_delta": "Erase-then-Delta",
    "auto": "automatic choice",
    "jla": "jax-linear-attention",
    "fla": "flash-linear-attention",
    "flashqla": "FlashQLA",
    "flashqla_interleaved": "FlashQLA, interleaved",
    "plain": "plain scan",
    "triton": "our GPU kernels",
    "pallas_tpu": "our TPU kernel",
    "forward+backward": "forward + backward",
    "step": "one token",
}
METRICS = {
    "cumulative": "sequences right so far",
    "sequence_accuracy": "sequences right throughout",
    "token_accuracy": "answers right",
    "scaled_accuracy": "scaled accuracy",
}
# Settings that papers write otherwise: as the range of eigenvalues.
PHRASES = {"allow_neg_eigval = true": "$[-1, 1]$", "allow_neg_eigval = false": "$[0, 1]$"}
PROTOCOLS = {"strict": "", "paper": ", BOS counted"}
_GROUP = re.compile(r"([SAZD])(\d+)$")
_FACTORS = re.compile(r"\bn_h\b")


def pretty(label: str) -> str:
    """A label such as "n_h = 2, group = S3", as records have it, in a figure's letters."""
    return ", ".join(_part(part) for part in label.split(", "))


def _part(part: str) -> str:
    if part in PHRASES:
        return PHRASES[part]
    key, equals, rest = part.partition(" = ")
    if not equals:
        return value(part)
    if key in SPEAKING:
        return value(rest)
    return f"{setting(key)} = {value(rest)}"


def note(text: str) -> str:
    """A sentence with settings in it, as "1 of 3 runs is left out: group = S5, n_h = 4"."""
    together = "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"  # no line ends within
    return _FACTORS.sub("$n_h$", text.replace("group = ", "").replace(" = ", together))


def setting(key: str) -> str:
    """A setting's name; one that is in a figure's letters stays as it is."""
    return key if "$" in key else SETTINGS.get(key, key.replace("_", " "))


def value(text: str) -> str:
    """A setting's value; what stands behind a blank, as the name of a run, stays as it is."""
    first, blank, rest = text.partition(" ")
    found = VALUES.get(first)
    if found is None:
        group = _GROUP.fullmatch(first)
        found = f"${group[1]}_{{{group[2]}}}$" if group else first.replace("_", " ")
        if first == "n_h":
            found = "$n_h$"
    return found + blank + _FACTORS.sub("$n_h$", rest)


def metric(path: str) -> str:
    """What a number of results.json says, by its path, as strict.sequence_accuracy."""
    protocol, dot, name = path.partition(".")
    if not dot or protocol not in PROTOCOLS:
        return path.replace("_", " ").replace(".", ", ")
    return METRICS.get(name, name.replace("_", " ")) + PROTOCOLS[protocol]


def construction(name: str) -> tuple[str, str]:
    """Family and member of a construction of the catalogue, as permutations and $S_3$."""
    family, _, member = name.rpartition("_")
    full = member == "full"
    if full:
        family, _, member = family.rpartition("_")
    family = {"cube": "rotations", "icosahedron": "rotations", "plane": "rotations"}.get(
        family, family.replace("_", " ")
    )
    return family, value(member) + (", all letters" if full else "")


def run(name: str) -> str:
    """A run or construction by its name, as s3_nh2_16, seed=0, or "permutations_S3, float32"."""
    name, comma, dtype = name.partition(", ")
    if comma:
        return f"{' '.join(construction(name))}, {dtype}"
    return ", ".join(map(_word, name.split("_")))


def _word(word: str) -> str:
    key, equals, number = word.partition("=")
    if equals:
        return f"{setting(key)} {number}"
    if word.startswith("nh") and word[2:].isdigit():
        return f"$n_h$ = {word[2:]}"
    return (
        f"{word} tokens" if word.isdigit() else value(word.upper() if word[1:].isdigit() else word)
    )


def model(name: str) -> str:
    """A construction, or a run by its folder as "trained: preset_S4", in two lines."""
    kind, colon, run = name.partition(": ")
    if colon:
        run = run.removeprefix("preset_")
        return f"{kind}\n{value(run.upper() if _GROUP.fullmatch(run.upper()) else run)}"
    parts = name.rsplit("_", 1)
    return "\n".join([parts[0].replace("_", " "), *map(value, parts[1:])])


def leg_size(size: str) -> str:
    """The size of a leg of language models, as 213m."""
    return size.upper() if size[:1].isdigit() else size


def leg_model(model: str) -> str:
    """What a leg is beside its size, as 2_gated."""
    words = model.split("_")
    return ", ".join(f"$n_h$ = {word}" if word.isdigit() else value(word) for word in words)
