# %% [markdown]
# ## Parameters
#
# The parameter cell holds plain values and nothing else, so that papermill, Colab's forms and a command line can all
# replace them. `-1` and `""` mean "decide for me": a preset fills them in. This chapter reads them
# from wherever they come, before anything slow happens: a misspelt name should cost a second, not an afternoon.

# %%
import argparse
import difflib
import sys

from nanochat.runtime import UserError

# %% [markdown]
# ### `parse_arguments`
# Every parameter of the cell is an option of the script, and nothing else is.


# %%
def parse_arguments(arguments: list[str], types: dict[str, type], program: str) -> dict[str, str]:
    """`--name=value` and `--name value` as a dict of strings.

    types: name -> type of every parameter that there is. program: what --help calls the script. Raises UserError for
    an argument that is none of them, and names the nearest.
    """
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, kind in types.items():
        parser.add_argument(f"--{name}", help=kind.__name__)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        if name in types:
            raise UserError(f"{unknown[0]!r} is not understood; parameters are written --{name}=value.")
        near = difflib.get_close_matches(name, types, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them."
        raise UserError(f"there is no parameter {name!r}; {hint}")
    return vars(given)


def command_line() -> list[str] | None:
    """This script's arguments; None inside a Jupyter kernel."""
    return None if "ipykernel" in sys.modules else sys.argv[1:]


# %% [markdown]
# ### `typed_value`
# Text from a command line becomes what the cell would have held; what cannot is refused by name.


# %%
def typed_value(name: str, value, kind: type):
    """The value as a `kind`: text from a command line is converted, a whole number serves as a float.

    Raises UserError when it is nothing of that kind.
    """
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(value, str):
        try:
            return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            pass
    wanted = "True or False" if kind is bool else f"of type {kind.__name__}"
    raise UserError(f"{name} is {value!r}; it must be {wanted}.")


def is_given(value) -> bool:
    """False for the two values that mean "decide for me"."""
    return isinstance(value, bool) or value not in ("", -1)
