"""Will a run fit and how fast could it be: its real train step, compiled for hardware that is not there."""
