"""The one exception that users are meant to read."""


class UserError(Exception):
    """Something the user can mend: the message is one line that names the cause and the cure.

    `btx_jax.launch` and `python -m btx_jax` print it without a traceback and exit with status 2.
    """
