"""Settings: the command line over a file over defaults, and what is said about mistakes."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from rq_ep.config import ServeConfig, StrategyConfig, add_flags, read_settings, resolved
from rq_ep.core.errors import UserError


def read(*argv: str) -> ServeConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser, ServeConfig)
    return read_settings(ServeConfig, parser.parse_args(argv))


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_stand_when_nothing_is_given() -> None:
    assert read("--model", "m") == ServeConfig(model="m")


def test_flags_win_over_the_file_and_the_file_over_defaults(write) -> None:
    file = write("model: from-file\nport: 9000\nmax-num-seqs: 3\n")
    assert read("--config", file, "--port", "9001") == ServeConfig(model="from-file", port=9001, max_num_seqs=3)


@pytest.mark.parametrize("flag", ["--max-num-seqs", "--max_num_seqs"])
def test_dashes_and_underscores_are_both_accepted(flag: str) -> None:
    assert read("--model", "m", flag, "7").max_num_seqs == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rq", StrategyConfig("rq")),
        ("{name: llep, min_tokens_per_gemm: 16}", StrategyConfig("llep", {"min_tokens_per_gemm": 16})),
    ],
)
def test_a_strategy_is_a_name_or_a_mapping(write, text: str, expected: StrategyConfig) -> None:
    assert read("--model", "m", "--strategy", text).strategy == expected
    assert read("--config", write(f"model: m\nstrategy: {text}\n")).strategy == expected


def test_a_secret_is_not_shown() -> None:
    config = read("--model", "m", "--api-key", "hush")
    assert config.api_key == ("hush",)
    assert "hush" not in resolved(config)
    assert yaml.safe_load(resolved(read("--model", "m")))["api_key"] is None


def test_api_keys_come_from_flags_a_file_or_the_environment(write, tmp_path: Path) -> None:
    environ = {"RQ_EP_API_KEY": "c"}
    keys = tmp_path / "keys"
    keys.write_text("b\n\n b2 \n")

    def keys_of(*flags: str) -> tuple[str, ...] | None:
        return read("--model", "m", *flags).with_api_keys(environ).api_key

    assert keys_of() == ("c",)
    assert keys_of("--api-key", "a", "a2") == ("a", "a2")
    assert keys_of("--api-key-file", str(keys)) == ("b", "b2")
    assert keys_of("--api-key", "a", "--api-key-file", str(keys)) == ("a", "b", "b2")
    assert read("--config", write("model: m\napi_key: a")).with_api_keys({}).api_key == ("a",)
    assert read("--model", "m").with_api_keys({}).api_key is None
    keys.write_text("\n")
    for name in (str(keys), str(tmp_path / "none")):
        with pytest.raises(UserError, match="--api-key-file"):
            keys_of("--api-key-file", name)


@pytest.mark.parametrize("value", ["12345", "[12345]", "{key: 12345}", "[[12345]]"])
def test_a_secret_of_a_wrong_type_is_not_quoted(write, value: str) -> None:
    with pytest.raises(UserError, match="--api-key: must be text") as caught:
        read("--config", write(f"model: m\napi_key: {value}\n"))
    assert "12345" not in str(caught.value)


def test_resolved_settings_are_a_file_that_gives_them_again(write) -> None:
    config = ServeConfig(model="m", strategy=StrategyConfig("llep", {"min_tokens_per_gemm": 16}), shutdown_timeout=2.5)
    assert read("--config", write(resolved(config))) == config
    assert next(iter(yaml.safe_load(resolved(config)))) == "model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nmax_num_sequs: 3\n", "unknown setting in .*'max_num_sequs': did you mean 'max_num_seqs'"),
        ("model: m\nport: eighty\n", "run.yaml: --port 'eighty': must be a whole number"),
        ("model: m\nport: true\n", "--port True: must be a whole number"),
        ("model: m\nport: 70000\n", "--port 70000: must be at most 65535"),
        ("model: m\nshutdown_timeout: -1\n", "--shutdown-timeout -1: must be at least 0"),
        ("model: m\nport:\n", "--port None: must be a whole number"),
        ("model: 3\n", "--model 3: must be text"),
        ("model: m\ndtype: float23\n", "unknown --dtype 'float23': did you mean 'float32'"),
        ("model: m\nstrategy: [rq]\n", "--strategy .*: expected a name or a mapping"),
        ("model: m\nstrategy: {min: 3}\n", "--strategy .*: expected a name or a mapping"),
        ("model: [m\n", "run.yaml, line 2: malformed YAML"),
        ("- model\n", "expected `key: value` lines, not list"),
        ("port: 8000\n", "--model is needed"),
    ],
)
def test_mistakes_in_a_file_are_named(write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read("--config", write(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "m", "--port", "eighty"], "--port 'eighty': must be a whole number"),
        (["--model", "m", "--max-num-seqs", "0"], "--max-num-seqs 0: must be at least 1"),
        (["--model", "m", "--device", "gpu"], "unknown --device 'gpu'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        ([], "--model is needed"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(*argv)


def test_a_group_goes_on_without_a_rank_unless_there_is_one_or_it_is_to_stop() -> None:
    chosen = [ServeConfig(model="m").for_ranks(num_ranks).on_rank_failure for num_ranks in (1, 2)]
    assert chosen == ["stop", "continue"]
    assert ServeConfig(model="m", on_rank_failure="stop").for_ranks(2).on_rank_failure == "stop"
    with pytest.raises(UserError, match="--on-rank-failure continue: needs more than one rank"):
        ServeConfig(model="m", on_rank_failure="continue").for_ranks(1)


def test_a_group_begins_with_fewer_ranks_only_where_the_others_can_join() -> None:
    assert [ServeConfig(model="m", min_ranks=2).for_ranks(num_ranks).min_ranks for num_ranks in (2, 3)] == [None, 2]
    with pytest.raises(UserError, match=r"--min-ranks 4: the launcher has 3 ranks"):
        ServeConfig(model="m", min_ranks=4).for_ranks(3)
    with pytest.raises(UserError, match=r"--min-ranks 2: needs --on-rank-failure continue"):
        ServeConfig(model="m", min_ranks=2, on_rank_failure="stop").for_ranks(3)
    with pytest.raises(UserError, match=r"--wait-for-ranks 5: needs --min-ranks"):
        ServeConfig(model="m", wait_for_ranks=5.0).for_ranks(3)


@pytest.mark.parametrize(
    ("settings", "num_ranks", "message"),
    [
        ({"rebalance": "auto"}, 1, "--rebalance auto: one rank has nothing to balance"),
        ({"formats": ("bf16", "int8")}, 1, "--formats bf16,int8: needs --rebalance auto"),
        ({"formats": ("int8",)}, 2, None),  # which also says what the ranks may do that are left when one has failed
        ({"interval": 7}, 2, "--rebalance-interval 7: needs --rebalance auto"),
        ({"placement_out": "p"}, 2, "--placement-out p: needs --rebalance auto"),
        ({"experts": "e"}, 2, "--experts e: without --placement no expert is stored in low bits"),
        ({"attn_implementation": "flex"}, 2, "--attn-implementation flex: continuous batching runs on sdpa, eager"),
        ({"allowed_origins": ("*", "https://a.example/")}, 2, "--allowed-origins https://a.example/: not an origin"),
        ({"allowed_origins": ("a.example",)}, 2, "--allowed-origins a.example: not an origin"),
        ({"allowed_image_networks": ("10.0.0.0/8",)}, 2, "networks 10.0.0.0/8: without --allow-remote-images no image"),
        (
            {"allowed_image_networks": ("10.0.0.1/8",), "allow_remote_images": True},
            2, "--allowed-image-networks: 10.0.0.1/8 has host bits set",
        ),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: Any, num_ranks: int, message: str | None) -> None:
    given = ServeConfig(model="m", **settings)
    if message is None:
        given.for_ranks(num_ranks)
        return
    with pytest.raises(UserError) as raised:
        given.for_ranks(num_ranks)
    assert message in str(raised.value)
