"""The table of other libraries' scales: complete, what is accepted, and what docs/learning-rate.md prints."""

import importlib.util
from pathlib import Path

import pytest

from schatten.scale_names import ALIASES, NAMES, PEERS, own_name
from schatten.scales import Scale

ROOT = Path(__file__).parents[2]

LIBRARIES = {"torch", "Dion", "Emerging-Optimizers", "Keller", "Keras", "optax", "DeepSpeed", "Moonlight", "Megatron", "timm"}


def tables():
    spec = importlib.util.spec_from_file_location("learning_rate_tables", ROOT / "scripts" / "learning_rate_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_library_is_in_the_table_once_per_setting_and_says_where_it_was_read():
    assert {peer.library for peer in PEERS} >= LIBRARIES
    assert len({(peer.library, peer.setting) for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        assert peer.scale in NAMES and peer.times > 0
        repository, _, path = peer.source.partition(": ")
        assert repository.count("/") == 1 and ".py" in path, peer


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.name], ids=lambda peer: f"{peer.library} {peer.name}")
def test_a_name_is_accepted_exactly_where_it_means_one_of_our_factors_everywhere(peer):
    others = {(other.scale, other.times) for other in PEERS if other.name == peer.name}
    if others == {(peer.scale, 1.0)}:
        assert own_name(peer.name) == peer.scale and Scale(peer.name) == Scale(peer.scale)
    else:
        with pytest.raises(ValueError, match="is not one factor") as error:
            own_name(peer.name)
        assert str(peer) in str(error.value), "the refusal names every meaning"


def test_a_library_with_a_choice_is_no_scale():
    for library in {peer.library.lower() for peer in PEERS} - set(ALIASES) - set(NAMES):
        with pytest.raises(ValueError, match="is not one factor"):
            own_name(library)


@pytest.mark.parametrize("name", ["libraries", "shapes"])
def test_the_page_has_the_table_that_the_code_gives(name):
    lines = {"libraries": tables().peers, "shapes": tables().shapes}[name]()
    page = (ROOT / "docs" / "learning-rate.md").read_text()
    written = page.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- end of {name} -->")[0]
    assert written == "\n".join(lines), "run python scripts/learning_rate_tables.py"


def test_a_formula_of_the_page_is_the_factor_of_its_row():
    # The text is evaluated: it cannot say something else than the code does.
    from math import sqrt

    for peer in PEERS:
        for fan_out, fan_in in ((64, 16), (16, 64), (100, 100)):
            text = tables().formula(peer).replace(" sqrt", " * sqrt")
            there = eval(text, {"sqrt": sqrt, "max": max, "fan_out": fan_out, "fan_in": fan_in})
            assert there == pytest.approx(peer.times * Scale(peer.scale).factor(fan_out, fan_in), rel=1e-9)
