"""Many devices: the only room that knows of more than one process.

Nothing here is state of a module, but for the meshes that DTensor remembers (``fsdp.copies_mesh``): a ``Mesh`` is built
once and passed on, and ``apply`` puts what it implies on a finished model from outside.
"""
