"""The ``iprox`` command: looking at what the workflow made.

Nothing here starts torch, transformers or pandas before a command needs it: the modules import
them inside their functions, so that ``iprox --help`` answers at once.
"""
