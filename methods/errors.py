"""The one exception that means "the caller can fix this"."""


class UserError(Exception):
    """Bad input: one line that names the problem and the fix. The commands exit with code 2."""


class BadSelection(UserError, ValueError):
    """A method's answer cannot be applied; the message names the method and the field. In a run the cells of
    that method fail and the others go on."""
