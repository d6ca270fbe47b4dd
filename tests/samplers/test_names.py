"""Names that people know recipes by."""

import pytest

from pfode.errors import UsageError
from pfode.samplers import CATALOGUE
from pfode.samplers.catalogue import recipe
from pfode.samplers.names import FAMILIES, squeezed


def test_every_recipe_is_found_by_every_spelling_of_its_name():
    assert len({squeezed(name) for name in CATALOGUE}) == len(CATALOGUE)
    for name in CATALOGUE:
        for spelt in (name, name.upper(), name.replace("++", "pp"), name.replace("-", "_")):
            assert recipe(spelt).name == name


def test_families_stand_for_a_member():
    assert not set(FAMILIES) & set(CATALOGUE)
    for name, member in FAMILIES.items():
        assert recipe(name) is CATALOGUE[member]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("euler_ancestral", "euler-a"), ("dpm_2_ancestral", "dpm2-a"), ("dpmpp_2s_ancestral", "dpm++2s-a")]
    + [("dpmpp_2m_sde", "dpm++2m-sde"), ("uni_pc", "unipc2"), ("DPM++ 2M", "dpm++2m"), ("res_multistep", "res-2m")],
)
def test_k_diffusions_spelling(theirs, ours):
    assert recipe(theirs).name == ours


def test_an_unknown_name_is_answered_with_the_next():
    with pytest.raises(UsageError, match="'unipc'"):
        recipe("unpc")
