"""The run file: strictly read, every default filled in, secrets never written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from galvatron_jax.errors import ConfigError
from galvatron_jax.train import LogConfig, ModelConfig, OptimizerConfig, RunConfig, load_config
from galvatron_jax.train._build import build_optimizer, build_subject
from galvatron_jax.train._cli import device_environment, main
from galvatron_jax.train._config import parse_config
from galvatron_jax.train._identity import REDACTED, check_same_run, fingerprint, read_config, write_config
from galvatron_jax.train._trackers import open_trackers


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[run]\nsteps = 0", "$.run.steps"),
        ("[run]\nsteps = '5'", "$.run.steps"),
        ("[run]\nstepz = 5", "unknown field `stepz`"),
        ("[train]\nsteps = 5", "unknown field `train`"),
        ("[optimizer]\nlearning_rate = nan", "learning_rate"),
        ("[optimizer]\nlearning_rate = inf", "learning_rate"),
        ("[optimizer]\nname = 'lion'", "'lion'"),
        ("[model]\npreset = 'x'\nfunction = 'm:f'", "only one of them"),
        ("[data]\nheld_out = 0.6", "$.data.held_out"),
        ("[run]\nprofile = '5'", "FIRST:LAST"),
        ("steps = [", "is no TOML"),
        ("\x00", "is no TOML"),
        ("a = 1\na = 2", "is no TOML"),
    ],
)
def test_file_that_is_wrong_is_refused_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert problem in error.value.message
    assert str(path) in error.value.message
    assert error.value.exit_code == 2


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="too large"):
        load_config(file(tmp_path, "#" * (2**20 + 1)))
    with pytest.raises(ConfigError):
        load_config(file(tmp_path, "a=" + "[" * 100_000))


def test_settings_overrule_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "[run]\nsteps = 5\nfolder = 'a'")
    config = load_config(path, ["run.steps=7", "run.folder=b/c", "model.changes={layers=3}", "data.paths=['x']"])
    assert (config.run.steps, config.run.folder, config.model.changes) == (7, "b/c", {"layers": 3})
    assert config.data.paths == ("x",)
    with pytest.raises(ConfigError, match="section.key=value"):
        load_config(path, ["steps=7"])


def test_configuration_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    config = load_config(
        file(tmp_path, "[run]\nsteps = 5\n[data]\npaths = ['a', 'b']\n[model]\nchanges = {layers = 2}")
    )
    write_config(config, tmp_path / "run")
    assert read_config(tmp_path / "run") == config
    assert read_config(tmp_path / "other") is None


@pytest.mark.parametrize("name", ["hub_token", "api_key", "password", "my_secret", "KEY"])
def test_secrets_are_redacted_in_what_is_saved(tmp_path: Path, name: str) -> None:
    config = RunConfig(model=ModelConfig(changes={name: "hunter2", "layers": 2}))
    text = write_config(config, tmp_path).read_text()
    assert "hunter2" not in text
    assert REDACTED in text
    assert 'tokenizer = "bytes"' in text


def test_identity_ignores_what_does_not_change_the_result() -> None:
    base = RunConfig()
    assert fingerprint(
        parse_config({"log": {"every": 1}, "run": {"folder": "x", "mesh": "2x4"}}, where="")
    ) == fingerprint(base)
    assert fingerprint(parse_config({"data": {"seed": 1}}, where="")) != fingerprint(base)


def test_all_differences_are_named_and_only_some_may_be_overridden() -> None:
    before = RunConfig()
    now = parse_config({"optimizer": {"learning_rate": 1.0}, "data": {"seed": 1}}, where="")
    with pytest.raises(ConfigError) as error:
        check_same_run(before, now, override=True, where="runs/x")
    assert "data.seed: 0 so far, 1 now" in error.value.message
    assert "learning_rate" not in error.value.message
    with pytest.raises(ConfigError) as error:
        check_same_run(before, now, override=False, where="runs/x")
    assert "data.seed" in error.value.message
    assert "optimizer.learning_rate" in error.value.message


# ---------------------------------------------------------------------------------------------------- model, optimizer
def test_preset_with_changes_and_unknown_field() -> None:
    assert build_subject(ModelConfig(preset="llama-tiny", changes={"vocab": 300})).vocab == 300
    with pytest.raises(ConfigError, match="got layerz"):
        build_subject(ModelConfig(changes={"layerz": 3}))


@pytest.mark.parametrize("name", ["nowhere:f", "galvatron_jax:nothing", "galvatron_jax", ""])
def test_function_that_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot import|module:function"):
        build_subject(ModelConfig(function=name or ":"))


@pytest.mark.parametrize(
    ("schedule", "first", "peak_at", "last"),
    [("cosine", 0.1, 10, 0.1), ("linear", 0.1, 10, 0.1), ("constant", 0.1, 10, 1)],
)
def test_schedule_rises_to_the_peak_and_falls_to_its_share(
    schedule: str, first: float, peak_at: int, last: float
) -> None:
    config = parse_config({"optimizer": {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": 10}}, where="")
    rate: Any = build_optimizer(config.optimizer, 100)[1]
    assert float(rate(0)) == pytest.approx(first, rel=0.2)
    assert float(rate(peak_at)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_every_optimizer_takes_a_step(name: str, clip_norm: float) -> None:
    config = parse_config({"optimizer": {"name": name, "clip_norm": clip_norm}}, where="").optimizer
    assert isinstance(config, OptimizerConfig)
    rule, _ = build_optimizer(config, 10)
    parameters = {"x": jnp.ones((4, 4))}
    updates: Any = rule.update({"x": jnp.ones((4, 4))}, rule.init(parameters), parameters)[0]
    assert float(jnp.abs(updates["x"]).max()) > 0


# ------------------------------------------------------------------------------------------------------------- command
def test_command_tells_bad_input_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("galvatron_jax.train: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_missing_extra_is_named(extra: str, tmp_path: Path) -> None:
    config = LogConfig(tensorboard=True) if extra == "tensorboard" else LogConfig(wandb="project")
    with pytest.raises(ConfigError, match=rf"pip install 'galvatron-jax\[{extra}\]'"):
        open_trackers(config, tmp_path)


def test_virtual_devices_keep_the_users_flags() -> None:
    found = device_environment(4, {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8"})
    assert "--xla_a=1" in found["XLA_FLAGS"]
    assert found["XLA_FLAGS"].count("device_count") == 1
    assert "device_count=4" in found["XLA_FLAGS"]
    assert found["JAX_PLATFORMS"] == "cpu"
    assert device_environment(None, {}) == {}


def test_help_and_bad_input_are_told_without_loading_jax(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom galvatron_jax.train._cli import main\n"
        f"assert main([{str(tmp_path / 'none.toml')!r}]) == 2\nassert 'jax' not in sys.modules, 'jax is loaded'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
