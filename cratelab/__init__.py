"""cratelab: CRATE, the transformer derived from sparse rate reduction, as mathematics, models and measurements."""

import lazy_loader

# What `cl.…` names is listed in __init__.pyi, and imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
