"""Flags that several programs share. Nothing here needs JAX, so that a help text is there at once."""

from absl import flags


def define_detector_flags(values: flags.FlagValues) -> None:
    """Which detector a program works with."""
    flags.DEFINE_string("workdir", None, "The run whose detector is used.", flag_values=values)
    flags.DEFINE_string("checkpoint", "latest", "Of the workdir: latest, best, or a step.", flag_values=values)
    flags.DEFINE_string(
        "weights",
        None,
        "Instead of a workdir: an output of import-weights, a folder that transformers wrote, or hf://owner/name, such "
        "as hf://facebook/detr-resnet-50.",
        flag_values=values,
    )


def define_process_flags(values: flags.FlagValues) -> None:
    """How the processes of one run find one another; see processes.py."""
    flags.DEFINE_bool(
        "distributed",
        None,
        "Join the other processes of a cluster. Unset: when the environment says that there are any.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0, to join by hand; any free port.", flag_values=values
    )
    flags.DEFINE_integer("process_count", None, "How many processes there are, to join by hand.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, to join by hand.", flag_values=values)
