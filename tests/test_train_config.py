"""The trainer's config: YAML, command line, and one clear error for each mistake."""

import pytest
import yaml

from prelora.train.__main__ import main, parse
from prelora.train.config import from_dict, load_yaml, save_yaml, to_dict
from prelora.train.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_yaml_round_trip_gives_the_same_config(recipe, tmp_path):
    config = RECIPES[recipe]()
    save_yaml(config, tmp_path / "config.yaml")

    assert load_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"unknown key epoch: did you mean epochs\?"),
        ({"prelora": {"taus": 1.0}}, r"unknown key prelora\.taus: did you mean prelora\.tau\?"),
        ({"optim": {"learning": 1}}, r"unknown key optim\.learning: known are name, lr"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(values)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"epochs": 0}, "epochs = 0"),
        ({"data": {"batch_size": -1}}, "batch_size = -1"),
        ({"optim": {"lr": 0.0}}, r"optim\.lr = 0"),
        ({"epochs": 3, "optim": {"warmup_epochs": 3}}, r"optim\.warmup_epochs = 3"),
        ({"ema_decay": 1.0}, r"ema_decay = 1\.0"),
        ({"prelora": {"tau": -1.0}}, r"tau = -1\.0"),
        ({"prelora": {"r_min": 3}}, "r_min = 3"),
    ],
)
def test_value_out_of_range_is_named(values, name):
    with pytest.raises(ValueError, match=name):
        from_dict(values)


@pytest.mark.parametrize("values", [{"epochs": "many"}, {"compile": 1}, {"prelora": {"k": 2.5}}])
def test_wrong_type_is_refused(values):
    with pytest.raises(TypeError, match="must be"):
        from_dict(values)


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_file_that_is_no_mapping_is_refused(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)

    with pytest.raises(ValueError, match=r"config\.yaml"):
        load_yaml(tmp_path / "config.yaml")


def test_command_line_overrides_reach_every_level():
    config, dry_run = parse(["--recipe", "digits", "--epochs", "9", "--prelora.tau", "0.25", "--dry-run"])

    assert (config.epochs, config.prelora.tau, config.recipe, dry_run) == (9, 0.25, "digits", True)


def test_yaml_exponents_without_a_point_are_numbers():
    assert from_dict(yaml.safe_load("optim: {lr: 1e-3}")).optim.lr == 1e-3


def test_config_file_and_overrides_combine(tmp_path):
    save_yaml(RECIPES["digits"](), tmp_path / "run.yaml")

    config, _ = parse(["--config", str(tmp_path / "run.yaml"), "--seed", "7"])

    assert to_dict(config) == {**to_dict(RECIPES["digits"]()), "seed": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "vit_huge"], "accepted are digits, vit_large_imagenet"),
        (["--recipe", "digits", "--config", "x.yaml"], "give one of them"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--device", "cuda"], "sees no CUDA device"),
    ],
)
def test_bad_command_line_exits_with_2_and_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    code = main([*arguments, "--output", str(tmp_path / "run")])

    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_value_out_of_range_on_the_command_line_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--prelora.tau", "-1"])

    assert stop.value.code == 2
    assert "tau = -1.0: must be finite and above 0" in capsys.readouterr().err


def test_dry_run_of_vit_large_prints_the_papers_numbers(capsys):
    assert main(["--recipe", "vit_large_imagenet", "--dry-run"]) == 0

    plan = capsys.readouterr().out
    for figure in ("304.33 M", "30.43 (10.00 %)", "369.02", "1.30×", "1.45×", "epoch 41 at the earliest"):
        assert figure in plan


def test_help_lists_recipes_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])

    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "vit_large_imagenet" in text
    assert "75 stopped" in " ".join(text.replace("│", " ").split())
