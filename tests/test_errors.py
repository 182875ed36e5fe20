import inspect
import pickle
import re

import pytest

from penjing import errors
from penjing.errors import PenjingError

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, PenjingError)]


def drawn():
    """Class → its parent, read from the tree in the module's docstring."""
    found, parents = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error|MissingDependency)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            found[match[2]] = parents[depth - 1] if depth else "Exception"
    return found


def test_the_tree_in_the_docstring_is_the_tree():
    assert drawn() == {error.__name__: error.__bases__[0].__name__ for error in ALL}


def test_a_request_that_cannot_be_understood_has_an_exit_code_of_its_own():
    assert {error.__name__: error.exit_code for error in ALL if error.exit_code != 1} == {
        "UsageError": 2,
        "GoalError": 2,
        "RecipeError": 2,
    }


@pytest.mark.parametrize("error", ALL)
def test_every_error_says_what_got_expected_and_remedy(error):
    made = error("it broke", got=[1, 2], expected="a whole", remedy="glue it")
    assert str(made) == "it broke\n  got:      [1, 2]\n  expected: a whole\n  remedy:   glue it"
    assert (made.what, made.got, made.expected, made.remedy) == ("it broke", [1, 2], "a whole", "glue it")


def test_the_name_of_its_case_is_for_programs_and_goes_with_it_into_another_process():
    error = errors.OutputError("it broke", got=[1, 2], remedy="glue it", code="broken", field="leg")
    assert "broken" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, again.field) == (errors.OutputError, "broken", "leg")
    assert str(again) == str(error)
    assert PenjingError("it broke").code == ""


def test_what_is_not_known_is_left_out():
    assert str(PenjingError("it broke")) == "it broke"
    assert str(PenjingError("it broke", remedy="glue it")) == "it broke\n  remedy:   glue it"


@pytest.mark.parametrize("value", [0, False, ""])
def test_empty_findings_are_findings(value):
    assert f"got:      {value}" in str(PenjingError("it broke", got=value))
