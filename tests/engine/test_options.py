"""Options are values that were checked; choices are found by name, and bring their own options."""

import json
import pickle
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from blockpruner.engine.errors import UserError
from blockpruner.engine.options import AutoInt, Choice, Names, Numbers, Options, Shares, different, listed

PACKAGE = "sauces_of_test_options"
MODULES = {
    "__init__": "",
    "hot": """
class Hot(Sauce):
    name = "hot"
    about = "burns"
    strength: float = Field(default=2.0, ge=0)
    drops: int = Field(default=3, ge=1)
""",
    "others": """
class Cold(Sauce):  # has no name: only what is made of it can be chosen
    drops: int = Field(default=3, ge=1)

class Sour(Cold):
    name = "sour"
    about = "of lemons"

class Sweet(Cold):
    name = "sweet"
    about = "of apples"
    sugar: bool = True
""",
}


class Sauce(Choice):
    package = PACKAGE


class Plain(Sauce):
    """Choices are found wherever they are defined, as long as that was imported."""

    name = "plain"
    about = "none"


class Colour(StrEnum):
    RED = "red"
    GREEN = "green"


class Plate(Options):
    """Plate"""

    title: str
    """What it is called."""
    portions: int = Field(default=2, ge=1, le=99)
    """For how many it is."""


class Dish(Plate):
    salt: float | None = Field(default=None, gt=0, lt=1)
    colour: Colour = Colour.RED
    trim: Colour | None = None
    vegan: bool = False
    hours: AutoInt = None
    tags: Names = ()
    sizes: Numbers = ()
    shares: Shares = ()
    sauce: Sauce = Plain()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vegan and self.title == "steak":
            raise UserError("expected no `vegan` steak.")
        return self


@pytest.fixture(scope="module", autouse=True)
def sauces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("packages") / PACKAGE
    folder.mkdir()
    head = f"from pydantic import Field\n\nfrom {__name__} import Sauce\n"
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(head + text if text else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        yield


words = st.text("abc.01", min_size=1, max_size=5)
finite = st.floats(allow_nan=False, allow_infinity=False)
drops = st.integers(1, 9)
some_sauces = st.one_of(
    st.builds(lambda: Plain()),
    st.builds(lambda **given: Sauce.named("sauce", "hot", given), strength=st.floats(0, 9), drops=drops),
    st.builds(lambda **given: Sauce.named("sauce", "sour", given), drops=drops),
    st.builds(lambda **given: Sauce.named("sauce", "sweet", given), drops=drops, sugar=st.booleans()),
)
dishes = st.builds(
    Dish,
    title=st.text(),
    portions=st.integers(1, 99),
    salt=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    colour=st.sampled_from(Colour),
    trim=st.none() | st.sampled_from(Colour),
    vegan=st.booleans(),
    hours=st.none() | st.integers(),
    tags=st.lists(words, max_size=3).map(tuple),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    shares=st.lists(finite, max_size=3).map(tuple),
    sauce=some_sauces,
)


def refusal(kind: type[Options] = Dish, **values: Any) -> str:
    """The one line with which `of` says no."""
    with pytest.raises(UserError) as error:
        kind.of(**({"title": "soup"} | values if kind is Dish else values))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@given(dishes)
def test_flat_values_recorded_values_and_pickles_give_the_same_options(dish: Dish) -> None:
    for again in (
        Dish.of(**dish.flat()),
        Dish.of(**json.loads(json.dumps(dish.to_json()))),
        pickle.loads(pickle.dumps(dish)),
        dish.replace(),
    ):
        assert again == dish
        assert hash(again) == hash(dish)
        assert type(again.sauce) is type(dish.sauce)
        assert again.flat() == dish.flat()


@given(dishes, dishes)
def test_options_are_equal_if_all_their_values_are(one: Dish, other: Dish) -> None:
    assert (one == other) == (one.flat() == other.flat())
    assert len({one, other}) == (1 if one == other else 2)


def test_options_of_another_class_are_others() -> None:
    sour, sweet = (Sauce.named("sauce", name) for name in ("sour", "sweet"))
    assert sour != sweet
    assert Plate(title="soup") != Dish(title="soup")


@given(dishes, st.integers(1, 99))
def test_a_replaced_value_is_the_only_change(dish: Dish, portions: int) -> None:
    before = dish.flat()
    assert dish.replace(portions=portions).flat() == before | {"portions": portions}
    assert dish.flat() == before


def test_replaced_values_are_checked_and_options_never_change() -> None:
    dish = Dish(title="soup")
    with pytest.raises(UserError, match="`portions` of at least 1, got 0"):
        dish.replace(portions=0)
    with pytest.raises(UserError, match="did you mean `portions`"):
        dish.replace(portion=1)
    with pytest.raises(ValidationError, match="frozen"):
        dish.portions = 3  # type: ignore[misc]


@given(dishes)
def test_a_part_holds_the_values_of_its_section(dish: Dish) -> None:
    assert dish.part(Plate) == Plate(title=dish.title, portions=dish.portions)


def test_the_sentence_under_a_field_is_its_description() -> None:
    assert Plate.model_fields["portions"].description == "For how many it is."


@given(st.integers(max_value=0) | st.integers(min_value=100))
def test_numbers_out_of_range_are_refused(portions: int) -> None:
    limit = "least 1" if portions < 1 else "most 99"
    assert refusal(portions=portions) == f"expected `portions` of at {limit}, got {portions}."


@given(finite.filter(lambda value: not 0 < value < 1))
def test_the_ends_of_an_open_range_are_out_of_it(salt: float) -> None:
    limit = "above 0" if salt <= 0 else "below 1"
    assert refusal(salt=salt) == f"expected `salt` {limit}, got {salt}."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "nan", "inf"])
