"""Compiled loops are there whatever numba may write, and their absence is said."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("numba")


def output(script):
    """What a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_where_numba_may_write_nothing_loops_are_compiled_for_this_process():
    """As in a container whose packages are read-only and whose user has no home."""
    script = """
        from pathlib import Path
        import numba
        from numba.core import caching
        caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]
        from penjing.numerics.compiled import loops
        assert len(loops("copies_loops").__name__) > 0
        print(numba.config.CACHE_DIR, Path(numba.config.CACHE_DIR).is_dir())
    """
    folder, there = output(script)
    assert "penjing-" in folder and there == "True"


def test_a_missing_package_is_named_with_the_remedy():
    script = """
        import sys
        sys.modules["numba"] = None
        from penjing.errors import MissingDependency
        from penjing.numerics.compiled import loops
        try:
            loops("copies_loops")
        except MissingDependency as error:
            print(error.code, error.remedy)
    """
    assert output(script) == ["not-installed", "pip", "install", "'penjing[pack]'"]
