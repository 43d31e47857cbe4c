"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Bad input, told in one sentence.

    `message` names the file, tensor or key at fault and what was expected; `hint` says what to do.
    The command lines print both and exit with code 2, without a traceback.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
