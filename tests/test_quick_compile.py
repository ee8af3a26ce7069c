"""Flags that the installed XLA does not know are left out: it would end the process."""

from tests.quick_compile import known_flags


def test_only_known_flags_are_set():
    known = "--xla_backend_optimization_level=0"
    assert known_flags((known, "--xla_cpu_never_heard_of=1", "--xla_cpu_nor_of_this=true")) == [known]
