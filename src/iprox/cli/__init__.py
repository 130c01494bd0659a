"""The ``iprox`` command: looking at what the workflow made."""