@pytest.mark.parametrize("name", ["salt", "portions", "shares", "strength"])
def test_what_is_no_finite_number_is_refused(name: str, value: float | str) -> None:
    given = [value] if name == "shares" else value
    assert f"`{name}`" in refusal(**{"sauce": "hot", name: given})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text("aé\n'`%, ", max_size=4),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text("ab\n", max_size=2), values, max_size=2),
    max_leaves=3,
)


@given(
    st.sampled_from(sorted({*Dish.model_fields, "strength", "drops", "sugar"} - {"sauce"})),
    ANYTHING,
    st.sampled_from(["hot", "sweet"]),
)
def test_whatever_is_given_is_taken_or_refused_in_one_line_that_names_the_option(
    name: str, value: Any, sauce: str
) -> None:
    try:
        dish = Dish.of(**{"title": "soup", "sauce": sauce, name: value})
    except UserError:
        assert f"`{name}`" in refusal(**{"sauce": sauce, name: value})
    else:
        assert Dish.of(**dish.flat()) == dish


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "enum": ({"colour": "blue"}, "expected `colour` to be red or green, got 'blue'."),
    "enum or nothing": ({"trim": "blue"}, "expected `trim` to be 'red' or 'green', got 'blue'."),
    "whole number": ({"portions": "many"}, "expected `portions` to be a whole number, got 'many'."),
    "half": ({"portions": 1.5}, "expected `portions` to be a whole number, got 1.5."),
    "nothing": ({"portions": None}, "expected `portions` to be a whole number, got None."),
    "number": ({"salt": "some"}, "expected `salt` to be a number, got 'some'."),
    "yes or no": ({"vegan": "perhaps"}, "expected `vegan` to be true or false, got 'perhaps'."),
    "text": ({"title": 3}, "expected `title` to be text, got 3."),
    "auto": ({"hours": "soon"}, "expected `hours` to be a whole number, got 'soon'."),
    "one of many": ({"sizes": "1,x"}, "expected `sizes` to be a whole number, got 'x'."),
    "rule": ({"title": "steak", "vegan": True}, "expected no `vegan` steak."),
    "two": (
        {"portions": 0, "colour": "blue"},
        "expected `portions` of at least 1, got 0. expected `colour` to be red or green, got 'blue'.",
    ),
    "close name": ({"portion": 3}, "there is no option 'portion' here; did you mean `portions`?"),
    "far name": ({"xyz": 3}, "there is no option 'xyz' here."),
    "choice": ({"sauce": "mild"}, "expected `sauce` to be hot, plain, sour or sweet, got 'mild'."),
    "range of a choice": ({"sauce": "hot", "strength": -1}, "expected `strength` of at least 0, got -1."),
    "other choice's": (
        {"sauce": "sour", "strength": 9},
        "expected `strength` with `sauce=hot`, got `sauce=sour`.",
    ),
    "other choices'": (
        {"sauce": "plain", "drops": 9},
        "expected `drops` with `sauce=hot`, `sauce=sour` or `sauce=sweet`, got `sauce=plain`.",
    ),
    "not the default choice's": ({"strength": 9}, "expected `strength` with `sauce=hot`, got `sauce=plain`."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_what_was_expected_and_what_was_given(case: str) -> None:
    values, message = REFUSED[case]
    assert refusal(**values) == message


def test_an_option_without_a_default_is_asked_for() -> None:
    assert refusal(Plate) == "expected `title`, which has no default."


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_survives_pickling(case: str) -> None:
    with pytest.raises(UserError) as error:
        Dish.of(**{"title": "soup", **REFUSED[case][0]})
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is UserError
    assert str(again) == str(error.value)


@given(st.sampled_from(["plain", "hot", "sour", "sweet"]), st.sampled_from([None, "default"]))
def test_options_of_another_choice_do_no_harm_if_they_are_not_given_or_the_default(
    name: str, given: str | None
) -> None:
    values = {"strength": 2.0, "drops": 3, "sugar": True} if given else dict.fromkeys(("strength", "drops", "sugar"))
    assert Dish.of(title="soup", sauce=name, **values) == Dish(title="soup", sauce=Sauce.named("sauce", name))


def test_options_beside_a_choice_that_is_made_already_change_it() -> None:
    hot = Sauce.named("sauce", "hot", {"drops": 9})
    assert Dish.of(title="soup", sauce=hot).sauce == hot
    assert Dish.of(title="soup", sauce=hot, strength=1).sauce.flat() == {"strength": 1.0, "drops": 9}


def test_choices_are_found_in_their_package_by_name() -> None:
    found = Sauce.all()
    assert list(found) == ["hot", "plain", "sour", "sweet"]
    assert {kind.__module__ for kind in found.values()} == {__name__, f"{PACKAGE}.hot", f"{PACKAGE}.others"}
    assert sorted(Sauce.option_names()) == ["drops", "strength", "sugar"]
    assert Dish.choice_fields() == {"sauce": Sauce}


def test_two_choices_of_one_name_are_a_mistake() -> None:
    class Twice(Choice):
        package = PACKAGE

    class One(Twice):
        name = "one"

    class Other(Twice):
        name = "one"

    with pytest.raises(TypeError, match=r"'one' names both .*One.* and .*Other"):
        Twice.all()


@pytest.mark.parametrize("given", ["a,b, c", "a,,b,c,", ["a,b", "c"], ("a", "b", "c")])
def test_lists_may_be_written_with_commas(given: Any) -> None:
    assert Dish(title="soup", tags=given).tags == ("a", "b", "c")


def test_lists_of_numbers_may_be_written_with_commas() -> None:
    dish = Dish(title="soup", sizes="1, 2", shares="0.1,1", hours="auto")
    assert (dish.sizes, dish.shares, dish.hours) == ((1, 2), (0.1, 1.0), None)
    assert Dish(title="soup", hours="3").hours == 3


def test_what_differs_is_said_by_name() -> None:
    known, mine = {"seed": 1, "old": 2}, {"seed": 2, "new": "x"}
    assert different(known, mine) == "`seed` was 1, now 2; `new` was None, now 'x'"
    assert different(mine, mine) == ""
    assert [listed(names) for names in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]
