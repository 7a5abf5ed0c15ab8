"""A preset chosen by a string, with options as text: what trainers with a configuration file pass."""

import pytest
from torch import nn

import schatten
from schatten import presets
from schatten.integrations import create_optimizer, options_of, preset_of


class Mine(schatten.SpectralOptimizer):
    """A class of a user's own, named by its path."""

    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, lr=lr, **options)


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("write", [str, str.lower, "schatten.{}".format, "schatten.presets.{}".format])
def test_every_preset_has_its_name(write):
    for name in presets.__all__:
        assert preset_of(write(name)) is getattr(presets, name)


@pytest.mark.parametrize(
    "name, preset",
    [
        ("soap_muon", schatten.SOAPMuon),
        ("spectral-sgd", schatten.SpectralSGD),
        ("schatten.presets.muon.Muon", schatten.Muon),
        (f"{__name__}.Mine", Mine),
    ],
)
def test_other_spellings_and_paths_lead_to_their_class(name, preset):
    # By identity of the name: pytest may have imported this module under another one.
    assert preset_of(name).__qualname__ == preset.__qualname__


@pytest.mark.parametrize("name, near", [("moun", "Muon"), ("schatten.NorMoun", "NorMuon"), ("torch.optim.Muonn", "Muon")])
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"No optimizer is named '{name}', did you mean .*'{near}'"):
        preset_of(name)


@pytest.mark.parametrize("name", ["adagrad_deluxe", "no.such.package.Muonic", ""])
def test_a_name_near_to_nothing_or_in_no_package_is_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"The presets are .*Muon.*whole path"):
        preset_of(name)


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "torch.optim.Muon", "torch.nn.Linear", "torch.zeros"])
def test_a_path_to_what_is_no_spectral_optimizer_is_refused(name):
    with pytest.raises(TypeError, match="not a SpectralOptimizer"):
        preset_of(name)


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        (" lr=1e-3 ", {"lr": 1e-3}),
        ("scale=keller,nesterov=False,weight_decay=.1", {"scale": "keller", "nesterov": False, "weight_decay": 0.1}),
        ("betas=(0.9, 0.99), maximize=true,", {"betas": (0.9, 0.99), "maximize": True}),
        ("adamw={'lr': 1e-4, 'betas': [0.9, 0.95]}, lr=0.02", {"adamw": {"lr": 1e-4, "betas": [0.9, 0.95]}, "lr": 0.02}),
        ("rules=[('head.*', 'adamw')], solver=none", {"rules": [("head.*", "adamw")], "solver": None}),
        ("scale='adamw-rms'", {"scale": "adamw-rms"}),
        ("scale=adamw-rms", {"scale": "adamw-rms"}),
    ],
)
def test_options_are_read_from_text(text, options):
    assert options_of(text) == options


@pytest.mark.parametrize("text", ["lr", "lr=", "=3", "lr=1,,momentum=0.9", "lr 1e-3", "a b=1", "lr=1, ,"])
def test_text_that_is_no_option_is_refused(text):
    with pytest.raises(ValueError, match="Options are written 'key=value, key=value', got"):
        options_of(text)


def test_an_option_given_twice_is_refused():
    with pytest.raises(ValueError, match="'lr' twice"):
        options_of("lr=1, lr=2")


def test_keywords_win_over_the_text_and_the_rest_is_the_presets_own():
    opt = create_optimizer("muon", model(), "lr=1, momentum=0.5", lr=0.25)
    group = opt.param_groups[0]
    assert type(opt) is schatten.Muon
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.5, 0.1)
    assert opt.plan == schatten.plan(model())


def test_options_may_be_a_mapping():
    assert create_optimizer("Muon", model(), {"lr": 0.5}).param_groups[0]["lr"] == 0.5


def test_every_preset_is_built_with_options_of_its_own_and_of_its_base(any_preset):
    opt = create_optimizer(any_preset.__name__, model(), "lr=0.5, rounding=nearest, maximize=true")
    assert type(opt) is any_preset
    assert opt.param_groups[0]["lr"] == 0.5  # AdamW's groups have an lr of their own where a preset's is in other units
    assert all((g["rounding"], g["maximize"]) == ("nearest", True) for g in opt.param_groups)


@pytest.mark.parametrize(
    "name, key, near",
    [("muon", "momentun", "momentum"), ("lion", "beta", "betas"), ("dion", "max_batch_byte", "max_batch_bytes")],
)
def test_an_unknown_option_is_refused_with_the_nearest(name, key, near):
    with pytest.raises(TypeError, match=f"has no option '{key}', did you mean '{near}'. It takes lr, weight_decay, "):
        create_optimizer(name, model(), **{key: 0.1})


def test_no_preset_takes_an_unknown_option(any_preset):
    with pytest.raises(TypeError, match=f"{any_preset.__name__} has no option 'learning_rate'. It takes .*weight_decay, "):
        create_optimizer(any_preset.__name__, model(), learning_rate=0.1)


def test_the_rule_of_a_preset_is_no_option(any_preset):
    with pytest.raises(TypeError, match="has no option 'rule'"):
        create_optimizer(any_preset.__name__, model(), rule=schatten.Rule())


def test_a_class_of_ones_own_takes_what_its_constructor_takes():
    group = create_optimizer(f"{__name__}.Mine", model(), "momentum=0.5").param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.5)
    with pytest.raises(TypeError, match="This rule reads momentum"):
        create_optimizer(f"{__name__}.Mine", model(), "beta=0.5")
