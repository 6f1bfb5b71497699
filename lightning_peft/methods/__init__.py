"""One file a method: its paper, its fields, its adapter, and how that merges."""

from importlib import import_module
from pkgutil import iter_modules

from lightning_peft.core.method import Method

# A new method is one new file here: every public Method that a file defines is exported.
for _module in iter_modules(__path__):
    for _name, _value in vars(import_module(f"{__name__}.{_module.name}")).items():
        if (
            isinstance(_value, type)
            and issubclass(_value, Method)
            and _value.__module__ == f"{__name__}.{_module.name}"
        ):
            globals()[_name] = _value

__all__ = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, Method) and value is not Method and not name.startswith("_")
)
