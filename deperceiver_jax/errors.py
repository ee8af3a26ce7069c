"""What a person can mend: one sentence that names the file and the item."""


class UserError(Exception):
    """A wrong input or setting. The command-line programs print its sentence to stderr and exit with status 1."""
