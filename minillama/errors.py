"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """A mistake in flags, files or data: the text names the thing and the remedy. Recipes print it alone.

    Not a ValueError: parsers of flags catch those, and would print it once for each rank.
    """
