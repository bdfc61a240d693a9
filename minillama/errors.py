"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """A mistake in flags, files or data: the text names the thing and the remedy. Recipes print it alone."""
