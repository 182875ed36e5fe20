import ast
import inspect
import pickle
import re
from pathlib import Path

import pytest

from penjing import errors
from penjing.errors import PenjingError

ALL = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, PenjingError)]

ROOT = Path(__file__).resolve().parents[1]


def drawn():
    """Class → its parent, read from the tree in the module's docstring."""
    parent_of, parents = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error|MissingDependency)\b", line)
        if match:
            depth = len(match[1]) // 4
            parents[depth:] = [match[2]]
            parent_of[match[2]] = parents[depth - 1] if depth else "Exception"
    return parent_of


def test_the_tree_in_the_docstring_is_the_tree():
    assert drawn() == {error.__name__: error.__bases__[0].__name__ for error in ALL}


def test_a_request_that_cannot_be_understood_has_an_exit_code_of_its_own():
    assert {error.__name__: error.exit_code for error in ALL if error.exit_code != 1} == {
        "UsageError": 2,
        "GoalError": 2,
        "RecipeError": 2,
        "ParityError": 3,
    }


@pytest.mark.parametrize("error", ALL)
def test_every_error_says_what_got_expected_and_remedy(error):
    built = error("it broke", got=[1, 2], expected="a whole", remedy="glue it")
    assert str(built) == "it broke\n  got:      [1, 2]\n  expected: a whole\n  remedy:   glue it"
    assert (built.what, built.got, built.expected, built.remedy) == ("it broke", [1, 2], "a whole", "glue it")


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


def raised(path):
    """The calls of a file that make an error of Penjing's or a subclass of one, by its name."""
    kinds = {error.__name__ for error in ALL} | {"TargetError"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in kinds:
            yield node


def test_every_error_has_the_name_of_its_case():
    assert [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in (ROOT / "src").rglob("*.py")
        for call in raised(path)
        if not {"code", None} & {keyword.arg for keyword in call.keywords}
    ] == []


def test_names_of_cases_are_words_with_hyphens():
    calls = [(path, call) for path in (ROOT / "src").rglob("*.py") for call in raised(path)]
    codes = [
        (path.name, name.value)
        for path, call in calls
        for keyword in call.keywords
        if keyword.arg == "code"
        for name in ast.walk(keyword.value)
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    ]
    assert len(codes) > 300
    assert [code for code in codes if not re.fullmatch(r"-?[a-z]+(-[a-z]+)*", code[1])] == []


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "tests").iterdir() if path.is_dir()))
def test_no_test_compares_the_sentence_of_an_error(folder):
    """What an error is, is its kind, its code and its fields: see `tests.raises`."""
    kinds = {error.__name__ for error in ALL}
    comparing = [
        f"{path.name}:{call.lineno}"
        for path in (ROOT / "tests" / folder).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and call.args and any(keyword.arg == "match" for keyword in call.keywords)
        if kinds & {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(call.args[0])}
    ]
    assert comparing == []
