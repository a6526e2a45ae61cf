"""PreLoRAConfig: what it accepts, what it refuses and in which words, and the paper's presets."""

import dataclasses
import math

import pytest

from prelora.config import PreLoRAConfig, is_power_of_two

POSITIVE = ("tau", "zeta", "lora_lr_mult", "alpha")
COUNTS = {"k": 2, "m": 1, "r_min": 1, "r_max": 1, "warmup_epochs": 0, "monitor_from": 0, "min_epoch": 0, "deadline": 1}
CHOICES = {
    "freeze": ("targets", "all"),
    "aggregate": ("mean", "mean_abs"),
    "window": ("mean", "last"),
    "normalize": ("minmax", "quantile"),
    "criterion": ("norm", "update_rank"),
    "lora_init": ("kaiming", "window_update"),
    "switch": ("together", "per_group"),
}


def refusal(error: type[Exception], **fields: object) -> str:
    with pytest.raises(error) as caught:
        PreLoRAConfig(**fields)
    return str(caught.value)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", POSITIVE)
def test_number_that_is_not_finite_and_positive_is_refused(name, value):
    assert refusal(ValueError, **{name: value}) == f"{name} = {value}: must be finite and above 0"


@pytest.mark.parametrize(("name", "low"), COUNTS.items())
def test_count_below_its_least_value_is_refused(name, low):
    assert refusal(ValueError, **{name: low - 1}) == f"{name} = {low - 1}: must be at least {low}"


@pytest.mark.parametrize("value", [2.0, True, "4", [4]])
@pytest.mark.parametrize(("name", "low"), COUNTS.items())
def test_count_that_is_not_an_integer_is_refused(name, low, value):
    assert refusal(TypeError, **{name: value}) == f"{name} = {value!r}: must be an integer, at least {low}"


@pytest.mark.parametrize("value", [True, "0.5", [0.5]])
@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        *((name, "above 0") for name in POSITIVE),
        ("budget", "in (0, 1]"),
        ("lora_dropout", "in [0, 1)"),
        ("update_rank_max", "of at least 1"),
    ],
)
def test_number_of_another_type_is_refused(name, accepted, value):
    assert refusal(TypeError, **{name: value}) == f"{name} = {value!r}: must be a number {accepted}"


@pytest.mark.parametrize("name", sorted({*COUNTS, *POSITIVE, "lora_dropout"} - {"deadline", "alpha"}))
def test_none_is_refused_where_it_means_nothing(name):
    assert refusal(TypeError, **{name: None}).startswith(f"{name} = None: must be ")


@pytest.mark.parametrize("value", [3, 12, 63])
@pytest.mark.parametrize("name", ["r_min", "r_max"])
def test_rank_that_is_no_power_of_two_is_refused(name, value):
    assert refusal(ValueError, **{name: value}) == f"{name} = {value}: must be a power of two (1, 2, 4, 8, …)"


def test_reversed_ranks_are_refused():
    assert refusal(ValueError, r_min=64, r_max=8) == "r_min = 64 > r_max = 8: r_min must be at most r_max"


@pytest.mark.parametrize("value", [0, -0.1, 1.001, math.nan, math.inf])
def test_budget_that_is_no_share_is_refused(value):
    assert refusal(ValueError, budget=value) == f"budget = {value}: a share of the parameters, accepted in (0, 1]"


@pytest.mark.parametrize("value", [0.999, 0, -8, math.nan, math.inf])
def test_update_rank_max_that_is_no_rank_is_refused(value):
    message = refusal(ValueError, update_rank_max=value)

    assert message == f"update_rank_max = {value}: a rank, must be finite and at least 1"


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, math.inf])
def test_dropout_out_of_range_is_refused(value):
    assert refusal(ValueError, lora_dropout=value) == f"lora_dropout = {value}: accepted in [0, 1)"


@pytest.mark.parametrize(
    ("deadline", "min_epoch", "monitor_from"),
    [(1, 0, 0), (9, 10, 0), (11, 0, 10)],
    ids=["one epoch to compute ranks from", "before min_epoch", "one epoch after monitor_from"],
)
def test_deadline_that_leaves_nothing_to_decide_from_is_refused(deadline, min_epoch, monitor_from):
    message = refusal(ValueError, deadline=deadline, min_epoch=min_epoch, monitor_from=monitor_from)

    assert message.startswith(f"deadline = {deadline}: must be at least min_epoch = {min_epoch} and leave two ")
    assert f"after monitor_from = {monitor_from}" in message


