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
