"""The one exception that means "the caller can fix this"."""


class UserError(Exception):
    """Bad input: one line that names the problem and the fix. The commands exit with code 2."""
