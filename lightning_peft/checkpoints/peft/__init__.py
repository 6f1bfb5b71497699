"""The peft package's format: what all methods have in common, and one file for each that is more than a table."""

from importlib import import_module
from pkgutil import iter_modules

# A new file here registers the formats that it defines.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
