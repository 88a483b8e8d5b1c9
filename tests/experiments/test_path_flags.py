"""A path that cannot be what a flag asks for: the error begins with the flag and what it got."""

import pytest
from helpers import refusal

# Of each command the flags that are paths, and what else it needs to look at them.
FLAGS = {
    ("analysis.effective_rank", "run"): [],
    ("analysis.householder_geometry", "run"): [],
    ("analysis.length_extrapolation", "runs"): [],
    ("analysis.margin", "runs"): [],
    ("analysis.margin", "rows_from"): [],
    ("analysis.quotients", "runs"): [],
    ("analysis.theory_geometry", "runs"): ["--constructions="],
    ("convert", "source"): [],
    ("figures", "source"): [],
    ("generate", "run"): None,  # it has no workdir
    ("language.legs", "compilation_cache"): ["--legs=tiny:0"],
    ("language.pack_text", "source"): [],
    ("language.paper", "archive"): ["--leg=tiny"],
    ("language_modeling", "bucket"): [],
    ("language_modeling", "compilation_cache"): [],
    ("language_modeling", "data"): ["--preset=tiny"],
    ("prepare_text", "sources"): [],
    ("prepare_text", "tokenizer"): ["--sources=FILE"],
    ("theory", "rows_from"): [],
}
TAKE_A_FOLDER = ("compilation_cache", "bucket")  # which is made


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_an_error_of_a_path_begins_with_its_flag(script, flag, tmp_path):
    more = FLAGS[script, flag]
    (file := tmp_path / "file").write_text("no record of ours")
    more = [] if more is None else [f"--workdir={tmp_path / 'w'}", *more]
    more = [argument.replace("FILE", str(file)) for argument in more]
    paths = ["~nobody-of-this-name/x", "s3://bucket/run", "x" * 300, f"{file}/below"]
    paths += [] if flag in TAKE_A_FOLDER else [str(tmp_path / "absent")]
    # A file is what some of them want.
    paths += [] if flag == "sources" else [str(file)]
    for path in paths:
        says = refusal(script, [f"--{flag}={path}", *more])
        assert says.startswith((f"{flag}={path}", f"{flag}={path!r}")), says
        assert len(says.replace(path, "")) > len(flag) + 10, says  # and why
    assert not (tmp_path / "w").exists() or not any((tmp_path / "w").glob("*.json"))


@pytest.mark.parametrize("script", ["prepare_text", "redraw", "search", "sweep", "train"])
def test_an_error_of_the_workdir_begins_with_it(script, tmp_path):
    (file := tmp_path / "file").touch()
    more = {"prepare_text": [f"--sources={file}"], "train": []}.get(script, [])
    for path in ("~nobody-of-this-name/x", "x" * 300, str(file), f"{file}/below", "gs://bucket/x"):
        says = refusal(script, [f"--workdir={path}", *more])
        assert says.startswith((f"workdir={path}", f"workdir={path!r}")), says
