import pytest
from tiny_networks import CASES, export


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(case, runtime, precision)``: an artifact of a tiny network, made once for all tests."""
    made = {}

    def get(case, runtime, precision):
        key = (case, runtime, precision)
        if key not in made:
            made[key] = export(CASES[case], runtime, precision, tmp_path_factory.mktemp("artifact"))
        return made[key]

    return get
