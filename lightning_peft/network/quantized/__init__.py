"""One file a package that quantizes weights: how to read its tensors.

The packages are not imported: a model that has such a weight has loaded its package.
"""

from importlib import import_module
from pkgutil import iter_modules

# A new package is one new file here: its readers register themselves.
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
