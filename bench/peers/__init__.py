"""Other attribution libraries through their public interfaces, one module each.

A module says in ``PACKAGE`` which distribution it needs (None: nothing), in ``READS_QUERIES``
whether a call passes the query texts through the model itself instead of taking their gradients,
and in ``DIFFERS`` what it does otherwise than the problem asks. ``prepare(problem, scratch)``
returns the call that is timed; it may change the problem's model and write into ``scratch``.
"""

NAMES = ("less", "bergson", "kronfluence", "captum", "dattri", "trak")
