"""Settings: from options and variables, with errors that say what is allowed."""

from __future__ import annotations

from datetime import timedelta

import pytest

from checkpointless_elastic import Config, ConfigError


def test_an_option_wins_over_a_variable() -> None:
    config = Config.parse({"settle_timeout": "5"}, {"CHECKPOINTLESS_SETTLE_TIMEOUT": "7"})
    assert config.settle_timeout == timedelta(seconds=5)


def test_a_variable_is_read() -> None:
    assert Config.parse({}, {"CHECKPOINTLESS_MAX_FAULTS_PER_STEP": "3"}).max_faults_per_step == 3


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="Unknown setting 'settle'.*known settings are .*join_timeout.*settle_timeout"
    ):
        Config.parse({"settle": "5"}, {})


@pytest.mark.parametrize("value", ["-1", "0", "soon"])
def test_a_time_limit_must_be_a_positive_number_of_seconds(value: str) -> None:
    with pytest.raises(ConfigError, match="join_timeout must be a"):
        Config.parse({"join_timeout": value}, {})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("node_faults", "2.5", "a whole number"), ("hang_factor", "abc", "a number")],
)
def test_a_value_of_another_kind_is_refused_in_plain_words(name: str, value: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"The setting {name} must be {wanted}, not '{value}'"):
        Config.parse({name: value}, {})


def test_every_setting_is_described() -> None:
    assert all(meaning for _, _, meaning in Config.describe())


@pytest.mark.parametrize("name", ["mirror_every", "verify_every"])
def test_a_number_of_steps_is_not_negative(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be 0 or a number of steps, not -1"):
        Config.parse({name: "-1"}, {})
