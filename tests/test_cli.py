"""The command line: a user's mistake is one line on stderr, exit code 2, and nothing else."""

import json
import subprocess
import sys

import pytest

from slmperf import cli
from slmperf.check import InputError


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run slmperf as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "slmperf.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments,said",
    [
        ([], "Missing command"),
        (["prise"], "No such command 'prise'"),
        (["run", "recipe.yaml"], "recipe.yaml: expected a recipe"),
        (["run", "--outt", "x", "recipe.yaml"], "--outt"),
        (["doctor", "--jsn"], "--jsn"),
    ],
)
def test_wrong_usage_is_one_line(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_recipe_is_one_line(tmp_path):
    pytest.importorskip("slmperf.recipe")
    done = command("run", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "none.yaml" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "raised,code,said",
    [
        (InputError("recipe.yaml: key 'stegs' is unknown,\n expected stages"), 2,
         "error: recipe.yaml: key 'stegs' is unknown, expected stages\n"),
        (FileNotFoundError(2, "No such file or directory", "x.csv"), 2,
         "error: x.csv: No such file or directory\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["input", "path", "interrupt"],
)  # fmt: skip
def test_mistakes_are_translated_once(monkeypatch, capsys, raised, code, said):
    def fail(**_):
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err == said


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def fail(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_help_lists_what_exists():
    done = command("--help")
    assert done.returncode == 0
    for name in ("run", "doctor"):
        assert name in done.stdout


def test_doctor():
    done = command("doctor", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert list(facts) == ["built", "machine", "packages", "ops"]
    assert facts["built"]["cpu_isas"] and facts["built"]["revision"]
    assert "divergence" in facts["ops"] and facts["machine"]["cpu_isas"].endswith("scalar")
    table = command("doctor")
    assert table.returncode == 0 and "divergence" in table.stdout
    assert len({len(line) for line in table.stdout.splitlines()[1:]}) == 1, "the table is ragged"


def test_version():
    from slmperf import __version__

    assert command("--version").stdout == f"slmperf {__version__}\n"
