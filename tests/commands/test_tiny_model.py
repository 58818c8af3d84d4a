import pytest

from rq_ep.__main__ import main


def test_trains_then_reuses(tmp_path, capsys) -> None:
    out = str(tmp_path / "model")
    assert main(["tiny-model", "--out", out, "--steps", "2"]) == 0
    assert "trained" in capsys.readouterr().out
    assert main(["tiny-model", "--out", out, "--steps", "2"]) == 0
    assert "reused" in capsys.readouterr().out


def test_unknown_family_is_one_line(tmp_path, capsys) -> None:
    assert main(["tiny-model", "--out", str(tmp_path / "model"), "--family", "mixtrall"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'mixtral'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--out", "/dev/null"], "--out /dev/null: exists and holds something else"),
        (["--out", "/dev/null/model"], "--out /dev/null/model: cannot be written"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options: list[str], message: str) -> None:
    assert main(["tiny-model", "--out", str(tmp_path / "model"), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
