"""The trainer's config: complete in YAML, strict in what it takes, and the same whichever way it is given."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prelora.train import run_dir
from prelora.train.__main__ import EXIT_BAD_INPUT, main, parse
from prelora.train.config import TrainConfig, from_dict, load_yaml, save_yaml, to_dict
from prelora.train.recipes import RECIPES

RECIPE_NAMES = list(RECIPES)


def nested(name, value):
    """``{"optim": {"lr": value}}`` for ``optim.lr``."""
    for key in reversed(name.split(".")):
        value = {key: value}
    return value


# To YAML and back.


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_comes_back_from_yaml_as_it_was(name, tmp_path):
    config = RECIPES[name]()

    save_yaml(config, tmp_path / "config.yaml")

    assert load_yaml(tmp_path / "config.yaml") == config


def test_values_off_their_defaults_come_back_from_yaml_as_they_were(tmp_path):
    values = {
        "seed": 7,
        "ema_decay": 0.5,
        "output": "some/where",
        "prelora": {"deadline": 9, "budget": 0.25, "log_updates": False},
        "model": {"library": "transformers", "depth": 2, "drop_rate": 0.125},
        "data": {"name": "images", "path": "images", "rand_augment": [2, 15]},
        "optim": {"clip_grad": 2.0, "lr": 1e-30},
        "checkpoint": {"every_steps": 3},
    }

    save_yaml(from_dict(values), tmp_path / "config.yaml")

    saved = load_yaml(tmp_path / "config.yaml")
    assert (saved.seed, saved.ema_decay, saved.output) == (7, 0.5, Path("some/where"))
    assert (saved.prelora.deadline, saved.prelora.budget, saved.prelora.log_updates) == (9, 0.25, False)
    assert (saved.model.library, saved.model.depth, saved.model.drop_rate) == ("transformers", 2, 0.125)
    assert (saved.data.name, saved.data.path, saved.data.rand_augment) == ("images", Path("images"), (2, 15))
    assert (saved.optim.clip_grad, saved.optim.lr, saved.checkpoint.every_steps) == (2.0, 1e-30, 3)


def test_the_saved_yaml_holds_every_value_of_every_part(tmp_path):
    save_yaml(TrainConfig(), tmp_path / "config.yaml")

    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == to_dict(TrainConfig())
    assert set(written["prelora"]) == {field.name for field in dataclasses.fields(TrainConfig().prelora)}


def test_a_yaml_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    save_yaml(TrainConfig(), tmp_path / "config.yaml")

    def cut_off(path, text, **_):
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="No space left"):
        save_yaml(TrainConfig(seed=1), tmp_path / "config.yaml")

    assert load_yaml(tmp_path / "config.yaml") == TrainConfig()


def test_what_a_yaml_leaves_out_is_the_default(tmp_path):
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.5\n")

    config = load_yaml(tmp_path / "config.yaml")

    assert config == TrainConfig(optim=dataclasses.replace(TrainConfig().optim, lr=0.5))


@pytest.mark.parametrize(("text", "lr"), [("1", 1.0), ("1e-3", 1e-3), ("5.e-4", 5e-4), ("'0.5'", 0.5)])
def test_a_number_written_as_yaml_does_not_read_it_is_read_all_the_same(text, lr, tmp_path):
    (tmp_path / "config.yaml").write_text(f"optim: {{lr: {text}}}")

    assert load_yaml(tmp_path / "config.yaml").optim.lr == lr


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epoch", "epochs"),
        ("ema_deacy", "ema_decay"),
        ("prelora.taus", "prelora.tau"),
        ("prelora.warmup_epoch", "prelora.warmup_epochs"),
        ("model.imagesize", "model.image_size"),
        ("data.batchsize", "data.batch_size"),
        ("optim.weight_deacy", "optim.weight_decay"),
        ("checkpoint.keep", "checkpoint.keep_last"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(key, meant):
    with pytest.raises(ValueError, match=rf"unknown key {key}: did you mean {meant}\?"):
        from_dict(nested(key, 1))


def test_an_unknown_key_like_none_is_refused_with_all_known_ones():
    with pytest.raises(ValueError, match=r"unknown key optim\.xyzzy: known are name, lr, min_lr"):
        from_dict({"optim": {"xyzzy": 1}})


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("epochs", 1.5, "int"),
        ("epochs", "3", "int"),
        ("epochs", True, "int"),
        ("output", 3, "Path"),
        ("resume", True, r"Literal\['never', 'auto'\]"),
        ("deterministic", 1, "bool"),
        ("ema_decay", "high", "float"),
        ("prelora", None, "PreLoRAConfig"),
        ("prelora.k", 2.5, "int"),
        ("prelora.tau", "small", "float"),
        ("model.library", "jax", r"Literal\['timm', 'transformers'\]"),
        ("model.depth", "deep", r"int \| None"),
        ("data.path", 3, "Path"),
        ("data.rand_augment", [2, 15, 3], r"tuple\[int, float\] \| None"),
        ("optim.lr", "fast", "float"),
        ("optim.lr", None, "float"),
        ("optim.lr", True, "float"),
    ],
)
def test_a_wrong_type_is_refused_naming_field_value_and_type(name, value, accepted):
    with pytest.raises(TypeError, match=rf"{name} = .+: must be {accepted}$"):
        from_dict(nested(name, value))


OUT_OF_RANGE = {
    "above 0": {
        "epochs": 0,
        "model.image_size": 0,
        "model.patch_size": -4,
        "model.embed_dim": 0,
        "model.depth": 0,
        "model.num_heads": 0,
        "data.batch_size": 0,
        "optim.lr": 0.0,
        "optim.clip_grad": -1.0,
        "optim.accumulate": 0,
        "checkpoint.every_steps": 0,
        "checkpoint.every_epochs": 0,
        "checkpoint.keep_last": 0,
    },
    "at least 0": {
        "data.workers": -1,
        "data.mixup": -0.2,
        "data.cutmix": -1.0,
        "optim.min_lr": -1e-6,
        "optim.weight_decay": -0.1,
        "optim.warmup_epochs": -1,
    },
    r"in \[0, 1\)": {"model.drop_rate": 1.0, "model.drop_path_rate": -0.1, "data.label_smoothing": 1.0},
    r"in \(0, 1\)": {"ema_decay": 1.0},
    r"from 0 to below 2\^32": {"seed": 2**32},
    "finite": {"optim.lr": math.nan, "optim.min_lr": math.inf, "data.mixup": math.nan, "ema_decay": math.nan},
    "finite and above 0": {"prelora.tau": math.nan, "prelora.zeta": 0.0, "prelora.lora_lr_mult": -1.0},
    "at least 2": {"prelora.k": 1},
    "at least 1": {"prelora.m": 0, "prelora.r_min": 0},
    r"a power of two": {"prelora.r_max": 12},
    "below epochs = 30": {"optim.warmup_epochs": 30},
    "at most optim.lr = 0.001": {"optim.min_lr": 0.01},
}


@pytest.mark.parametrize(
    ("accepted", "name", "value"),
    [(accepted, name, value) for accepted, fields in OUT_OF_RANGE.items() for name, value in fields.items()],
)
def test_a_value_out_of_range_is_refused_naming_field_value_and_range(accepted, name, value):
    short = name.removeprefix("prelora.")  # the algorithm's config stands on its own

    with pytest.raises(ValueError, match=rf"{short} = {value}: must be {accepted}"):
        from_dict(nested(name, value))


def test_gradients_are_not_compressed_where_they_are_sharded():
    with pytest.raises(ValueError, match=r"distributed\.compress = bf16: must be none with strategy fsdp"):
        from_dict({"distributed": {"strategy": "fsdp", "compress": "bf16"}})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "holds list, expected a mapping"),
        ("just words", "holds str, expected a mapping"),
        ("", "holds NoneType, expected a mapping"),
        ("{unclosed", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_by_name(text, complaint, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ValueError, match=rf"broken\.yaml {complaint}"):
        load_yaml(path)


# The command line.


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--epochs", "70", 70),
        ("--output", "a/b", Path("a/b")),
        ("--ema-decay", "None", None),
        ("--prelora.tau", "2.5", 2.5),
        ("--prelora.freeze", "all", "all"),
        ("--prelora.deadline", "20", 20),
        ("--model.depth", "3", 3),
        ("--data.label-smoothing", "0", 0.0),
        ("--optim.lr", "3e-4", 3e-4),
        ("--optim.clip-grad", "None", None),
        ("--checkpoint.every-steps", "10", 10),
    ],
)
def test_an_option_overrides_its_field_and_no_other(option, text, expected):
    config, _ = parse(["--recipe", "digits", option, text])

    section, _, name = option[2:].replace("-", "_").rpartition(".")
    recipe = RECIPES["digits"]()
    changed = dataclasses.replace(getattr(recipe, section) if section else recipe, **{name: expected})
    assert config == (dataclasses.replace(recipe, **{section: changed}) if section else changed)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_is_chosen_by_name_and_noted(name):
    config, _ = parse(["--recipe", name])

    assert config == RECIPES[name]()
    assert config.recipe == name


def test_without_arguments_it_is_the_digits():
    assert parse([]) == (RECIPES["digits"](), None)


@pytest.mark.parametrize(
    ("arguments", "started", "gpus"),
    [
        ("--recipe vit_large_imagenet --dry-run", None, 64),
        ("--recipe vit_large_imagenet --dry-run", "4", 4),
        ("--recipe vit_large_imagenet --dry-run --gpus 8", "4", 8),
        ("--recipe digits --dry-run", None, 1),
    ],
)
def test_a_dry_run_is_for_the_gpus_asked_for_or_started_or_meant(arguments, started, gpus, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)

    assert parse(arguments.split())[1] == gpus


def test_options_override_a_config_file(tmp_path):
    save_yaml(RECIPES["digits"](), tmp_path / "config.yaml")

    config, _ = parse(["--config", str(tmp_path / "config.yaml"), "--seed", "5"])

    assert config == dataclasses.replace(RECIPES["digits"](), seed=5)


REFUSED = {
    "an unknown recipe": (["--recipe", "imagenet"], ["imagenet", *RECIPE_NAMES]),
    "an empty recipe": (["--recipe", ""], RECIPE_NAMES),
    "a recipe and a config": (["--recipe", "digits", "--config", "x.yaml"], ["--recipe and --config", "one of them"]),
    "a config that is not there": (["--config", "/nowhere/x.yaml"], ["/nowhere/x.yaml"]),
    "a recipe without its name": (["--recipe"], ["prelora train", "--recipe"]),
    "an option of another place": (["--lr", "1"], ["--lr", "--optim.lr"]),
    "a number that is none": (["--optim.lr", "fast"], ["--optim.lr", "fast"]),
    "a number of GPUs without a plan": (["--gpus", "8"], ["--gpus 8", "--dry-run"]),
    "a plan for no GPU": (["--dry-run", "--gpus", "0"], ["--gpus 0", "at least 1"]),
    "a value out of range": (["--prelora.tau", "-1"], ["tau = -1", "above 0"]),
    "a choice that is none": (["--precision", "fp8"], ["fp8", "fp32", "bf16", "fp16"]),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_exit_with_2_and_say_what_is_accepted(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse and tyro end the process themselves
        code = stop.code

    error = capsys.readouterr().err
    assert code == EXIT_BAD_INPUT
    assert [word for word in words if word not in error] == []


def test_help_exits_with_0_and_lists_recipes_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])

    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert [name for name in RECIPE_NAMES if f"{name}: {RECIPES[name].__doc__.splitlines()[0]}" not in text] == []
    for code in ("0 finished", "2 bad input", "3 the loss was not finite", "4 a checkpoint", "75 stopped by SIGTERM"):
        assert code in text


@pytest.mark.parametrize("option", ["--help", "--dry-run"])
def test_a_pager_that_has_seen_enough_is_no_error(option, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "prelora.train", option], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    process.stdout.close()

    error = process.stderr.read().decode()
    assert (process.wait(), error) == (0, "")


# The run keeps what it was.


def test_the_resolved_config_in_the_run_repeats_it(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    small = "--epochs 1 --seed 3 --optim.warmup-epochs 0 --model.depth 1 --model.image-size 8 --data.batch-size 700"
    assert main([*small.split(), "--output", str(first)]) == 0

    assert main(["--config", str(first / run_dir.CONFIG), "--output", str(again)]) == 0

    saved = load_yaml(first / run_dir.CONFIG)
    assert saved == parse([*small.split(), "--output", str(first)])[0]
    assert load_yaml(again / run_dir.CONFIG) == dataclasses.replace(saved, output=again)
    norms = [(folder / run_dir.METRICS).read_text().partition('"norms"')[2] for folder in (first, again)]
    assert norms[0] == norms[1] != ""
