"""The table of compile_time.py; that the step is preflight's, preflight's tests prove."""

from benchmarks.compile_time import compare


def test_a_compiler_that_does_not_say_how_much_code_it_writes():
    assert compare(192.4, 365.2) == "192 | 365 | 0.53"
    assert compare(0.0, 0.0) == "- | - | -"
