"""What measurements leave: records, the pages made of them, and commands to paste."""

import json
import shlex

from experiments.lib.bench import report


def test_a_report_is_made_of_what_its_file_gives_back(tmp_path):
    argv = ["--workdir=DIR"]
    record = report.begun("op.speed", argv, rows=[{"a": float("inf"), 2: (0.5,)}])
    page = lambda record: [f"{record['rows'][0]['a']:.1f}", f"{record['rows'][0]['2']}"]
    text = report.write_report(tmp_path, "x", record, page)
    assert text == "inf\n\n[0.5]\n\nCommand: `python -m experiments.op.speed --workdir=DIR`"
    assert (tmp_path / "x.md").read_text() == f"{text}\n"
    kept = json.loads((tmp_path / "x.json").read_text())
    assert kept["rows"] == [{"a": "inf", "2": [0.5]}]
    kept["command"] = "python -m experiments.op_speed --workdir=DIR"  # as it was called before
    assert report.report_of(kept, page) == text


def test_columns_of_which_nothing_is_known_are_left_out():
    rows = [[1, None, "-", None], [2, None, None, 0]]
    assert report.known_columns("abcd", rows) == report.markdown("ad", [[1, None], [2, 0]])


def test_a_command_is_quoted_as_a_shell_takes_it():
    argv = ["--meshes=data:1;fsdp:2", "--cases=one token", "--prompt=a$b 'c'", "--x=data:2,fsdp:2"]
    command = report.command_line("op.speed", argv)
    assert command.startswith(
        'python -m experiments.op.speed --meshes="data:1;fsdp:2" --cases="one'
    )
    assert shlex.split(command)[3:] == argv


def test_a_long_command_is_cut_before_flags_and_can_be_pasted():
    command = report.command_line("op.speed", ["--workdir=DIR", "--peer=fla"])
    assert report.command_block(command) == f"Command: `{command}`"
    command += f" --implementations={'x' * 60} --dtype=bfloat16 --fixed='a=1 b=2'"
    title, _, *lines = report.command_block(command).splitlines()
    assert (title, lines[0], lines[-1]) == ("Command:", "```sh", "```")
    assert len(lines) == 5
    assert max(map(len, lines)) <= 100
    assert " ".join(line.removesuffix("\\").strip() for line in lines[1:-1]) == command
    item = report.listed(f"12. `{command}`")
    assert [line[:4] for line in item.splitlines()] == ["12. ", "    ", "    "]
