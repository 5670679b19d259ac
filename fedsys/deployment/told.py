"""What a server is told of why a client failed: one line, and of private rows nothing."""

import re

GENERAL = "the client failed, and its device does not say why"
_LONGEST = 200  # characters
_NUMBER = r"([0-9.e+-]{1,24}|inf)"
_BUDGET = re.compile(
    rf"PrivacyBudgetExceeded: .*would have spent epsilon {_NUMBER}, above its target {_NUMBER}\b"
)
# Said by fedsys, by Flower and by the system, and nothing of a client's rows is in them.
_HARMLESS = (
    "the client failed, and does not say why",
    "the frozen factors of this client are not those of the server",
    "this client's rows are private",
    "this client has no examples",
    "no secure aggregation is under way at this client",
    "the message is of another secure aggregation than is under way",
    "this client sends its update to a sum only, and the server asks for it",
    "ClientApp stopped responding.",
    "No space left on device",
    "An exception was raised when attempting to load `ClientApp`",
)


def told(reason: str | None, private: bool) -> str:
    """Return what of a client's ``reason`` may leave: one line, and of ``private`` rows nothing."""
    text = " ".join((reason or "").split())
    if not private:
        return text[:_LONGEST] or GENERAL
    if found := _BUDGET.search(text):
        # Without the client's name, which may be that of a person.
        return (
            f"PrivacyBudgetExceeded: would have spent epsilon {found[1]}, above its target"
            f" {found[2]}"
        )
    return next((known for known in _HARMLESS if known in text), GENERAL)