@pytest.mark.parametrize("value", ["mode", "", None, True, 1])
@pytest.mark.parametrize(("name", "accepted"), CHOICES.items())
def test_unknown_choice_is_refused(name, accepted, value):
    assert refusal(ValueError, **{name: value}) == f"{name} = {value!r}: accepted are {', '.join(accepted)}"


@pytest.mark.parametrize(
    "fields",
    [
        *({name: low} for name, low in COUNTS.items() if name not in ("deadline", "r_max")),
        *({name: 1e-9} for name in POSITIVE),
        *({name: 3} for name in POSITIVE),
        *({name: value} for name, accepted in CHOICES.items() for value in accepted),
        {"r_min": 1, "r_max": 1},
        {"budget": 1},
        {"budget": 1e-9},
        {"lora_dropout": 0},
        {"lora_dropout": 0.999},
        {"update_rank_max": 1},
        {"deadline": 2},
        {"deadline": 10, "min_epoch": 10},
        {"deadline": 12, "monitor_from": 10},
        {"alpha": None, "budget": None, "deadline": None},
    ],
    ids=str,
)
def test_value_on_the_edge_of_what_is_accepted_is_kept(fields):
    config = PreLoRAConfig(**fields)

    assert {name: getattr(config, name) for name in fields} == fields


# Table 1 of the paper.
@pytest.mark.parametrize(("experiment", "tau", "zeta"), [("exp1", 1.0, 5.0), ("exp2", 0.5, 2.5), ("exp3", 0.25, 1.0)])
def test_paper_presets_are_table_1(experiment, tau, zeta):
    config = PreLoRAConfig.paper(experiment)

    assert (config.tau, config.zeta) == (tau, zeta)
    assert (config.k, config.m, config.r_min, config.r_max, config.warmup_epochs) == (3, 3, 8, 64, 10)


def test_default_is_the_papers_exp2_but_for_loras_learning_rate():
    assert PreLoRAConfig(lora_lr_mult=1.0) == PreLoRAConfig.paper() == PreLoRAConfig.paper("exp2")
    assert PreLoRAConfig().lora_lr_mult == 4.0


def test_unknown_experiment_is_refused():
    with pytest.raises(ValueError, match=r"^experiment 'exp4': accepted are exp1, exp2, exp3$"):
        PreLoRAConfig.paper("exp4")


def test_preset_takes_overrides():
    overridden = PreLoRAConfig.paper("exp1", warmup_epochs=5)

    assert overridden == PreLoRAConfig(tau=1.0, zeta=5.0, warmup_epochs=5, lora_lr_mult=1.0)


def test_preset_validates_its_overrides():
    with pytest.raises(ValueError, match="k = 1: must be at least 2"):
        PreLoRAConfig.paper("exp1", k=1)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PreLoRAConfig)])
def test_config_is_frozen(name):
    config = PreLoRAConfig()

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))


def test_fields_are_given_by_name_only():
    with pytest.raises(TypeError, match="positional"):
        PreLoRAConfig(3)


def test_powers_of_two_are_told_from_the_rest():
    assert [value for value in range(-8, 65) if is_power_of_two(value)] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("name", ["train_lora_a", "log_updates"])
def test_a_switch_is_true_or_false(name):
    assert refusal(TypeError, **{name: 1}) == f"{name} = 1: accepted are True, False"


def test_merged_execution_and_dropout_exclude_each_other():
    message = refusal(ValueError, execution="merged", lora_dropout=0.1)

    assert message.startswith("execution = 'merged' with lora_dropout = 0.1: ")
    assert message.endswith("accepted are 'auto' and 'two_path'")


def test_a_budget_with_a_switch_per_group_is_refused():
    assert refusal(ValueError, switch="per_group", budget=0.1) == (
        "switch = 'per_group' with budget = 0.1: a budget is a share over all layers, whose ranks are not known at "
        "once; accepted is budget = None"
    )
