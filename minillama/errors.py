"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A mistake in flags, files or data. Its text names the thing and the remedy; recipes print it without a traceback."""
